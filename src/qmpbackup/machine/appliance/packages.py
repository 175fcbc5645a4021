# SPDX-License-Identifier: Apache-2.0
"""Debian's packages, downloaded and unpacked without root, and nothing of them installed.

apt checks what it downloads by the keys that this host trusts. Where its lists are missing or old, it is
given lists of its own in the folder, as only root may write to the host's.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from qmpbackup.durable import storage_errors
from qmpbackup.errors import VmError
from qmpbackup.process import Result, run

_SECONDS = 600.0
_ALONE = (
    *("--no-recommends", "--no-suggests", "--no-conflicts"),
    *("--no-breaks", "--no-replaces", "--no-enhances"),
)
_LIBRARIES = re.compile(r"(lib|zlib)[a-z0-9.+-]*\Z")
_NOT_LIBRARIES = re.compile(r"perl|libpam|libsemanage|libsepol")


class Packages:
    """Packages for one purpose, in a folder that is thrown away."""

    def __init__(self, folder: Path) -> None:
        self._files = folder / "packages"
        self._lists = folder / "apt"
        self._own_lists: tuple[str, ...] = ()
        self.system = folder / "system"
        """Where they are unpacked."""

    def fetch(self, kernel: str, programs: Sequence[str]) -> tuple[str, ...]:
        """Download and unpack a kernel, by the name of the package that stands for the newest, and
        programs with their libraries; the names of the files of all.

        Raises:
            VmError: this host cannot do that.
        """
        with storage_errors(f"write to {self._files.parent}"):
            self._files.mkdir()
            self.system.mkdir()
        done = self._download(kernel, programs)
        if done.code:
            self._own_lists = self._lists_of_our_own()
            done = self._download(kernel, programs)
        if done.code:
            raise VmError(
                f"Debian's packages for the appliance cannot be downloaded: {done.reason}.",
                "See that apt's sources can be reached, or copy the appliance from a host where "
                "`qmpbackup files prepare` has made it.",
            )
        files = sorted(self._files.glob("*.deb"))
        for each in files:
            _require(run(["dpkg-deb", "-x", str(each), str(self.system)], timeout=_SECONDS))
        return tuple(each.name for each in files)

    def _download(self, kernel: str, programs: Sequence[str]) -> Result:
        image = self._kernel(kernel)
        if not image:
            return Result("apt-cache", 100, b"", f"apt knows no package {kernel}")
        names = [image, *programs, *self._libraries(programs)]
        # `env -C`: it downloads to the folder in which it is.
        return run(
            ["env", "-C", str(self._files), "apt-get", *self._options(), "-q", "download", *names],
            timeout=_SECONDS,
        )

    def _options(self) -> Sequence[str]:
        return ("-o", "APT::Sandbox::User=root", *self._own_lists)

    def _lists_of_our_own(self) -> tuple[str, ...]:
        with storage_errors(f"make {self._lists}"):
            for each in ("lists/partial", "cache/archives/partial"):
                (self._lists / each).mkdir(parents=True)
        options = (
            *(
                "-o",
                f"Dir::State::Lists={self._lists}/lists",
                "-o",
                f"Dir::Cache={self._lists}/cache",
            ),
        )
        run(
            ["apt-get", "-o", "APT::Sandbox::User=root", *options, "-q", "update"], timeout=_SECONDS
        )
        return options

    def _kernel(self, name: str) -> str:
        said = self._cache("depends", name)
        return next(
            (word for word in said.split() if word.startswith("linux-image-") and word != name), ""
        )

    def _libraries(self, programs: Sequence[str]) -> list[str]:
        """What programs need to run, and nothing of a system around them."""
        names = set(self._cache("depends", "--recurse", *_ALONE, *programs).split())
        return sorted(
            each for each in names if _LIBRARIES.match(each) and not _NOT_LIBRARIES.search(each)
        )

    def _cache(self, *words: str) -> str:
        done = run(["apt-cache", *self._own_lists, *words], timeout=_SECONDS)
        return done.output.decode("utf-8", "replace")

    def program(self, name: str) -> Path:
        """A program of theirs.

        Raises:
            VmError: none of them holds it.
        """
        for folder in ("usr/sbin", "usr/bin", "sbin", "bin"):
            path = self.system / folder / name
            if path.exists():
                return path
        raise VmError(f"Debian's packages hold no {name}.")

    def libraries_of(self, program: Path) -> list[Path]:
        """What the loader finds for a program among them, itself included, without running any of it."""
        loader = next(self.system.glob("**/ld-linux-*.so.*"), None)
        if loader is None:
            raise VmError("Debian's packages hold no loader of programs.")
        folders = {str(each.parent) for each in self.system.glob("**/*.so.*")}
        done = run(
            [str(loader), "--list", "--library-path", ":".join(sorted(folders)), str(program)]
        )
        if b"statically linked" in done.output:
            return []
        found = re.findall(rf"({re.escape(str(self.system))}\S+)", done.output.decode())
        if done.code or "not found" in done.output.decode():
            raise VmError(f"Debian's packages lack libraries of {program.name}: {done.reason}.")
        return [Path(each) for each in dict.fromkeys(found)]


def _require(done: Result) -> None:
    if done.code:
        raise VmError(f"A package cannot be unpacked: {done.reason}.")


def is_possible() -> bool:
    """Whether this host has what it takes."""
    import shutil

    return os.uname().machine == "x86_64" and all(
        shutil.which(each) for each in ("apt-get", "apt-cache", "dpkg-deb")
    )

# SPDX-License-Identifier: Apache-2.0
"""Files of the host that a VM was started with and no point holds: firmware, kernels, media.

They are recorded by length and digest, so that a boot elsewhere can tell whether they are the same.
"""

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from qmpbackup.images.digest import digest
from qmpbackup.model import Disk, NeededFile, VmConfig
from qmpbackup.plan.boot_disks import Attached
from qmpbackup.plan.booting import Setting, launch

_LARGEST = 64 * 1024 * 1024
"""Firmware and kernels are smaller; what is larger is a medium, and known by its length."""

FIRMWARE: Final = tuple(
    Path("/usr/share") / name
    for name in (
        *("OVMF", "ovmf", "qemu", "seabios", "qemu-efi-aarch64", "AAVMF", "edk2/ovmf", "edk2/x64"),
        *("edk2-ovmf/x64", "qemu/firmware", "edk2/aarch64", "OVMF/x64"),
    )
)
"""Folders in which distributions keep firmware."""


def of(config: VmConfig, disks: Iterable[Disk], pid: int | None) -> tuple[NeededFile, ...]:
    """The files that this VM needs to be started, as far as they can be read."""
    attached = [Attached(each.id, each.filename, {"node-name": each.id}) for each in disks]
    try:
        named = launch(config, attached, Setting("", "")).needs
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return ()  # a line that nobody foresaw fails no backup
    root = Path(f"/proc/{pid}/root") if pid else Path("/")
    return tuple(_known(named, root))


def _known(named: Iterable[str], root: Path) -> Iterator[NeededFile]:
    for name in named:
        with suppress(OSError):
            found = look(root / name.lstrip("/"))
            yield NeededFile(name, found.size, found.digest)


def look(path: Path) -> NeededFile:
    """A file as it is now.

    Raises:
        OSError: it is no plain file, or cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode):
            raise OSError("it is no plain file")
        small = state.st_size <= _LARGEST
        return NeededFile(str(path), state.st_size, digest(fd) if small else "")
    finally:
        os.close(fd)


def changed(then: Iterable[NeededFile]) -> Iterator[str]:
    """Those that are here, and are others than then."""
    for each in then:
        with suppress(OSError):
            now = look(Path(each.path))
            if now.size != each.size or (each.digest and now.digest != each.digest):
                yield each.path


def moved(
    then: Iterable[NeededFile], folders: Iterable[Path] = FIRMWARE
) -> Iterator[tuple[str, str]]:
    """Those that are not where they were, and where the same contents are: distributions and versions of
    them have firmware in different places."""
    for each in then:
        if each.digest and not os.path.lexists(each.path):
            for candidate in _candidates(folders, each.size):
                with suppress(OSError):
                    if look(candidate).digest == each.digest:
                        yield each.path, str(candidate)
                        break


def _candidates(folders: Iterable[Path], size: int) -> Iterator[Path]:
    """Plain files of this length in folders where firmware is."""
    for folder in folders:
        with suppress(OSError):
            for path in sorted(folder.iterdir()):
                if path.is_file() and path.stat().st_size == size:
                    yield path


def found_again(words: Iterable[str], elsewhere: Mapping[str, str]) -> tuple[str, ...]:
    """A command line with files at their new places."""
    found = tuple(words)
    for then, now in elsewhere.items():
        if "," not in then + now:  # which QEMU writes otherwise, and nobody calls firmware so
            named = re.compile(rf'(?<![^=,"]){re.escape(then)}(?![^,"])')
            found = tuple(named.sub(lambda _: now, word) for word in found)  # noqa: B023
    return found

# SPDX-License-Identifier: Apache-2.0
"""Making the appliance: Debian's cloud kernel, and an initramfs of Debian's programs and an agent of ours.

It is made once, without root, and kept in the user's cache under the digest of all that it is made by.
The kernel is that of the package, as that of the host may be readable for root alone, or not be there.
"""

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from qmpbackup.durable import make_folders, storage_errors
from qmpbackup.errors import VmError
from qmpbackup.filelock import named_lock
from qmpbackup.machine.appliance import modules
from qmpbackup.machine.appliance.initramfs import Initramfs
from qmpbackup.machine.appliance.packages import Packages, is_possible

log = logging.getLogger(__name__)

_KERNEL = "linux-image-cloud-amd64"
_PACKAGES = (
    *("busybox-static", "findutils", "tar", "util-linux", "ntfs-3g", "btrfs-progs"),
    *("lvm2", "mdadm", "cryptsetup-bin", "mount"),
)
_PROGRAMS = ("find", "tar", "blkid", "ntfs-3g", "btrfs", "lvm", "mdadm", "cryptsetup", "losetup")
_APPLETS = (
    *("cat", "ln", "mkdir", "modprobe", "mount", "poweroff", "readlink", "rmdir", "sed", "sh"),
    *("tail", "tr", "usleep"),
)
"""What the agent uses of busybox."""
_MODULES = (
    *("virtio_pci", "virtio_console", "virtio_blk", "loop"),
    *("ext4", "xfs", "btrfs", "vfat", "exfat", "fuse", "isofs", "udf", "squashfs", "erofs"),
    *("nls_utf8", "nls_cp437", "nls_ascii", "nls_iso8859_1"),
    *("dm_mod", "dm_crypt", "dm_snapshot", "dm_mirror", "dm_raid", "dm_zero"),
    *("dm_thin_pool", "dm_cache", "dm_cache_smq", "dm_writecache", "dm_integrity"),
    *("linear", "raid0", "raid1", "raid10", "raid456"),
    *("crc32c_generic", "crc32c_intel", "blake2b_generic", "xxhash_generic", "sha512_generic"),
    *("algif_skcipher", "algif_hash", "xts", "essiv", "cts", "lrw", "ecb", "aesni_intel"),
    *("serpent_generic", "twofish_generic", "camellia_generic", "rmd160", "wp512"),
)
_CACHE_VERSION = 1
_MAKING = "making-"
_MAKING_SECONDS = 900.0
"""How long one run waits for another that makes it."""

_DONE = "packages"
"""The file that is written last: what an appliance was made of."""


@dataclass(frozen=True, slots=True)
class Appliance:
    """Where the appliance is."""

    folder: Path

    @property
    def kernel(self) -> Path:
        """Its kernel."""
        return self.folder / "vmlinuz"

    @property
    def initramfs(self) -> Path:
        """Its first and only file system."""
        return self.folder / "initramfs"


def appliance(*, anew: bool = False) -> Appliance:
    """The appliance of this user, which is made if it is not there, or is wanted anew.

    Raises:
        VmError: this host cannot make it.
        StorageError: there is no room for it.
    """
    folder = _folder()
    if anew or not (folder / _DONE).exists():
        if not is_possible():
            raise VmError(
                "The appliance that reads file systems is made of Debian's packages, by apt-get and "
                "dpkg-deb on x86-64, and is not here yet.",
                f"Make it on a Debian host by `qmpbackup files prepare`, and copy it to {folder}.",
            )
        with named_lock("appliance", "the appliance", _MAKING_SECONDS):
            if anew or not (folder / _DONE).exists():  # nobody has made it meanwhile
                log.info("Making the appliance of Debian's packages, which takes a while.")
                _make(folder)
    return Appliance(folder)


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(base) if base else Path.home() / ".cache"
    said = (
        repr((_CACHE_VERSION, _KERNEL, _PACKAGES, _PROGRAMS, _APPLETS, _MODULES)).encode()
        + _agent()
    )
    return cache / "qmpbackup" / "appliance" / hashlib.sha256(said).hexdigest()[:16]


def _agent() -> bytes:
    return files(__package__).joinpath("agent.sh").read_bytes()


def _make(folder: Path) -> None:
    with storage_errors(f"make the appliance in {folder}"), _workplace(folder.parent) as work:
        packages = Packages(work)
        names = packages.fetch(_KERNEL, _PACKAGES)
        done = work / "done"
        done.mkdir()
        kernel = next((packages.system / "boot").glob("vmlinuz-*"))
        shutil.copyfile(kernel, done / "vmlinuz")
        with (done / "initramfs").open("wb") as file:
            _fill(Initramfs(file), packages, kernel.name.removeprefix("vmlinuz-"))
        (done / _DONE).write_text("".join(f"{each}\n" for each in names))
        with suppress(FileNotFoundError):
            folder.rename(work / "before")
        done.rename(folder)


@contextmanager
def _workplace(cache: Path) -> Iterator[Path]:
    make_folders(cache)
    for left in cache.glob(f"{_MAKING}*"):  # by one that was killed: there is no other now
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=_MAKING, dir=cache))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fill(archive: Initramfs, packages: Packages, version: str) -> None:
    for each in ("proc", "sys", "dev", "run", "tmp", "m", "etc", "root"):
        archive.folder(each)
    archive.file("init", _agent(), 0o755)
    archive.copy("bin/busybox", packages.program("busybox"))
    for name in _APPLETS:
        archive.link(f"bin/{name}", "busybox")
    for name in _PROGRAMS:
        program = packages.program(name)
        archive.copy(f"bin/{name}", program)
        for library in packages.libraries_of(program):
            loader = library.name.startswith("ld-linux-")
            archive.copy(f"{'lib64' if loader else 'lib'}/{library.name}", library)
    place = f"lib/modules/{version}"
    chosen = modules.chosen(packages.system, _MODULES)
    for module in chosen:
        archive.file(f"{place}/{module.name}.ko", module.data)
    for name, table in modules.tables(chosen).items():
        archive.file(f"{place}/{name}", table)
    archive.end()

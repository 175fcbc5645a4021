# SPDX-License-Identifier: Apache-2.0
"""Files of the host that a VM was started with and no point holds: firmware, kernels, media.

They are recorded by length and digest, so that a boot elsewhere can tell whether they are the same.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from qmpbackup.images.digest import digest
from qmpbackup.model import Disk, NeededFile, VmConfig
from qmpbackup.plan.boot_disks import Attached
from qmpbackup.plan.booting import Setting, launch

_LARGEST = 64 * 1024 * 1024
"""Firmware and kernels are smaller; what is larger is a medium, and known by its length."""


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

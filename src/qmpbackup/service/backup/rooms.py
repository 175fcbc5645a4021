# SPDX-License-Identifier: Apache-2.0
"""The room that a backup takes on file systems: what it needs to begin, and a watch while it goes on.

A VM that runs is marked with the file systems concerned. If it stops for want of room there, it is let
run again once everything has been given back: by the run, or, if that died, by the next recovery.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from qmpbackup.errors import Interrupted, JobError, QmpBackupError, StorageError, VmError
from qmpbackup.machine import host_files, scratch, starved
from qmpbackup.machine.host_files import HostFile
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.starved import Starved
from qmpbackup.model import Disk, Vm
from qmpbackup.plan import room as budget
from qmpbackup.plan.levels import DiskPlan
from qmpbackup.plan.room import Need, Space
from qmpbackup.service import room

log = logging.getLogger(__name__)

HINT = (
    "Make room there, put the scratch (--scratch DIR) or the target elsewhere, or keep less free "
    "with --reserve SIZE"
)


Files = Mapping[str, Sequence[HostFile]]
"""The files below each disk, by its format node."""


class Taker(Protocol):
    """What of a destination says how much room it takes."""

    @property
    def folder(self) -> Path | None:
        """Where it lies, if that is a file system of this machine."""

    @property
    def stores_plain(self) -> bool:
        """Whether it takes as much room as what is copied."""

    def stages(self, vm: Vm) -> bool:
        """Whether what is copied goes into a local image beside the scratch first."""


def files_of(monitor: Monitor, disks: Sequence[Disk]) -> Files:
    """The files below disks.

    Raises:
        VmError: QEMU cannot be asked.
    """
    return host_files.below(monitor, [disk.format_node for disk in disks])


def needs(
    files: Files, vm: Vm, plans: Sequence[DiskPlan], destination: Taker, chosen: Path | None
) -> list[tuple[Path, Need]]:
    """What a run needs, each with a folder on the file system where it needs it; `chosen` is where the
    user wants scratches."""
    certain = {
        plan.disk.id: budget.certain_bytes(
            plan.bytes_to_copy, _held(plan.disk, files[plan.disk.format_node])
        )
        for plan in plans
    }
    folders = {plan.disk.id: scratch.folder_for(plan.disk, chosen, vm.pid) for plan in plans}
    found: list[tuple[Path, Need]] = []
    for folder in dict.fromkeys(folders.values()):
        most = [plan.bytes_to_copy for plan in plans if folders[plan.disk.id] == folder]
        found.append((folder, budget.scratch_need(most)))
    for plan in plans:
        disk, copied = plan.disk, certain[plan.disk.id]
        if destination.stages(vm):
            found.append((folders[disk.id], Need(f"a local copy of {disk.id}", copied)))
        if destination.folder is not None:
            stored = copied if destination.stores_plain else 0
            found.append((destination.folder, Need(f"the backup of {disk.id}", stored)))
    return found


def _held(disk: Disk, files: Sequence[HostFile]) -> int | None:
    """What the files below a disk hold; of a raw device everything counts."""
    if disk.format == "raw" and files and all(each.driver == "host_device" for each in files):
        return disk.size
    return room.held_bytes(files)


class Hungry(Protocol):
    """What of a VM says whether it stands still for want of room (see `VmSource`)."""

    def mark(self, devices: frozenset[int]) -> None:
        """Note in it that room is taken on these file systems."""

    def unmark(self, devices: frozenset[int]) -> None:
        """Remove that note."""

    def feed(self, devices: frozenset[int]) -> Starved | None:
        """Let it run again if it stands still for want of room that is free now."""


class Rooms:
    """The file systems that one run takes room on."""

    def __init__(
        self, hungry: Hungry, vm: Vm, needed: Sequence[tuple[Path, Need]], wanted: int | None
    ) -> None:
        self._hungry = hungry
        self._spaces: tuple[Space, ...] = tuple(space for space, _ in room.by_space(needed))
        self._wanted = wanted
        self._runs = vm.running
        self._fed: Starved | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Give up what goes on in the block before the reserve is touched.

        Raises:
            StorageError: it was given up, or a view broke because the room was used up even so.
        """
        with room.kept(self._spaces, self._wanted, HINT) as lookout:
            try:
                yield
            except JobError as error:
                if lookout.look_now():
                    raise lookout.error() from error
                raise

    @contextmanager
    def marked(self) -> Iterator[None]:
        """Mark the VM, if it runs; after the block, when all room is given back, let it run again if it
        has stopped for want of it.

        Raises:
            StorageError: it had stopped, and what the block was to do has failed.
        """
        if not self._runs or not self._spaces:
            yield
            return
        self._hungry.mark(self._devices)
        try:
            yield
        except (QmpBackupError, Interrupted) as error:
            self.feed()
            self._unmark()
            if self._fed and isinstance(error, QmpBackupError):
                raise _with(error, self._fed) from error
            raise
        self.feed()
        self._unmark()

    @property
    def complaints(self) -> list[str]:
        """What is to be said of a run that has made a point."""
        return [self._words(self._fed)] if self._fed else []

    @property
    def _devices(self) -> frozenset[int]:
        return frozenset(space.device for space in self._spaces)

    def feed(self) -> None:
        """Let the VM run again if it stands still for want of room that is free now."""
        if not self._runs:
            return
        found = None
        with suppress(VmError):
            found = self._hungry.feed(self._devices)
        if found:
            self._fed = found
            log.warning("%s", self._words(found))

    def _unmark(self) -> None:
        """Remove the mark, unless the VM still waits for room: then it tells the next recovery."""
        if self._fed is None or self._fed.runs:
            with suppress(VmError):
                self._hungry.unmark(self._devices)

    @staticmethod
    def _words(found: Starved) -> str:
        advice = "" if found.runs else f" {starved.advice(found)}"
        return f"During the backup {found}.{advice}"


def _with(error: QmpBackupError, found: Starved) -> StorageError:
    said = f"{error.message} During the backup {found}."
    hint = f"{HINT}, then run again." if found.runs else starved.advice(found)
    return StorageError(said, hint)

# SPDX-License-Identifier: Apache-2.0
"""What a run needs of a VM, wherever that is: a QEMU behind its monitor (`live`), or one in memory (tests).

    with source.views(plan, rollback) as views:
        views.fill(files, compress=…)               before the instant, one of the two: the VM copies into
        views.show(samples)                         files, or we read its disks ourselves
        instant, consistency = views.take()
        views.copy(watch)                           the copy into the files, or
        with views.reading(watch), views.open(seat) as disk: …              the reading
        views.take_down(); views.close()
        … what may yet fail …; rollback.forget()

`tests/contract/test_source.py` puts every source to the same tests.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from qmpbackup.machine.push import NewImage
from qmpbackup.machine.starved import Starved
from qmpbackup.machine.view import Instant
from qmpbackup.model import Consistency, Disk, Vm
from qmpbackup.nbd.reader import Chunk
from qmpbackup.plan.instant import Seat
from qmpbackup.plan.progress import WatchDisks
from qmpbackup.service.backup.request import Plan
from qmpbackup.service.backup.rooms import Files
from qmpbackup.undo import UndoStack


class ReadableDisk(Protocol):
    """One disk of a view, open for reading. `changed` has a byte for each chunk, 1 where the chunk has
    changed; of a disk that is read whole, all of them are ones."""

    @property
    def changed(self) -> bytes | bytearray:
        """What has changed."""

    @property
    def bytes_to_read(self) -> int:
        """How much of what is wanted is not known to be zeroes."""

    def chunks(self) -> Iterator[Chunk]:
        """Every wanted chunk once, the changed ones and the samples.

        Raises:
            JobError: the view broke.
            Interrupted: a signal is waiting.
        """


class Views(Protocol):
    """The disks of one run as they are at its instant."""

    def fill(self, files: Sequence[NewImage], *, compress: bool) -> None:
        """Prepare for the instant; the disks will be copied into these files.

        Raises:
            StorageError: a file or a scratch could not be made.
            VmError: QEMU refused.
        """

    def show(self, samples: Mapping[int, Sequence[int]]) -> None:
        """Prepare for the instant; the disks will be read, and besides what has changed these chunks, by
        the number of their disk.

        Raises:
            StorageError: a scratch could not be made.
            VmError: QEMU refused.
        """

    def take(self) -> tuple[Instant, Consistency]:
        """Take the instant: new bitmaps and the views of all disks.

        Raises:
            VmError, QuiesceError: it could not be taken.
        """

    def copy(self, watch: WatchDisks | None) -> None:
        """Copy all disks into the files.

        Raises:
            StorageError: a file could not be written.
            JobError: a view broke, or its disk could not be read.
        """

    def reading(self, watch: WatchDisks | None) -> AbstractContextManager[None]:
        """Have the disks readable for the block; what was read is known to be right at its end.

        Raises:
            JobError: a view broke.
        """

    def open(self, seat: Seat) -> AbstractContextManager[ReadableDisk]:
        """Open a disk for reading."""

    def take_down(self) -> list[str]:
        """Remove the views and all that they needed; a sentence for whatever could not be removed."""

    def close(self) -> None:
        """Let go of the files.

        Raises:
            VmError: they are not let go of, and may be incomplete.
        """

    @property
    def holds_files(self) -> bool:
        """Whether files that are to be filled are still open in the VM."""

    @property
    def complaints(self) -> Sequence[str]:
        """What about the instant was not as it should be."""


class VmSource(Protocol):
    """A VM, as far as a run is concerned."""

    @property
    def vm(self) -> Vm:
        """The VM as it was found."""

    def again(self) -> "VmSource":
        """The same, looked at once more."""

    def status(self) -> str:
        """What the VM does now (QEMU's `RunState`).

        Raises:
            VmError: it cannot be asked.
        """

    def files(self, disks: Sequence[Disk]) -> Files:
        """The files of this host below disks, by format node."""

    def views(self, plan: Plan, rollback: UndoStack) -> AbstractContextManager[Views]:
        """The views of a run, none of them taken. `rollback` takes what must go only if the run fails:
        where the block does, the views are taken down, and then that is undone."""

    def retire(self, disk: Disk, bitmap: str) -> None:
        """Remove a bitmap.

        Raises:
            VmError: it is still there.
        """

    def mark(self, devices: frozenset[int]) -> None:
        """Have whoever clears up after the run know that it takes room on these file systems."""

    def unmark(self, devices: frozenset[int]) -> None:
        """The mark is not needed any more."""

    def feed(self, devices: frozenset[int]) -> Starved | None:
        """Let the VM run again if it stands still for want of room that is free now."""

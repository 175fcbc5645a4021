# SPDX-License-Identifier: Apache-2.0
"""What is asked of QEMU at the instant, as data: which disks take part, and what happens to bitmaps.

A disk whose changes we read ourselves (`Seat.chunk`) has its marks widened to whole chunks in a
*ledger*, a node with bitmaps and no data (see `machine.view`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qmpbackup.model import Disk
from qmpbackup.plan import commands
from qmpbackup.plan.commands import Command
from qmpbackup.plan.names import END, LEDGER, SAMPLES, RunNames


@dataclass(frozen=True, slots=True)
class Seat:
    """One disk of a view, with the bitmaps that its copy needs.

    `new_bitmap` is the change bitmap to start (empty: none), `base_bitmap` the one whose marks say
    what to copy (empty: everything), `new_end_mark` the end mark to make (empty: none). `chunk` is
    the bytes of a chunk where we read the disk ourselves (0: QEMU copies it).
    """

    disk: Disk
    number: int
    new_bitmap: str = ""
    base_bitmap: str = ""
    new_end_mark: str = ""
    chunk: int = 0

    @property
    def shows_marks(self) -> bool:
        """Whether the ledger is to show what to read."""
        return bool(self.chunk and self.base_bitmap)


def transaction(seats: Iterable[Seat], names: RunNames) -> tuple[Command, ...]:
    """The bitmap actions of the instant. First come all new bitmaps, then the copies of the old ones:
    an iothread may write between two actions, and must then be in both."""
    taking_part = list(seats)
    starts = [
        commands.bitmap_add(
            seat.disk.format_node, seat.new_bitmap, persistent=seat.disk.can_persist
        )
        for seat in taking_part
        if seat.new_bitmap
    ]
    copies: list[Command] = []
    for seat in taking_part:
        copies += _end_mark(seat, names)
        copies += _widened_marks(seat, names) if seat.shows_marks else _marks(seat, names)
    return (*starts, *copies)


def _end_mark(seat: Seat, names: RunNames) -> Sequence[Command]:
    """Give the disk its end mark from the ledger."""
    if not seat.new_end_mark:
        return []
    node, mark, ledger = seat.disk.format_node, seat.new_end_mark, names.of(LEDGER, seat.number)
    return [
        commands.bitmap_add(node, mark, persistent=seat.disk.can_persist, disabled=True),
        commands.bitmap_merge(node, mark, ledger, names.of(END, seat.number)),
    ]


def _marks(seat: Seat, names: RunNames) -> Sequence[Command]:
    """A copy of the marks as they are at the instant."""
    if not seat.base_bitmap:
        return []
    node, name = seat.disk.format_node, names.of("inc", seat.number)
    return [
        commands.bitmap_add(node, name, disabled=True),
        commands.bitmap_merge(node, name, node, seat.base_bitmap),
    ]


def _widened_marks(seat: Seat, names: RunNames) -> Sequence[Command]:
    """What changed, in the ledger; with the samples what to read, there and for the filter.

    Each is made from the one before, so that nothing is called changed that is not protected.
    """
    node, ledger = seat.disk.format_node, names.of(LEDGER, seat.number)
    changed, read, inc = (names.of(what, seat.number) for what in ("changed", "read", "inc"))
    return [
        _chunk_bitmap(seat, ledger, changed),
        commands.bitmap_merge(ledger, changed, node, seat.base_bitmap),
        _chunk_bitmap(seat, ledger, read),
        commands.bitmap_merge(ledger, read, ledger, changed),
        commands.bitmap_merge(ledger, read, ledger, names.of(SAMPLES, seat.number)),
        _chunk_bitmap(seat, node, inc),
        commands.bitmap_merge(node, inc, ledger, read),
    ]


def _chunk_bitmap(seat: Seat, node: str, name: str) -> Command:
    return commands.bitmap_add(node, name, disabled=True, granularity=seat.chunk)

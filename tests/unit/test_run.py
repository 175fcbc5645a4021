# SPDX-License-Identifier: Apache-2.0
"""A whole run without QEMU and without a file: a VM in memory, and a target in memory.

`contract/test_source.py` has whole runs of this VM in every kind of target.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from lab.disks import MIB
from qmpbackup.errors import (
    IncrementalNotPossible,
    Interrupted,
    JobError,
    StorageError,
    UnrecordedChanges,
    VmError,
)
from qmpbackup.model import Level, Point
from qmpbackup.service.backup import Outcome, Request, back_up_from
from qmpbackup.service.backup.destination import named
from qmpbackup.targets.receiver import Arrival, ChunkReceiver
from stock.in_memory import Memory, MemoryReceiver, MemoryTarget
from stock.vm_in_memory import STEPS, VmInMemory

SIZE = 9 * MIB + 512


def numbered() -> bytes:
    """A disk none of whose chunks is like another."""
    chunks = (bytes([number]).ljust(MIB, b"\0") for number in range(1, 11))
    return b"".join(chunks)[:SIZE]


@dataclass
class Stage:
    """A VM with two disks, and a target."""

    vm: VmInMemory = field(
        default_factory=lambda: VmInMemory({"vda": numbered(), "vdb": bytes(SIZE)})
    )
    target: MemoryTarget = field(default_factory=MemoryTarget)

    def back_up(self, level: Level = Level.AUTO, audit: float = 0.0) -> Outcome:
        """Make a point."""
        request = Request("", Memory(self.target), level, audit=audit, reserve=0)
        with named(request, look_only=False) as target:
            return back_up_from(self.vm, target, request)

    @property
    def points(self) -> tuple[Point, ...]:
        """All points."""
        return self.target.load().points

    def restored(self, point: Point) -> dict[str, bytes]:
        """What a point holds."""
        return {disk.id: self.target.disks[point.id, disk.id].data for disk in point.disks}


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_points_hold_what_the_disks_held_at_their_instants(stage: Stage) -> None:
    first = stage.vm.contents
    stage.vm.meanwhile = lambda: stage.vm.disks["vda"].write(MIB - 9, b"while it is copied")
    full = stage.back_up().point
    second = stage.vm.contents
    stage.vm.disks["vdb"].write(5 * MIB, b"between two runs")
    third = stage.vm.contents
    incremental = stage.back_up(Level.INC).point
    assert second != first
    assert [point.level for point in stage.points] == [Level.FULL, Level.INC]
    assert stage.restored(full) == first
    assert stage.restored(incremental) == third


def test_bitmaps_are_those_of_the_last_full_and_the_last_point_alone(stage: Stage) -> None:
    full, _, last = stage.back_up().point, stage.back_up(), stage.back_up().point
    for first, disk in zip(full.disks, last.disks, strict=True):
        assert first.end_mark == disk.end_mark, "an end mark that fits was made anew"
        assert stage.vm.bitmaps[disk.id] == {first.bitmap, disk.bitmap, disk.end_mark}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "error", [JobError("the view broke", "Run again."), Interrupted(15)], ids=["failure", "signal"]
)
def test_a_run_that_fails_anywhere_costs_nothing_but_itself(
    stage: Stage, step: str, error: BaseException
) -> None:
    stage.back_up()
    before, files = stage.vm.bitmaps, stage.points
    stage.vm.disks["vda"].write(7, b"what the lost run would have saved")
    stage.vm.breaks[step] = error
    with pytest.raises(type(error)):
        stage.back_up()
    assert stage.vm.breaks == {}, "the step was not taken"
    assert stage.vm.bitmaps == before
    assert stage.points == files
    point = stage.back_up(Level.INC).point
    assert stage.restored(point) == stage.vm.contents


class _Full(MemoryTarget):
    """A target that runs full with the last byte of a point."""

    def receive(
        self, point_id: str, disks: Sequence[Arrival], *, check: bool = False
    ) -> ChunkReceiver:
        del point_id, disks, check
        return _Refusing(self)


class _Refusing(MemoryReceiver):
    def commit(self, point: Point) -> None:
        del point
        raise StorageError("There is no room.")


def test_a_target_that_refuses_the_point_costs_no_bitmap(stage: Stage) -> None:
    stage.back_up()
    before, target = stage.vm.bitmaps, stage.target
    stage.vm.disks["vdb"].write(0, b"new")
    full = _Full()
    full.points, full.disks = target.points, target.disks
    with pytest.raises(StorageError):
        Stage(stage.vm, full).back_up()
    assert stage.vm.bitmaps == before
    assert stage.restored(stage.back_up(Level.INC).point) == stage.vm.contents


def test_a_bitmap_that_is_not_what_it_was_costs_a_full_of_its_disk(stage: Stage) -> None:
    first = stage.back_up().point
    (vda, _) = first.disks
    stage.vm.disks["vda"].bitmaps[vda.bitmap].recording = False
    stage.vm.disks["vda"].write(0, b"not recorded")
    with pytest.raises(IncrementalNotPossible, match="was disabled"):
        stage.back_up(Level.INC)
    point = stage.back_up().point
    assert {disk.id: disk.level for disk in point.disks} == {"vda": Level.FULL, "vdb": Level.INC}
    assert stage.restored(point) == stage.vm.contents
    assert vda.bitmap not in stage.vm.bitmaps["vda"]


def test_a_disk_that_grew_is_saved_to_its_new_end(stage: Stage) -> None:
    stage.back_up()
    stage.vm.disks["vda"].data += b"\7" * (2 * MIB)
    point = stage.back_up(Level.INC).point
    assert stage.restored(point) == stage.vm.contents


def test_what_no_bitmap_has_recorded_raises_an_alarm_and_is_read_whole(stage: Stage) -> None:
    stage.back_up()
    stage.vm.disks["vdb"].data[3 * MIB] = 1
    outcome = stage.back_up(audit=1.0)
    assert "vdb" in outcome.alarm
    assert {disk.id: disk.level for disk in outcome.point.disks} == {
        "vda": Level.INC,
        "vdb": Level.FULL,
    }
    assert stage.restored(outcome.point) == stage.vm.contents


def test_after_an_alarm_nothing_builds_on_the_bitmap(stage: Stage) -> None:
    first = stage.back_up().point
    stage.vm.disks["vdb"].data[3 * MIB] = 1
    with pytest.raises(UnrecordedChanges):
        stage.back_up(Level.INC, audit=1.0)
    assert first.disks[1].bitmap not in stage.vm.bitmaps["vdb"]
    assert stage.points == (first,)


def test_a_vm_that_moves_away_meanwhile_gets_no_point(stage: Stage) -> None:
    stage.vm.meanwhile = lambda: setattr(stage.vm, "state", "postmigrate")
    with pytest.raises(VmError, match="migrated"):
        stage.back_up()
    assert stage.points == ()
    assert stage.vm.bitmaps == {"vda": set(), "vdb": set()}

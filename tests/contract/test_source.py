# SPDX-License-Identifier: Apache-2.0
"""What a run relies on in every VM: a QEMU behind its monitor, and the one in memory that stands for it."""

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import pytest

from lab.backups import bitmaps, leftovers
from lab.disks import Disk, contents, create, first_difference, pattern
from lab.qemu import Qemu, StartQemu
from qmpbackup.errors import JobError
from qmpbackup.machine.push import NewImage
from qmpbackup.model import Level, Point
from qmpbackup.plan.instant import Seat
from qmpbackup.plan.levels import DiskPlan, NewPoint
from qmpbackup.plan.names import RunNames
from qmpbackup.service import session
from qmpbackup.service.backup import Plan, Request, back_up_from
from qmpbackup.service.backup.destination import named
from qmpbackup.service.backup.live import LiveVm
from qmpbackup.service.backup.source import Views, VmSource
from qmpbackup.undo import UndoStack
from stock.any_target import KINDS, Place
from stock.vm_in_memory import STEPS, VmInMemory

MIB = 1024 * 1024
SIZE = 6 * MIB + 512
CONTENTS = pattern(SIZE, 3)
LARGER = pattern(8 * MIB + 512, 4)
"""Of a disk that is large enough for incrementals."""


class Tried(Protocol):
    """A VM with one disk, and somebody who writes to it."""

    def source(self) -> AbstractContextManager[VmSource]:
        """The VM as a source, looked at now."""

    def write(self, offset: int, length: int, byte: int) -> None:
        """What the guest does."""

    def contents(self) -> bytes:
        """What the disk holds."""

    def bitmaps(self) -> set[str]:
        """The names of its bitmaps."""

    def leftovers(self) -> Sequence[str]:
        """What a run has left."""


class InMemory:
    """The VM in memory."""

    def __init__(self) -> None:
        self.vm = VmInMemory({"vda": CONTENTS})

    def source(self) -> AbstractContextManager[VmSource]:
        return nullcontext(self.vm)

    def write(self, offset: int, length: int, byte: int) -> None:
        self.vm.disks["vda"].write(offset, bytes([byte]) * length)

    def contents(self) -> bytes:
        return self.vm.contents["vda"]

    def bitmaps(self) -> set[str]:
        return self.vm.bitmaps["vda"]

    def leftovers(self) -> Sequence[str]:
        return []


class Real:
    """A VM of QEMU's."""

    def __init__(self, vm: Qemu) -> None:
        self.vm = vm

    @contextmanager
    def source(self) -> Iterator[VmSource]:
        request = Request(str(self.vm.socket), Path("nowhere"), Level.AUTO)
        with session.opened(request.address) as opened:
            yield LiveVm(opened, request)

    def write(self, offset: int, length: int, byte: int) -> None:
        self.vm.write("vda", offset, length, byte)

    def contents(self) -> bytes:
        return self.vm.contents("vda")

    def bitmaps(self) -> set[str]:
        return {name for _, name in bitmaps(self.vm)}

    def leftovers(self) -> Sequence[str]:
        return leftovers(self.vm)


@pytest.fixture(params=["memory", "qemu"])
def tried(request: pytest.FixtureRequest, tmp_path: Path, start_qemu: StartQemu) -> Iterator[Tried]:
    if request.param == "memory":
        yield InMemory()
        return
    image = create(tmp_path / "vda.qcow2", SIZE, contents=CONTENTS)
    vm = Real(start_qemu([Disk("vda", image)]))
    yield vm
    assert vm.leftovers() == []


def plan(source: VmSource, point: str, base: str = "", chunk: int = 0) -> Plan:
    """A plan for the disk, on the bitmap of another point."""
    vm, name = source.vm, "qmpbackup:contract:"
    (disk,) = vm.disks
    seat = Seat(
        disk,
        number=0,
        new_bitmap=f"{name}{point}",
        base_bitmap=base and f"{name}{base}",
        new_end_mark="" if base else f"{name}{point}-end",
        chunk=chunk,
    )
    each = DiskPlan(seat, Level.INC if base else Level.FULL, "")
    names = RunNames(secrets.token_hex(3))
    return Plan(vm, "nowhere", NewPoint("contract", point, chunk), names, (each,), ())


def finish(views: Views, rollback: UndoStack) -> None:
    """The end of a run that has made its point."""
    assert views.take_down() == []
    views.close()
    assert not views.holds_files
    rollback.forget()


def read(
    source: VmSource,
    plan: Plan,
    meanwhile: Callable[[], None] = lambda: None,
    samples: Sequence[int] = (),
) -> tuple[Sequence[int], Mapping[int, bytes]]:
    """A run that reads the disk: what has changed, and the chunks that were delivered."""
    rollback = UndoStack()
    (seat,) = plan.seats
    found: dict[int, bytes] = {}
    with source.views(plan, rollback) as views:
        views.show({0: samples})
        views.take()
        meanwhile()
        with views.reading(None), views.open(seat) as disk:
            changed = [index for index, value in enumerate(disk.changed) if value]
            for chunk in disk.chunks():
                data = bytes(chunk.length) if chunk.data is None else bytes(chunk.data)
                for at in range(chunk.count):
                    found[chunk.index + at] = data[at * MIB :][:MIB]
                chunk.release()
        finish(views, rollback)
    return changed, found


def copied(
    source: VmSource, plan: Plan, path: Path, backing: str, meanwhile: Callable[[], None]
) -> None:
    """A run that has the disk copied into a file."""
    rollback = UndoStack()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with source.views(plan, rollback) as views:
            views.fill([NewImage(plan.seats[0], fd, path, backing)], compress=False)
            views.take()
            meanwhile()
            views.copy(None)
            finish(views, rollback)
    finally:
        os.close(fd)


def test_what_is_read_is_the_instant_and_then_what_has_changed_since(tried: Tried) -> None:
    first = tried.contents()
    with tried.source() as source:
        changed, found = read(source, plan(source, "p1", chunk=MIB), lambda: tried.write(0, 9, 1))
    assert changed == list(range(7))
    assert not first_difference(b"".join(found[index] for index in changed), first)
    tried.write(4 * MIB - 512, 1024, 2)
    second = tried.contents()
    with tried.source() as source:
        later = plan(source, "p2", "p1", chunk=MIB)
        changed, found = read(source, later, lambda: tried.write(5 * MIB, MIB, 3), samples=[6])
    assert changed == [0, 3, 4]
    assert sorted(found) == [0, 3, 4, 6]
    for index, data in found.items():
        assert not first_difference(data, second[index * MIB :][:MIB]), index


def test_what_is_copied_is_the_instant_and_then_what_has_changed_since(
    tried: Tried, tmp_path: Path
) -> None:
    full, later = tmp_path / "full", tmp_path / "later"
    first = tried.contents()
    with tried.source() as source:
        copied(source, plan(source, "p1"), full, "", lambda: tried.write(0, MIB, 1))
    tried.write(SIZE - 512, 512, 2)
    second = tried.contents()
    with tried.source() as source:
        again = plan(source, "p2", "p1")
        copied(source, again, later, "full", lambda: tried.write(MIB, MIB, 3))
    assert not first_difference(contents(full, "qcow2"), first)
    assert not first_difference(contents(later, "qcow2"), second)
    assert later.stat().st_blocks * 512 < 2 * MIB, "more than what has changed"


def test_bitmaps_are_those_of_the_plan_and_go_when_they_are_retired(tried: Tried) -> None:
    with tried.source() as source:
        planned = plan(source, "p1", chunk=MIB)
        read(source, planned)
        (seat,) = planned.seats
        (disk,) = source.again().vm.disks
        assert {each.name: (each.recording, each.count > 0) for each in disk.bitmaps} == {
            seat.new_bitmap: (True, False),
            seat.new_end_mark: (False, True),
        }
        source.retire(disk, seat.new_bitmap)
        assert tried.bitmaps() == {seat.new_end_mark}


@pytest.mark.parametrize("chunk", [0, MIB], ids=["copied", "read"])
def test_a_run_that_fails_leaves_the_bitmaps_as_they_were(
    tried: Tried, chunk: int, tmp_path: Path
) -> None:
    with tried.source() as source:
        read(source, plan(source, "p1", chunk=MIB))
    before = tried.bitmaps()
    tried.write(0, 512, 1)
    undone: list[str] = []
    with tried.source() as source, (tmp_path / "file").open("w+b") as file:
        planned = plan(source, "p2", "p1", chunk)
        image = NewImage(planned.seats[0], file.fileno(), tmp_path / "file")
        rollback = UndoStack()
        rollback.push("note it", lambda: undone.append("undone"))
        with pytest.raises(JobError), source.views(planned, rollback) as views:
            if chunk:
                views.show({})
            else:
                views.fill([image], compress=False)
            views.take()
            assert tried.bitmaps() > before
            raise JobError("Something has failed.")
        assert undone == ["undone"]
        assert not views.holds_files
        assert tried.bitmaps() == before
        changed, _ = read(source, plan(source, "p3", "p1", chunk=MIB))
        assert changed == [0]


@pytest.mark.parametrize("kind", KINDS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("step", STEPS)
def test_whole_runs_in_every_kind_of_target_though_one_fails(
    kind: Callable[[Path, pytest.MonkeyPatch], Place],
    step: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place, vm = kind(tmp_path, monkeypatch), VmInMemory({"vda": LARGER})
    request = Request("", place.address, Level.AUTO, reserve=0)

    def back_up() -> Point:
        with named(request, look_only=False) as target:
            return back_up_from(vm, target, request).point

    expected = {back_up().id: vm.contents["vda"]}
    vm.disks["vda"].write(4 * MIB - 9, b"across two chunks")
    vm.breaks[step] = JobError("The view broke.")
    vm.meanwhile = lambda: vm.disks["vda"].write(0, b"while it is copied")
    with pytest.raises(JobError):
        back_up()
    vm.meanwhile = lambda: None
    point = back_up()
    expected[point.id] = vm.contents["vda"]
    assert point.level is Level.INC
    with place.read() as target:
        points = target.load().points
        assert [each.id for each in points] == list(expected)
        assert target.left() == []
        for each in points:
            with target.images(points, each, each.disks) as opened:
                found = bytes(opened.images["vda"].read(0, len(LARGER)))
            assert not first_difference(found, expected[each.id])


def test_qemu_is_sent_the_very_commands_of_the_plan(tmp_path: Path, start_qemu: StartQemu) -> None:
    vm = Real(start_qemu([Disk("vda", create(tmp_path / "vda.qcow2", SIZE))]))
    with vm.source() as source:
        read(source, plan(source, "p1", chunk=MIB))
        planned = plan(source, "p2", "p1", MIB)
        rollback = UndoStack()
        with source.views(planned, rollback) as views:
            views.show({})
            views.take()
            made = {
                (str(command.arguments["node"]), str(command.arguments["name"]))
                for command in planned.transaction
                if command.name == "block-dirty-bitmap-add"
            }
            assert len(made) == 4
            assert made <= bitmaps(vm.vm)
            finish(views, rollback)

# SPDX-License-Identifier: Apache-2.0
"""Every kind of target keeps the same promises: a folder, a repository, and one in memory.

What they are asked to do is put to all of them beside this: `test_restore.py`, `test_verify.py`,
`test_prune.py`. What each kind does besides: `test_directory.py`, `test_restic_format.py`.
"""

from datetime import timedelta
from pathlib import Path

import pytest

from lab.backups import leftovers
from lab.disks import Disk, create, first_difference, pattern
from lab.qemu import StartQemu
from qmpbackup.errors import NoSuchTarget, UsageError
from qmpbackup.model import Level, Location, Point
from qmpbackup.plan.finding import Health
from qmpbackup.service import show
from qmpbackup.service.backup import Request, back_up
from qmpbackup.service.restore import Request as RestoreRequest
from qmpbackup.service.restore import restore
from qmpbackup.targets import opening
from qmpbackup.targets.interface import Wish
from stock.any_target import FIRST, OTHER, SECOND, SIZES, START, THIRD, VM, WILD, Place
from stock.stored import MIB


class TestPoints:
    """What was committed is there, as it was; nothing else is."""

    def test_every_point_gives_back_every_byte(self, place: Place, points: list[Point]) -> None:
        with place.read() as target:
            assert target.load().points == tuple(points)
            for point in points:
                for name, data in place.contents(target, point).items():
                    assert data == place.expected[point.id, name], (point.id, name)

    def test_what_is_not_committed_does_not_exist(self, place: Place, points: list[Point]) -> None:
        with place.held() as (target, found):
            _, receiver = place.begun(target, found.stored.points, THIRD, points[-1])
            assert target.load().points == tuple(points)
            receiver.abort()
        with place.read() as target:
            assert target.load().points == tuple(points)
            assert target.left() == []

    def test_the_next_point_builds_on_the_last_one_though_another_was_given_up(
        self, place: Place, points: list[Point]
    ) -> None:
        with place.held() as (target, found):
            _, receiver = place.begun(target, found.stored.points, THIRD, points[-1])
            receiver.abort()
        last = place.add(SECOND, points[-1])
        with place.read() as target:
            assert place.contents(target, last)["hd0"] == place.expected[last.id, "hd0"]

    def test_a_point_of_some_disks_leaves_the_others(self, place: Place) -> None:
        first = place.add(FIRST)
        second = place.add({"hd0": SECOND["hd0"]}, first)
        with place.read() as target:
            assert set(place.contents(target, second)) == {"hd0"}
            assert place.contents(target, first)[WILD] == place.expected[first.id, WILD]

    def test_the_newest_is_found_without_a_vm(self, place: Place) -> None:
        entrance = opening.entrance(place.address)
        assert entrance.newest("") is None
        place.add(FIRST)
        second = place.add(SECOND)
        assert entrance.newest("") == second


class TestOpening:
    """Nothing is made before it is needed, and nobody gets what belongs to another."""

    def test_an_overview_tells_the_newest_point_and_how_many_there_are(
        self, place: Place, points: list[Point]
    ) -> None:
        for _ in range(2):  # from a cache, too, where there is one
            seen = opening.entrance(place.address).overview(points[-1].time)
            (found,) = seen.vms
            assert (found.identity, found.points, found.newest) == (VM, 3, points[-1])
            assert (found.damaged, found.ahead, seen.damaged) == (0, 0, ())

    def test_a_point_from_the_future_protects_nobody(
        self, place: Place, points: list[Point]
    ) -> None:
        now = points[1].time + timedelta(minutes=1)
        (found,) = opening.entrance(place.address).overview(now).vms
        assert (found.points, found.newest, found.ahead) == (3, points[1], 1)
        (found,) = opening.entrance(place.address).overview(now - timedelta(days=1)).vms
        assert (found.points, found.newest, found.ahead) == (3, None, 3)

    def test_an_overview_of_what_is_not_there_says_so(self, place: Place) -> None:
        if isinstance(place.address, Location):
            assert opening.entrance(place.address).overview(START).vms == ()
        else:
            with pytest.raises(NoSuchTarget):
                opening.entrance(place.address).overview(START)

    def test_looking_makes_nothing(self, place: Place) -> None:
        for look_only in (False, True):
            wish = Wish(look_only=look_only)
            with opening.entrance(place.address).opening(wish) as door, door.found(VM) as found:
                assert found.stored.points == ()
                assert found.ground.load().points == ()
            with pytest.raises(NoSuchTarget), place.read():
                pass

    def test_its_id_is_that_which_was_planned_with(self, place: Place) -> None:
        with place.held() as (target, found):
            assert target.id == found.ground.id != ""
        with opening.entrance(place.address).opening(Wish()) as door, door.found(VM) as found:
            assert found.ground.id == target.id

    @pytest.mark.usefixtures("points")
    def test_another_vm_neither_sees_nor_adds_to_the_points(self, place: Place) -> None:
        with opening.entrance(place.address).opening(Wish(strict=True)) as door:
            try:
                with door.found(OTHER) as found:
                    assert found.stored.points == ()
            except UsageError as error:
                assert "another VM" in error.message

    @pytest.mark.usefixtures("points")
    def test_who_reads_and_who_writes_go_together(self, place: Place) -> None:
        with place.read() as target, place.held() as (other, _):
            assert target.load() == other.load()

    def test_advice_has_nothing_to_say_against_one_that_is_well(
        self, place: Place, points: list[Point]
    ) -> None:
        advice = opening.entrance(place.address).advice(VM, 0.0, strict=True)
        findings = []
        while True:
            try:
                findings.append(next(advice))
            except StopIteration as over:
                found = over.value
                break
        assert not [each for each in findings if each.health is Health.PROBLEM]
        assert found.stored.points == tuple(points)
        assert found.ground.id

    @pytest.mark.usefixtures("points")
    def test_nothing_is_left_to_clear_up(self, place: Place) -> None:
        with opening.entrance(place.address).of(VM) as target:
            with target.lock():
                assert target.left() == []
                assert list(target.unfinished()) == []
            with target.writing() as cleared:
                assert cleared == []
            assert target.elsewhere() == ""


@pytest.mark.usefixtures("points")
def test_what_is_whole_can_be_built_upon(place: Place) -> None:
    with place.held() as (target, found):
        held = found.stored.points
        for point in held:
            for name in SIZES:
                assert target.obstacle(held, point, name, thorough=True) == ""


class TestUseCases:
    """Commands that read a target do so whichever kind it is."""

    def test_it_is_listed_and_shown(self, place: Place, points: list[Point]) -> None:
        assert show.inventory(place.address).points == tuple(points)
        point, missing = show.point(place.address, "latest")
        assert (point, missing) == (points[-1], ())

    @pytest.mark.usefixtures("points")
    def test_an_unknown_point_is_that(self, place: Place) -> None:
        with pytest.raises(NoSuchTarget):
            show.point(place.address, "20200101")


def test_a_whole_backup_of_a_running_vm(
    place: Place, tmp_path: Path, start_qemu: StartQemu
) -> None:
    sizes = {"vda": 9 * MIB + 512, "vdb": 9 * MIB}
    images = {
        name: create(tmp_path / name, size, contents=pattern(size, 7))
        for name, size in sizes.items()
    }
    vm = start_qemu([Disk(name, image) for name, image in images.items()])
    expected: dict[str, dict[str, bytes]] = {}
    for number, level in enumerate((Level.FULL, Level.INC, Level.INC)):
        vm.write("vda", number * MIB, 70_000, number + 1)
        point = back_up(Request(str(vm.socket), place.address, Level.AUTO)).point
        assert point.level is level
        expected[point.id] = {name: vm.contents(name) for name in sizes}
    assert leftovers(vm) == []
    assert [point.id for point in show.inventory(place.address).points] == list(expected)
    for point_id, disks in expected.items():
        out = tmp_path / f"out-{point_id}"
        for disk in restore(
            RestoreRequest(place.address, point_id, folder=out, format="raw")
        ).disks:
            assert not first_difference(disk.path.read_bytes(), disks[disk.disk_id])

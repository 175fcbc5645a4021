# SPDX-License-Identifier: Apache-2.0
"""Pruning a folder merges files into those that build on them: what a policy keeps gives back every byte,
and nothing else is left.

What holds for every kind of target is in `contract/test_prune.py`.
"""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lab import cli
from qmpbackup.errors import DamagedError, StorageError, UsageError
from qmpbackup.images import qemu_img
from qmpbackup.images.layers import Layer, stand_in
from qmpbackup.model import Level
from qmpbackup.plan.retention import Policy
from qmpbackup.service.prune import Request, prune
from qmpbackup.service.restore import Request as RestoreRequest
from qmpbackup.service.restore import restore
from qmpbackup.service.verify import Request as VerifyRequest
from qmpbackup.service.verify import verify
from qmpbackup.targets.removal import Removed
from stock.stored import MIB, Stored, Write, contents, run, tree

DISK, OTHER = "hd0", "b"
NOW = datetime(2026, 12, 1, tzinfo=UTC)


def write(number: int) -> list[Write]:
    """Something that overlaps with what the points before and after wrote, and some zeros."""
    return [
        Write(number, 65536 * number, 2 * 65536),
        Write(number, 3 * MIB, 4096),
        Write(0, 65536 * (number + 8), 65536 + 512),
    ]


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """A full and five incrementals of one disk, an hour apart."""
    return chain_of(Stored(tmp_path / "target"), 6)


def chain_of(stored: Stored, count: int, *disks: str) -> Stored:
    for number in range(count):
        level = Level.INC if number else Level.FULL
        first = [Write(9, 0, 2 * MIB)] if level is Level.FULL else []
        stored.add(level, {disk: [*first, *write(number)] for disk in disks or (DISK,)})
    return stored


def request(
    stored: Stored, *, last: int = 0, daily: int = 0, merging: bool = True, dry_run: bool = False
) -> Request:
    return Request(stored.path, Policy(last, daily=daily), merging=merging, dry_run=dry_run)


def assert_left(stored: Stored, numbers: Sequence[int], outcome: Removed | None = None) -> None:
    """Just these points are left, whole, and give back every byte; nothing else lies there."""
    expected = [stored.points[number] for number in numbers]
    ids = [point.id for point in expected]
    assert [point.id for point in stored.target.load().points] == ids
    if outcome is not None:
        assert sorted(each.point.id for each in outcome.kept) == sorted(ids)
    for point in expected:
        out = stored.path.with_name("out")
        done = restore(RestoreRequest(stored.path, point.id, folder=out, format="raw"))
        assert {each.disk_id for each in done.disks} == {disk.id for disk in point.disks}
        for each in done.disks:
            assert each.path.read_bytes() == stored.expected[point.id, each.disk_id], point.id
        shutil.rmtree(out)
    report = verify(VerifyRequest(stored.path))
    assert report.whole, report
    assert not report.foreign, report
    assert {each.name for each in (stored.path / "points").iterdir()} == {f"{i}.json" for i in ids}


def reasons(outcome: Removed) -> dict[str, tuple[str, ...]]:
    return {each.point.id: each.reasons for each in outcome.verdicts}


# --- chains


@pytest.mark.parametrize("last", range(1, 7))
def test_the_beginning_of_a_chain_goes_into_its_oldest_point_that_stays(
    stored: Stored, last: int
) -> None:
    outcome = prune(request(stored, last=last), NOW)
    assert_left(stored, range(6 - last, 6), outcome)
    left = stored.target.load().points
    assert [point.level for point in left] == [Level.FULL, *[Level.INC] * (last - 1)]
    assert len(list((stored.path / DISK).iterdir())) == last


@pytest.mark.parametrize("gone", [[2], [2, 3], [0, 2, 4], [1, 2, 3, 4], [0, 1, 3]])
def test_points_in_the_middle_of_a_chain_go_into_the_next_one(
    stored: Stored, gone: list[int]
) -> None:
    outcome = prune_but(stored, gone)
    assert_left(stored, [number for number in range(6) if number not in gone], outcome)
    left = stored.target.load().points
    assert len({disk.file for point in left for disk in point.disks}) == 6 - len(gone)


def prune_but(stored: Stored, gone: Sequence[int]) -> Removed:
    """Prune with a policy that keeps all points but these, which share a day with the next one."""
    day = 0
    for number, point in enumerate(stored.points):
        day += number - 1 not in gone
        time = datetime(2026, 11, 1 + day, number, tzinfo=UTC)
        stored.points[number] = replace(point, time=time)
        stored.target.replace_manifest(stored.points[number])
    return prune(request(stored, daily=day), NOW)


def test_zeros_are_told_from_nothing(tmp_path: Path) -> None:
    """Both show zeros where nothing lies below; only one does where something does."""
    held = {}
    for name, command in {"zeros": "write -z 1M 128k", "nothing": "read 0 512"}.items():
        path = tmp_path / name
        run(
            "qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "x", "-F", "raw", str(path), "4M"
        )
        run("qemu-io", "-c", command, "json:" + over_nothing(path))
        with path.open("rb") as file, stand_in(2 * MIB) as ground:
            held[name] = qemu_img.held_ranges([Layer.of(file.fileno(), name)], ground, 2 * MIB)
    assert held == {"zeros": [(MIB, MIB + 128 * 1024)], "nothing": []}


def over_nothing(path: Path) -> str:
    """An image without its backing file."""
    node = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "backing": None}
    return json.dumps(node)


def test_freed_is_what_the_files_became_less(stored: Stored) -> None:
    def size() -> int:
        return sum(each.stat().st_size for each in (stored.path / DISK).iterdir())

    before = size()
    foretold = prune(request(stored, last=2, dry_run=True), NOW)
    outcome = prune(request(stored, last=2), NOW)
    assert outcome.freed == before - size()
    assert foretold.freed
    assert foretold.freed > MIB


def test_several_disks_go_together(tmp_path: Path) -> None:
    stored = chain_of(Stored(tmp_path / "target"), 6, DISK, OTHER)
    assert_left(stored, [1, 4, 5], prune_but(stored, [0, 2, 3]))
    assert not any(point.merged for point in stored.target.load().points)


def test_a_disk_with_a_chain_of_its_own(tmp_path: Path) -> None:
    """One disk got a full in between, so a point ends a chain there and continues one elsewhere."""
    stored = Stored(tmp_path / "target")
    stored.add(Level.FULL, {DISK: write(1), OTHER: write(1)})
    stored.add(Level.INC, {DISK: write(2), OTHER: write(2)})
    stored.add(Level.INC, {DISK: write(3)})
    stored.add(Level.FULL, {OTHER: write(4)})
    stored.add(Level.INC, {DISK: write(5), OTHER: write(5)})
    assert_left(stored, [4], prune(request(stored, last=1), NOW))


def test_a_chain_that_nothing_of_stays_goes_as_a_whole(stored: Stored) -> None:
    stored.add(Level.FULL, {DISK: write(7)})
    stored.add(Level.INC, {DISK: write(8)})
    outcome = prune(request(stored, last=2), NOW)
    assert outcome.merged == 0
    assert_left(stored, [6, 7], outcome)


def test_copies_are_independent(stored: Stored) -> None:
    stored.add(Level.COPY, {DISK: write(7)})
    stored.add(Level.INC, {DISK: write(8)})
    outcome = prune(request(stored, last=1), NOW)
    assert_left(stored, [7], outcome)


def test_grown_disks(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "target", size=2 * MIB)
    stored.add(Level.FULL, {DISK: [Write(1, 0, 2 * MIB)]})
    stored.add(Level.INC, {DISK: [Write(2, MIB, 65536)]})
    stored.size = 3 * MIB + 512
    stored.add(Level.INC, {DISK: [Write(3, 3 * MIB, 512), Write(0, MIB, 65536)]})
    stored.size = 5 * MIB
    stored.add(Level.INC, {DISK: [Write(4, 3 * MIB, 4096)]})
    outcome = prune_but(stored, [1, 2])
    assert_left(stored, [0, 3], outcome)


@pytest.mark.parametrize("chosen", range(3))
def test_any_history(tmp_path: Path, chosen: int) -> None:
    chance = random.Random(chosen)  # noqa: S311 - the same histories in each run
    stored = Stored(tmp_path / "target", size=2 * MIB)
    stored.add(Level.FULL, {DISK: write(1)[:1], OTHER: write(1)[:1]})
    for _ in range(7):
        level = chance.choice([*[Level.INC] * 5, Level.DIFF, Level.FULL, Level.COPY])
        writes = [
            Write(chance.randrange(256), 512 * chance.randrange(3900), 512 * chance.randrange(190))
            for _ in range(3)
        ]
        disks = chance.choice([[DISK], [DISK, OTHER], [DISK, OTHER]])
        stored.add(level, dict.fromkeys(disks, writes))
    outcome = prune_but(stored, chance.sample(range(7), 4))
    kept = {each.point.id for each in outcome.kept}
    assert_left(stored, [n for n, point in enumerate(stored.points) if point.id in kept], outcome)


# --- what stays although the policy does not keep it


def test_a_full_with_several_differentials_stays(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "target")
    stored.add(Level.FULL, {DISK: write(1)})
    for number in range(2, 6):
        stored.add(Level.DIFF, {DISK: write(number)})
    outcome = prune(request(stored, last=2), NOW)
    assert_left(stored, [0, 3, 4], outcome)
    ids = [point.id for point in stored.points]
    assert reasons(outcome)[ids[0]] == (f"{ids[3]} and {ids[4]} build on it",)
    assert_left(stored, [4], prune(request(stored, last=1), NOW))


def test_without_merging_all_stay_that_others_build_on(stored: Stored) -> None:
    stored.add(Level.FULL, {DISK: write(7)})
    stored.add(Level.INC, {DISK: write(8)})
    before = tree(stored.path)
    outcome = prune(request(stored, merging=False, last=3), NOW)
    assert tree(stored.path) == before
    ids = [point.id for point in stored.points]
    assert reasons(outcome)[ids[4]] == (f"{ids[5]} builds on it",)
    assert_left(stored, [6, 7], prune(request(stored, merging=False, last=2), NOW))


def test_the_newest_point_of_each_disk_stays(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "target")
    stored.add(Level.FULL, {DISK: write(1), OTHER: write(1)})
    stored.add(Level.INC, {DISK: write(2), OTHER: write(2)})
    stored.add(Level.INC, {DISK: write(3)})
    stored.add(Level.INC, {DISK: write(4)})
    outcome = prune(request(stored, last=1), NOW)
    assert_left(stored, [1, 3], outcome)
    assert reasons(outcome)[stored.points[1].id] == (f"newest point of {OTHER}",)


@pytest.mark.parametrize("number", [1, 3, 4])
def test_what_an_overlay_of_the_owner_needs_stays(stored: Stored, number: int) -> None:
    place = stored.path / DISK
    file = stored.file(stored.points[number], DISK)
    mine = place / "mine.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", file.name, "-F", "qcow2", str(mine))
    outcome = prune(request(stored, last=2), NOW)
    assert contents(mine, "qcow2") == stored.expected[stored.points[number].id, DISK]
    mine.unlink()
    assert any("mine.qcow2" in reason for each in reasons(outcome).values() for reason in each)
    expected = {1: [0, 1, 4, 5], 3: [2, 3, 4, 5], 4: [3, 4, 5]}
    assert_left(stored, expected[number], outcome)


def test_states_inside_of_one_file_stay_with_it(stored: Stored) -> None:
    cli.run("snapshotrebase", "--dir", stored.path / DISK, program="qmprestore").check()
    before = tree(stored.path)
    outcome = prune(request(stored, last=2), NOW)
    assert tree(stored.path) == before
    assert reasons(outcome)[stored.points[0].id][0].startswith("in one file with ")
    stored.add(Level.FULL, {DISK: write(7)})
    assert_left(stored, [6], prune(request(stored, last=1), NOW))


# --- damage


def spoil(stored: Stored, number: int, cut: bool) -> None:
    file = stored.file(stored.points[number], DISK)
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data[: -1 if cut else None])


@pytest.mark.parametrize("number", [0, 2])
def test_nothing_is_merged_with_damage(stored: Stored, number: int) -> None:
    spoil(stored, number, cut=False)
    before = tree(stored.path)
    with pytest.raises(DamagedError, match=stored.file(stored.points[number], DISK).name):
        prune(request(stored, last=2), NOW)
    after = {name: data for name, data in tree(stored.path).items() if ".damaged" not in name}
    assert after == before


def test_known_damage_never_takes_the_place_of_a_whole_point(stored: Stored) -> None:
    for number in range(7, 10):
        stored.add(Level.FULL, {DISK: write(number)})
    spoil(stored, 8, cut=True)
    outcome = prune(request(stored, last=1), NOW)
    ids = [point.id for point in stored.points]
    assert reasons(outcome)[ids[7]] == ("last",)
    assert "damaged, so not counted" in reasons(outcome)[ids[8]]
    assert {each.point.id for each in outcome.kept} == {ids[7], ids[8]}


def test_what_damaged_points_build_on_stays_until_they_go(stored: Stored) -> None:
    spoil(stored, 3, cut=True)
    stored.add(Level.FULL, {DISK: write(7)})
    before = tree(stored.path)
    outcome = prune(request(stored, last=3), NOW)
    left = [point.id for point in stored.target.load().points]
    assert left == [point.id for point in stored.points], outcome
    assert tree(stored.path) == before
    assert_left(stored, [6], prune(request(stored, last=1), NOW))


def test_without_room_for_a_merge_what_can_go_without_goes(little_room: Path) -> None:
    stored = Stored(little_room / "target", size=16 * MIB)
    stored.add(Level.COPY, {DISK: [Write(5, 0, MIB)]})
    stored.add(Level.FULL, {DISK: [Write(1, 0, 12 * MIB)]})
    stored.add(Level.INC, {DISK: [Write(2, 0, MIB)]})
    with pytest.raises(StorageError, match="are free"):
        prune(request(stored, last=1), NOW)
    assert list(stored.target.load().points) == stored.points[1:]
    assert verify(VerifyRequest(stored.path)).whole


def test_a_manifest_that_cannot_be_read_stops_everything(stored: Stored) -> None:
    stored.manifest(stored.points[2]).write_text("{}")
    before = tree(stored.path)
    for dry_run in (True, False):
        with pytest.raises(DamagedError, match=stored.points[2].id):
            prune(request(stored, dry_run=dry_run, last=1), NOW)
    assert tree(stored.path) == before


def test_points_that_lack_disks_take_no_place(tmp_path: Path) -> None:
    stored = chain_of(Stored(tmp_path / "target"), 4, DISK, OTHER)
    cli.run("rebase", "--dir", stored.path / DISK, program="qmprebase").check()
    outcome = prune(request(stored, last=2), NOW)
    ids = [point.id for point in stored.points]
    assert reasons(outcome)[ids[2]] == ("last", "lacks disks, so not counted")
    assert {point.id for point in outcome.removed} == set(ids[:2])
    assert_left(stored, [3], prune(request(stored, last=1), NOW))


# --- what is refused


def test_a_vm_cannot_be_chosen(stored: Stored) -> None:
    with pytest.raises(UsageError, match="--vm"):
        prune(Request(stored.path, Policy(last=1), vm="vm"), NOW)


# --- the command


def test_the_command_foretells_what_merges_free(stored: Stored) -> None:
    command = ("prune", "--target", stored.path, "--keep-last", 2)
    last = cli.run(*command, "--dry-run").check().out.splitlines()[-1]
    assert last.startswith("2 kept, 4 would be removed, about ")
    *_, summary = cli.run(*command, "--json").check().objects
    assert (summary["kept"], summary["removed"], summary["merged"]) == (2, 4, 1)
    assert_left(stored, [4, 5])


@pytest.mark.parametrize(
    "option",
    [
        [],
        ["--keep-last", "0"],
        ["--keep-last", "-2"],
        ["--keep-daily", "x"],
        ["--keep-within", "3"],
        ["--keep-within", ""],
        ["--keep-tag", "mine"],
        ["--vm", "vm", "--keep-last", "1"],
    ],
)
def test_wrong_arguments(stored: Stored, option: list[str]) -> None:
    before = tree(stored.path)
    cli.run("prune", "--target", stored.path, *option).check(2)
    assert tree(stored.path) == before

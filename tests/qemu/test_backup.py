# SPDX-License-Identifier: Apache-2.0
"""Backups of a running QEMU: levels, instants, and that every restore gives the right bytes."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import cli
from lab.aftermath import assert_clean, manifests
from lab.backups import (
    assert_restores,
    back_up,
    bitmaps,
    leftovers,
    levels,
    restored,
    try_backup,
)
from lab.disks import MIB, Disk, create, filled, first_difference, pattern
from lab.disks import contents as image_contents
from lab.load import Writer, instants
from lab.ports import free_port
from lab.qemu import StartQemu
from lab.repositories import Repository, Target
from stock.repositories import repository

SIZE = 16 * MIB


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a folder will be made that is a target."""
    return tmp_path / "target"


@pytest.fixture(params=["directory", "repository"])
def target(request: pytest.FixtureRequest, folder: Path) -> Iterator[Target]:
    """A target of each kind; a repository is without fault at the end of every test."""
    if request.param == "directory":
        yield folder
        return
    made = repository(folder)
    yield made
    made.assert_whole(read_data=True)


def test_every_point_shows_one_instant_of_all_disks_under_load(
    tmp_path: Path, start_qemu: StartQemu, target: Target
) -> None:
    disks = [filled(tmp_path, "vda"), filled(tmp_path, "vdb", 2, "raw"), filled(tmp_path, "vdc", 3)]
    vm = start_qemu(disks, name="loaded")
    before = vm.live()
    with Writer(vm, {each.id: SIZE for each in disks}) as load:
        load.wait_for(20)
        points = [back_up(vm, target)]
        for level in ("inc", "copy", "auto"):
            load.wait_for(20)
            points.append(back_up(vm, target, level))
        load.wait_for(20)
    assert [point["level"] for point in points] == ["full", "inc", "copy", "inc"]
    last = back_up(vm, target, "inc")
    assert_restores(target, last["id"], vm.live(), tmp_path)
    counts = [instants(before, load.log, restored(target, p["id"], tmp_path)) for p in points]
    assert all(counts), "a point shows no single instant"
    assert [max(each) for each in counts] == sorted(max(each) for each in counts)
    assert_clean(vm, target)


def test_levels_build_on_what_they_say(tmp_path: Path, start_qemu: StartQemu) -> None:
    vm = start_qemu([filled(tmp_path, "vda")])
    target = tmp_path / "target"
    wanted, parents, contents = ("full", "inc", "diff", "inc", "copy", "diff"), {}, {}
    ids: list[str] = []
    for number, level in enumerate(wanted):
        vm.write("vda", number * MIB, 3 * MIB, number + 1)
        point = back_up(vm, target, level)
        ids.append(point["id"])
        parents[number] = point["parent"]
        contents[point["id"]] = vm.live()
        assert levels(point) == {"vda": level}
    assert parents == {0: None, 1: ids[0], 2: ids[0], 3: ids[2], 4: None, 5: ids[0]}
    for point_id, expected in contents.items():
        assert_restores(target, point_id, expected, tmp_path)
    names = sorted(path.name.partition("-")[0] for path in (target / "vda").iterdir())
    assert names == ["COPY", "DIFF", "DIFF", "FULL", "INC", "INC"]


def test_qemu_img_alone_restores_every_point(tmp_path: Path, start_qemu: StartQemu) -> None:
    vm = start_qemu([filled(tmp_path, "vda")])
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    expected = {}
    for number, level in enumerate(("full", "inc", "diff", "inc")):
        vm.write("vda", number * MIB, 2 * MIB, number + 1)
        point = back_up(vm, target, level)
        expected[point["disks"][0]["file"]] = vm.live()["vda"]
    target.rename(elsewhere)
    for file, contents in expected.items():
        assert not first_difference(image_contents(elsewhere / file, "qcow2"), contents), file


def test_a_copy_leaves_no_trace(tmp_path: Path, start_qemu: StartQemu) -> None:
    vm = start_qemu([filled(tmp_path, "vda")])
    back_up(vm, tmp_path / "target", "copy")
    assert bitmaps(vm) == set()
    assert try_backup(vm, tmp_path / "target", "inc").check(4).err.count("vda")


def test_an_incremental_without_a_full_is_refused_before_anything_is_made(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    vm = start_qemu([filled(tmp_path, "vda")])
    result = try_backup(vm, tmp_path / "target", "inc").check(4)
    assert "vda" in result.err
    assert "--level auto" in result.err
    assert not (tmp_path / "target").exists()
    assert bitmaps(vm) == set()


def test_unchanged_disks_cost_next_to_nothing(
    tmp_path: Path, start_qemu: StartQemu, target: Target
) -> None:
    vm = start_qemu([filled(tmp_path, "vda")])
    full = back_up(vm, target)
    assert full["disks"][0]["file_size"] > 5 * MIB
    vm.write("vda", 5 * MIB, 4096, 7)
    inc = back_up(vm, target)
    assert 0 < inc["disks"][0]["file_size"] < MIB
    assert_restores(target, inc["id"], vm.live(), tmp_path)


def test_a_clean_restart_goes_on_incrementally_for_qcow2_and_fully_for_raw(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    raw = create(tmp_path / "vdb.raw", SIZE, "raw", contents=pattern(SIZE, 2))
    vm = start_qemu([filled(tmp_path, "vda"), Disk("vdb", raw, "raw")])
    target = tmp_path / "target"
    back_up(vm, target)
    vm.write("vda", 0, MIB, 1)
    vm.write("vdb", 0, MIB, 2)
    assert levels(back_up(vm, target, "inc")) == {"vda": "inc", "vdb": "inc"}
    vm.write("vda", MIB, MIB, 3)
    vm.restart()
    vm.write("vdb", MIB, MIB, 4)
    assert "vdb" in try_backup(vm, target, "inc").check(4).err
    point = back_up(vm, target)
    assert levels(point) == {"vda": "inc", "vdb": "full"}
    reasons = {each["id"]: each["reason"] for each in point["disks"]}
    assert "raw" in reasons["vdb"]
    assert_restores(target, point["id"], vm.live(), tmp_path)


def test_after_qemu_was_killed_just_a_full_is_right(tmp_path: Path, start_qemu: StartQemu) -> None:
    vm = start_qemu([filled(tmp_path, "vda")])
    target = tmp_path / "target"
    back_up(vm, target)
    vm.restart()
    vm.write("vda", 0, MIB, 9)
    vm.flush()
    vm.kill()
    vm.start()
    assert "vda" in try_backup(vm, target, "inc").check(4).err
    point = back_up(vm, target)
    assert levels(point) == {"vda": "full"}
    assert_restores(target, point["id"], vm.live(), tmp_path)
    assert levels(back_up(vm, target, "inc")) == {"vda": "inc"}


def test_an_external_snapshot_makes_a_full_and_its_overlay_is_followed(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    vm = start_qemu([filled(tmp_path, "vda")])
    target = tmp_path / "target"
    back_up(vm, target)
    overlay = str(tmp_path / "overlay.qcow2")
    vm.qmp(
        "blockdev-snapshot-sync",
        **{"node-name": "node-vda", "snapshot-file": overlay, "snapshot-node-name": "over"},
    )
    vm.write("vda", 2 * MIB, MIB, 8)
    point = back_up(vm, target)
    assert levels(point) == {"vda": "full"}
    assert_restores(target, point["id"], vm.live(), tmp_path)
    vm.write("vda", 7 * MIB, MIB, 9)
    point = back_up(vm, target, "inc")
    assert_restores(target, point["id"], vm.live(), tmp_path)


def test_two_targets_are_independent_and_other_tools_bitmaps_stay(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    vm = start_qemu([filled(tmp_path, "vda")])
    add = {"node": "node-vda", "name": "somebody-elses"}
    vm.qmp("transaction", actions=[{"type": "block-dirty-bitmap-add", "data": add}])
    one, two = tmp_path / "one", tmp_path / "two"
    back_up(vm, one)
    vm.write("vda", 0, MIB, 1)
    back_up(vm, two)
    vm.write("vda", MIB, MIB, 2)
    for target in (one, two):
        point = back_up(vm, target, "inc")
        assert_restores(target, point["id"], vm.live(), tmp_path / f"{target.name}-restored")
    assert ("node-vda", "somebody-elses") in bitmaps(vm)
    removed = cli.run("--socket", vm.socket, "cleanup", "--remove-bitmaps").check()
    assert "Removing bitmap: qmpbackup" in removed.out
    assert bitmaps(vm) == {("node-vda", "somebody-elses")}


def test_another_vm_is_refused(tmp_path: Path, start_qemu: StartQemu) -> None:
    target = tmp_path / "target"
    first = start_qemu([filled(tmp_path, "vda")], uuid="11111111-2222-3333-4444-555555555555")
    back_up(first, target)
    second = start_qemu([filled(tmp_path, "vdb")], uuid="11111111-2222-3333-4444-666666666666")
    assert "another VM" in try_backup(second, target).check(2).err


def test_disks_can_be_chosen_by_any_of_their_names(tmp_path: Path, start_qemu: StartQemu) -> None:
    disks = [filled(tmp_path, name) for name in ("vda", "vdb", "vdc")]
    vm = start_qemu(disks)
    one, two = tmp_path / "one", tmp_path / "two"
    assert set(levels(back_up(vm, one, "full", "--include", "vda,node-vdc"))) == {"vda", "vdc"}
    assert set(levels(back_up(vm, two, "full", "--exclude", "vda", "--exclude", "vdb"))) == {"vdc"}
    assert "'nix'" in try_backup(vm, one, "full", "--include", "nix").check(2).err


def test_a_disk_left_out_once_goes_on_from_its_own_last_point_and_small_ones_are_copied_whole(
    tmp_path: Path, start_qemu: StartQemu, target: Target
) -> None:
    small = create(tmp_path / "small", 3 * MIB + 512, contents=pattern(3 * MIB + 512, 4))
    vm = start_qemu([filled(tmp_path, "vda"), Disk("nvram", small), filled(tmp_path, "vdb", 5)])
    assert levels(back_up(vm, target)) == {"vda": "full", "nvram": "full", "vdb": "full"}
    vm.write("vdb", 0, MIB, 1)
    point = back_up(vm, target, "inc", "--exclude", "vdb")
    assert levels(point) == {"vda": "inc", "nvram": "full"}
    vm.write("vdb", 3 * MIB, MIB, 8)
    point = back_up(vm, target, "inc")
    assert levels(point) == {"vda": "inc", "nvram": "full", "vdb": "inc"}
    assert_restores(target, point["id"], vm.live(), tmp_path)
    assert_clean(vm, target)


def test_a_dry_run_says_what_would_be_done_and_changes_nothing(
    tmp_path: Path, start_qemu: StartQemu, target: Target
) -> None:
    vm = start_qemu([filled(tmp_path, "vda")])
    result = try_backup(vm, target, "auto", "--dry-run").check()
    assert "no earlier point" in result.out
    assert "block-dirty-bitmap-add" in result.out
    plan = json.loads(try_backup(vm, target, "auto", "--dry-run", "--json").check().out)
    assert [(each["id"], each["level"]) for each in plan["disks"]] == [("vda", "full")]
    assert manifests(target) == []
    assert isinstance(target, Repository) or not target.exists()
    assert bitmaps(vm) == set()


def test_months_are_chains_of_their_own(tmp_path: Path, start_qemu: StartQemu) -> None:
    vm = start_qemu([filled(tmp_path, "vda")])
    target = tmp_path / "target"
    assert back_up(vm, target, "auto", "--monthly")["level"] == "full"
    assert back_up(vm, target, "auto", "--monthly")["level"] == "inc"
    (month,) = (path for path in target.iterdir() if path.is_dir())
    assert len(month.name) == len("2026-11")
    month.rename(target / "2001-01")
    plan = json.loads(
        try_backup(vm, target, "auto", "--monthly", "--dry-run", "--json").check().out
    )
    new = {each["arguments"].get("name", "") for each in plan["transaction"]}
    ids = {name.split(":")[1] for _, name in bitmaps(vm)}
    assert {name.split(":")[1] for name in new if ":" in name} == ids, "not the target's own id"
    assert back_up(vm, target, "auto", "--monthly")["level"] == "full"
    points = {name.split(":")[2].removesuffix("-end") for _, name in bitmaps(vm)}
    assert len(points) == 1, "bitmaps of the month before stay"


def test_the_target_marks_its_bitmaps_as_the_user_wants(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    vm = start_qemu([filled(tmp_path, "vda")])
    back_up(vm, tmp_path / "target", "full", "--uuid", "testme")
    assert all(name.startswith("qmpbackup:testme:") for _, name in bitmaps(vm))
    assert "testme" in try_backup(vm, tmp_path / "target", "inc", "--uuid", "other").check(2).err
    cleanup = ("--socket", vm.socket, "cleanup", "--remove-bitmap", "--uuid")
    cli.run(*cleanup, "other").check()
    assert bitmaps(vm) != set()
    cli.run(*cleanup, "testme").check()
    assert bitmaps(vm) == set()


def test_compressed_points_are_smaller_and_right(tmp_path: Path, start_qemu: StartQemu) -> None:
    text = (b"to be compressed, " * 65536)[: 2 * MIB] * (SIZE // (2 * MIB))
    vm = start_qemu([Disk("vda", create(tmp_path / "vda.qcow2", SIZE, contents=text))])
    target = tmp_path / "target"
    full = back_up(vm, target, "full", "--compress")
    vm.write("vda", MIB, 2 * MIB, 3)
    inc = back_up(vm, target, "inc", "--compress")
    assert full["disks"][0]["file_size"] < SIZE // 4
    assert_restores(target, inc["id"], vm.live(), tmp_path)


def test_a_speed_limit_changes_nothing_else(tmp_path: Path, start_qemu: StartQemu) -> None:
    vm = start_qemu([filled(tmp_path, "vda")])
    point = back_up(vm, tmp_path / "target", "full", "--speed-limit", "50M")
    assert_restores(tmp_path / "target", point["id"], vm.live(), tmp_path)


def test_the_vm_runs_on_and_pause_is_noted(tmp_path: Path, start_qemu: StartQemu) -> None:
    vm = start_qemu([filled(tmp_path, "vda")])
    assert back_up(vm, tmp_path / "one")["consistency"] == "crash"
    point = back_up(vm, tmp_path / "two", "auto", "--pause")
    assert point["consistency"] == "paused"
    assert 0 < point["pause"] < 5
    assert vm.qmp("query-status")["running"]


def test_a_vm_that_does_not_run_is_left_as_it_is(tmp_path: Path, start_qemu: StartQemu) -> None:
    vm = start_qemu([filled(tmp_path, "vda")], paused=True)
    target = tmp_path / "target"
    back_up(vm, target)
    vm.write("vda", 0, MIB, 1)
    point = back_up(vm, target, "inc")
    assert point["consistency"] == "paused"
    assert vm.qmp("query-status")["status"] == "prelaunch"
    assert_restores(target, point["id"], vm.live(), tmp_path)


def test_over_tcp_qemu_opens_the_files_itself(tmp_path: Path, start_qemu: StartQemu) -> None:
    port = free_port()
    vm = start_qemu(
        [filled(tmp_path, "vda")], args=("-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off")
    )
    target = tmp_path / "target"
    for level in ("full", "inc"):
        vm.write("vda", 0, MIB, len(level))
        arguments = ("backup", "--level", level, "--target", target, "--json")
        result = cli.run("--socket", f"tcp:127.0.0.1:{port}", *arguments).check()
        assert_restores(target, json.loads(result.out)["point"]["id"], vm.live(), tmp_path)
    assert leftovers(vm) == []
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".qmpbackup")]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start QEMU as another user")
def test_qemu_of_another_user_needs_no_right_on_target_and_scratch(
    tmp_path: Path, open_folder: Path, start_qemu: StartQemu
) -> None:
    image = create(open_folder / "vda.qcow2", SIZE, contents=pattern(SIZE, 1))
    os.chown(image, open_folder.stat().st_uid, -1)
    vm = start_qemu([Disk("vda", image)], user="nobody")
    target, scratch = tmp_path / "target", tmp_path / "scratch"
    scratch.mkdir(mode=0o700)
    with Writer(vm, {"vda": SIZE}) as load:
        load.wait_for(10)
        back_up(vm, target, "full", "--scratch", scratch)
        load.wait_for(10)
    point = back_up(vm, target, "inc", "--scratch", scratch)
    vm.flush("vda")
    expected = {"vda": image_contents(image, "qcow2")}
    assert_restores(target, point["id"], expected, tmp_path)
    assert (target.stat().st_mode & 0o777) == 0o700
    files = [path for path in target.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert list(scratch.iterdir()) == []
    assert leftovers(vm) == []

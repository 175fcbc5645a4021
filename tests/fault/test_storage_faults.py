# SPDX-License-Identifier: Apache-2.0
"""Storage that is full, read-only or strange: the run fails with a sentence, the guest never does,
and the next run goes on incrementally."""

import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lab import cli
from lab.aftermath import assert_clean, manifests
from lab.disks import CLUSTER, MIB
from lab.proxy import Place, Proxy
from lab.small import fill, needs_root, small_folder
from qmpbackup.targets.folder.target import DirectoryTarget
from stock.scene import Scene, scene

STORAGE, LOCKED, VM = 7, 11, 6


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Scene]:
    with scene(tmp_path) as stage:
        yield stage


def run(stage: Scene, level: str, *more: cli.Argument) -> cli.Result:
    return cli.run(*stage.arguments(level, stage.vm.socket), *more)


@needs_root
def test_a_full_target_costs_the_run_and_nothing_else(stage: Scene, tmp_path: Path) -> None:
    with small_folder(tmp_path / "small", 32 * MIB) as folder:
        stage.target = folder / "target"
        run(stage, "full").check()
        filler = fill(folder)
        for block in range(8):
            stage.vm.write("vda", block * CLUSTER, CLUSTER, 9)
        for level in ("inc", "full", "auto"):
            refused = run(stage, level).check(STORAGE)
            assert "too little room" in refused.err
            assert "nothing was changed" in refused.err
            assert_clean_but(stage, filler)
            failed = run(stage, level, "--reserve", "0").check(STORAGE)
            assert "No space left" in failed.err
            assert "room" in failed.err or "free space" in failed.err
            assert_clean_but(stage, filler)
        filler.unlink()
        stage.make_good("inc")


def assert_clean_but(stage: Scene, filler: Path) -> None:
    assert filler.exists()
    assert_clean(stage.vm, stage.target)


@needs_root
def test_a_target_that_is_read_only(stage: Scene, tmp_path: Path) -> None:
    with small_folder(tmp_path / "small", 32 * MIB) as folder:
        stage.target = folder / "target"
        run(stage, "full").check()
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        failed = run(stage, "inc").check(STORAGE)
        assert "read-only" in failed.err.lower()
        assert_clean(stage.vm, stage.target)
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        stage.make_good("inc")


def test_a_target_below_a_file(stage: Scene, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    stage.target = tmp_path / "file" / "target"
    failed = run(stage, "full").check(STORAGE)
    assert str(stage.target) in failed.err


@needs_root
def test_a_scratch_that_runs_full_breaks_the_run_and_no_guest_write(
    stage: Scene, tmp_path: Path
) -> None:
    stage.renew("inc")
    with small_folder(tmp_path / "scratch", 3 * MIB) as folder:
        # The room is there at the start, so that it is the guest's writes that use it up.
        writes: list[int] = []

        def overwrite(_proxy: Proxy, at: Place) -> None:
            if at.command == "cont" and at.when == "after":
                for block in range(100):
                    stage.vm.write("vda", block * CLUSTER, CLUSTER, 77)
                    writes.append(block)

        for block in range(48):
            stage.vm.write("vda", block * CLUSTER, CLUSTER, 5)
        path = stage.vm.folder / "proxy"
        (folder / "half").write_bytes(bytes(2 * MIB))
        with Proxy(path, stage.vm.socket, overwrite):
            failed = cli.run(*stage.arguments("inc", path), "--scratch", folder)
        assert failed.code in {VM, STORAGE}, failed
        assert "--scratch" in failed.err
        assert len(writes) in {0, 100}
        assert not [path for path in folder.iterdir() if path.name != "half"]
    stage.make_good("inc")


@needs_root
@pytest.mark.parametrize(("more", "code"), [((), STORAGE), (("--reserve", "0"), VM)])
def test_a_scratch_that_fills_up_while_the_guest_writes(
    stage: Scene, tmp_path: Path, more: tuple[str, ...], code: int
) -> None:
    stage.renew("inc")
    with small_folder(tmp_path / "scratch", 4 * MIB) as folder:
        for block in range(48):
            stage.vm.write("vda", block * CLUSTER, CLUSTER, 5)
        path, written = stage.vm.folder / "proxy", 0

        def overwrite(_proxy: Proxy, at: Place) -> None:
            nonlocal written
            if at.command == "stop" and at.when == "before":
                (folder / "others").write_bytes(bytes(3 * MIB))
            if at.command == "cont" and at.when == "after":
                for block in range(48):
                    stage.vm.write("vda", block * CLUSTER, CLUSTER, 77)
                    written += 1

        with Proxy(path, stage.vm.socket, overwrite):
            failed = cli.run(*stage.arguments("inc", path), "--scratch", folder, *more).check(code)
        assert written == 48
        assert "scratch" in failed.err
        assert "make room" in failed.err.lower()
    stage.make_good("inc")


def test_names_that_are_taken_are_left_alone(stage: Scene) -> None:
    stage.renew("inc")
    now = int(time.time())
    theirs = [stage.target / "vda" / f"INC-{now + n}" for n in range(30)]
    for path in theirs:
        path.write_text("not ours")
    stage.write()
    run(stage, "inc").check()
    run(stage, "inc").check()
    assert {path.read_text() for path in theirs} == {"not ours"}
    for path in theirs:
        path.unlink()
    stage.make_good("inc")


def test_points_of_one_second_are_told_apart(stage: Scene) -> None:
    stage.renew("inc")
    for _ in range(4):
        stage.write()
        run(stage, "inc").check()
    points = manifests(stage.target)
    assert len({point["id"] for point in points}) == 5
    parents = [point["parent"] for point in points]
    assert parents == [None, *(point["id"] for point in points[:-1])]
    stage.make_good("inc")


def test_time_that_goes_backwards_does_not_disturb_the_order(stage: Scene) -> None:
    stage.renew("inc")
    target = DirectoryTarget.open(stage.target)
    (point,) = target.load().points
    with target.lock(remove=True):
        target.replace_manifest(replace(point, time=point.time.replace(year=2101)))
    stage.write()
    run(stage, "inc").check()
    stage.make_good("inc")


@pytest.mark.parametrize("place", ["vda", "points", "vda-file", "vm.json"])
def test_a_link_planted_in_the_target_leads_nowhere(
    stage: Scene, tmp_path: Path, place: str
) -> None:
    stage.renew("inc")
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("untouched")
    if place == "vda-file":
        full = next((stage.target / "vda").glob("FULL-*"))
        stolen = victim / full.name
        full.rename(stolen)
        full.symlink_to(stolen)
    elif place == "vm.json":
        (stage.target / place).rename(victim / place)
        (stage.target / place).symlink_to(victim / place)
    else:
        (stage.target / place).rename(tmp_path / "moved")
        (stage.target / place).symlink_to(victim)
    before = {path: path.read_bytes() for path in victim.iterdir()}
    for level in ("inc", "auto", "full"):
        result = run(stage, level)
        assert "Traceback" not in result.err
        assert "Unexpected" not in result.err
        if place == "vda-file" and level != "inc":
            result.check()
        else:
            assert result.code in {4, 7, 8}, result
        assert {path: path.read_bytes() for path in victim.iterdir()} == before
    assert stage.vm.qmp("query-status")["running"]


def test_a_target_that_others_can_rearrange_is_refused(stage: Scene) -> None:
    stage.renew("inc")
    stage.target.chmod(0o777)
    result = run(stage, "inc").check(STORAGE)
    assert str(stage.target) in result.err
    stage.target.chmod(0o700)
    stage.make_good("inc")

# SPDX-License-Identifier: Apache-2.0
"""QEMU is killed, or the connection to it is cut, at places all over a run.

The run ends in order with exit code 6; the next one makes a full of the disks whose change bitmaps
died with QEMU, and an incremental where only the connection was lost.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import cli
from lab.aftermath import assert_clean, assert_only_named, manifests
from lab.backups import assert_restores
from lab.proxy import Place, Proxy
from stock.scene import SIZES, WHERE, Scene, Where, scene

SPREAD = 40
PARTS = 3
"""Tests that share the places of a complete run, so that each is over in minutes."""
DONE, LOST = 0, 6

Choice = Callable[[Scene], list[Place]]


def all_places(stage: Scene, part: int) -> list[Place]:
    """Every place of an incremental run, or rather a part of them."""
    found: list[Place] = []
    run(stage, lambda _proxy, at: found.append(at))
    return shown(found[part::PARTS])


def shown(chosen: list[Place]) -> list[Place]:
    print("at", *(f"{at.when} {at.number} {at.command}," for at in chosen))
    return chosen


def some_places(stage: Scene) -> list[Place]:
    """A spread of the places of an incremental run, with all around its instant."""
    found: list[Place] = []
    run(stage, lambda _proxy, at: found.append(at))
    delicate = {"stop", "transaction", "cont"}
    chosen = [
        at
        for n, at in enumerate(found)
        if n == 1 or n % SPREAD == 0 or (at.command in delicate and at.when == "after")
    ]
    return shown(chosen)


def run(stage: Scene, hook: Callable[[Proxy, Place], None]) -> cli.Result:
    """An incremental run through a proxy."""
    path = stage.vm.folder / "proxy"
    with Proxy(path, stage.vm.socket, hook):
        return stage.run("inc", socket=path)


def cut_at(place: Place) -> Callable[[Proxy, Place], None]:
    """Cuts the connection at a place."""

    def hook(proxy: Proxy, at: Place) -> None:
        if (at.number, at.when) == (place.number, place.when):
            proxy.cut()

    return hook


def cut_at_all(folder: Path, where: Where, choose: Choice) -> None:
    with scene(folder, where) as stage:
        stage.renew("inc")
        for place in choose(stage):
            stage.write()
            before = len(manifests(stage.place))
            result = run(stage, cut_at(place))
            made = len(manifests(stage.place)) - before
            assert (result.code, made) in {(LOST, 0), (DONE, 1), (3, 1)}, (place, str(result))
            assert made or "connection" in result.err, (place, result.err)
            stage.make_good("inc")


@pytest.mark.parametrize("where", WHERE)
def test_the_connection_is_cut_at_a_spread_of_places(tmp_path: Path, where: Where) -> None:
    cut_at_all(tmp_path, where, some_places)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("where", WHERE)
def test_the_connection_is_cut_everywhere(tmp_path: Path, where: Where, part: int) -> None:
    cut_at_all(tmp_path, where, lambda stage: all_places(stage, part))


def kill_at_all(folder: Path, where: Where, choose: Choice) -> None:
    with scene(folder, where) as stage:
        stage.renew("inc")
        for place in choose(stage):
            stage.write()
            stage.vm.flush()
            before = len(manifests(stage.place))
            result = run(stage, kill_qemu_at(stage, place))
            stage.vm.kill()
            made = len(manifests(stage.place)) - before
            assert (result.code, made) in {(LOST, 0), (DONE, 1), (3, 1)}, (place, str(result))
            assert_only_named(stage.place)
            restart_and_go_on(stage, folder)


def kill_qemu_at(stage: Scene, place: Place) -> Callable[[Proxy, Place], None]:
    """Kills QEMU at a place."""

    def hook(_proxy: Proxy, at: Place) -> None:
        if (at.number, at.when) == (place.number, place.when):
            stage.vm.kill()

    return hook


def restart_and_go_on(stage: Scene, folder: Path) -> None:
    stage.vm.start()
    stage.write()
    refused = stage.run("inc").check(4)
    assert "vda" in refused.err
    assert "QEMU was killed" in refused.err
    result = stage.run("auto", "--json").check()
    point = json.loads(result.out)["point"]
    assert {disk["level"] for disk in point["disks"]} == {"full"}
    assert_clean(stage.vm, stage.place)
    live = {disk: stage.vm.contents(disk) for disk in SIZES}
    assert_restores(stage.place, point["id"], live, folder)
    stage.make_good("inc")


@pytest.mark.parametrize("where", WHERE)
def test_qemu_is_killed_at_a_spread_of_places(tmp_path: Path, where: Where) -> None:
    kill_at_all(tmp_path, where, some_places)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("where", WHERE)
def test_qemu_is_killed_everywhere(tmp_path: Path, where: Where, part: int) -> None:
    kill_at_all(tmp_path, where, lambda stage: all_places(stage, part))


def test_only_the_disks_without_their_bitmaps_are_made_whole(tmp_path: Path) -> None:
    with scene(tmp_path) as stage:
        stage.renew("inc")
        (node,) = (disk.node for disk in stage.vm.disks if disk.id == "vda")
        for point in manifests(stage.place):
            bitmap = next(disk["bitmap"] for disk in point["disks"] if disk["id"] == "vda")
            remove = {"node": node, "name": bitmap}
            stage.vm.qmp.command("block-dirty-bitmap-remove", remove)
        refused = stage.run("inc").check(4)
        assert "Disk vda" in refused.err
        result = stage.run("auto", "--json").check()
        found = {d["id"]: d["level"] for d in json.loads(result.out)["point"]["disks"]}
        assert found == {"vda": "full", "vdb": "inc"}
        stage.make_good("inc")

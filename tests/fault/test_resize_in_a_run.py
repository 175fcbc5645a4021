# SPDX-License-Identifier: Apache-2.0
"""A disk is grown or shrunk at places all over a run: that run makes a right point or none, and the
next one is right again."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from lab import cli
from lab.aftermath import manifests
from lab.backups import assert_restores
from lab.disks import CLUSTER, MIB
from lab.proxy import Place, Proxy
from lab.qmp import QmpError
from stock.scene import SIZES, Scene, scene

DELICATE = frozenset({"stop", "transaction"})


def resize_everywhere(folder: Path, grow: bool, step: int) -> int:
    """Resize at places of incremental runs; return how often QEMU let us."""
    done = 0
    with scene(folder) as stage:
        stage.renew("inc")
        names: list[str] = []
        run(stage, lambda _proxy, at: names.append(at.command))
        chosen = [
            number
            for number, name in enumerate(names[::2])
            if number % step == 0 or name in DELICATE
        ]
        print("before", *(f"{number} {names[2 * number]}," for number in chosen))
        for count, number in enumerate(chosen, start=1):
            stage.write()
            size = SIZES["vda"] + count * MIB if grow else 30 * MIB - count * CLUSTER
            if not grow and count == 1:
                resize(stage, 30 * MIB)
            early = number <= names[::2].index("stop")
            done += resize_at(stage, number, size, folder if early else None)
    return done


def resize_at(stage: Scene, number: int, size: int, folder: Path | None) -> bool:
    """One run with a resize in it, then one without. With a `folder` the resize comes before the
    instant, and a point that is made must show it."""
    resized = False

    def hook(_proxy: Proxy, at: Place) -> None:
        nonlocal resized
        if (at.number, at.when) == (number, "before"):
            resized = resize(stage, size)

    before = len(manifests(stage.target))
    result = run(stage, hook, "auto")
    made = len(manifests(stage.target)) - before
    assert (result.code, made) in {(0, 1), (6, 0), (1, 0)}, str(result)
    assert "Unexpected" not in result.err
    print(f"before {number}: resized {resized}, exit code {result.code}")
    if made and folder:
        live = {disk: stage.vm.contents(disk) for disk in SIZES}
        assert_restores(stage.target, manifests(stage.target)[-1]["id"], live, folder)
    stage.make_good("first")
    return resized


def resize(stage: Scene, size: int) -> bool:
    """Whether QEMU did it: during a copy, and with a filter on the disk, it refuses."""
    with suppress(QmpError):
        stage.vm.qmp("block_resize", node_name="node-vda", size=size)
        return True
    return False


def run(stage: Scene, hook: Callable[[Proxy, Place], None], level: str = "inc") -> cli.Result:
    path = stage.vm.folder / "proxy"
    with Proxy(path, stage.vm.socket, hook):
        return cli.run(*stage.arguments(level, path))


@pytest.mark.parametrize("grow", [True, False])
def test_resized_at_a_spread_of_places(tmp_path: Path, grow: bool) -> None:
    assert resize_everywhere(tmp_path, grow, step=20) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("grow", [True, False])
def test_resized_everywhere(tmp_path: Path, grow: bool) -> None:
    assert resize_everywhere(tmp_path, grow, step=1) >= 20


def test_a_disk_that_grows_just_before_the_instant_is_named(tmp_path: Path) -> None:
    with scene(tmp_path) as stage:
        stage.renew("inc")
        stage.write()

        def hook(_proxy: Proxy, at: Place) -> None:
            if at.command == "stop" and at.when == "before":
                assert resize(stage, 12 * MIB)

        failed = run(stage, hook).check(6)
        assert "vda was resized" in failed.err
        assert "Run again" in failed.err
        stage.make_good("inc")

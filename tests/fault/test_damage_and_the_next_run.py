# SPDX-License-Identifier: Apache-2.0
"""A target in which something is missing or changed: earlier points still restore, damage is named,
and the next run starts a new chain of just the disks that need it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import cli
from lab.aftermath import manifests
from lab.backups import restored
from lab.disks import first_difference
from lab.scene import SIZES, Scene, scene

DAMAGED = 8


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Scene]:
    with scene(tmp_path) as stage:
        stage.renew("inc")
        yield stage


def newest(stage: Scene) -> Path:
    """The newest file of vda."""
    (name,) = (d["file"] for d in manifests(stage.target)[-1]["disks"] if d["id"] == "vda")
    return stage.target / str(name)


def missing(stage: Scene) -> None:
    newest(stage).unlink()


def truncated(stage: Scene) -> None:
    with newest(stage).open("r+b") as file:
        file.truncate(1000)


def grown(stage: Scene) -> None:
    with newest(stage).open("ab") as file:
        file.write(bytes(65536))


def a_folder_in_its_place(stage: Scene) -> None:
    newest(stage).unlink()
    newest(stage).mkdir()


@pytest.mark.parametrize("damage", [missing, truncated, grown, a_folder_in_its_place])
def test_a_damaged_newest_file(
    stage: Scene, tmp_path: Path, damage: Callable[[Scene], None]
) -> None:
    stage.write()
    contents = {disk: stage.vm.contents(disk) for disk in SIZES}
    cli.run(*stage.arguments("inc", stage.vm.socket)).check()
    stage.write()
    cli.run(*stage.arguments("inc", stage.vm.socket)).check()
    damage(stage)
    name = newest(stage).name
    assert name in cli.run("verify", "--target", stage.target).check(DAMAGED).out
    failed = cli.run("restore", "--target", stage.target, "--output", tmp_path / "no")
    assert name in failed.check(DAMAGED).err
    middle = manifests(stage.target)[1]["id"]
    found = restored(stage.target, middle, tmp_path)
    assert [first_difference(found[disk], contents[disk]) for disk in SIZES] == ["", ""]
    refused = cli.run(*stage.arguments("inc", stage.vm.socket)).check(4)
    assert "Disk vda" in refused.err
    assert "damaged" in refused.err
    result = cli.run(*stage.arguments("auto", stage.vm.socket), "--json").check()
    levels = {d["id"]: d["level"] for d in json.loads(result.out)["point"]["disks"]}
    assert levels == {"vda": "full", "vdb": "inc"}
    check_newest(stage, tmp_path)
    stage.write()
    cli.run(*stage.arguments("inc", stage.vm.socket)).check()
    check_newest(stage, tmp_path)


def check_newest(stage: Scene, folder: Path) -> None:
    found = restored(stage.target, manifests(stage.target)[-1]["id"], folder)
    for disk in SIZES:
        assert not first_difference(found[disk], stage.vm.contents(disk)), disk


def test_an_edited_manifest_is_built_upon_by_nobody(stage: Scene, tmp_path: Path) -> None:
    cli.run(*stage.arguments("inc", stage.vm.socket)).check()
    point = manifests(stage.target)[-1]["id"]
    manifest = stage.target / "points" / f"{point}.json"
    manifest.write_text(manifest.read_text().replace('"inc"', '"full"', 1))
    assert str(point) in cli.run("verify", "--target", stage.target).check(DAMAGED).out
    stage.write()
    result = cli.run(*stage.arguments("auto", stage.vm.socket), "--json")
    assert result.code in {0, 3}, result
    made = json.loads(result.out)["point"]["id"]
    found = restored(stage.target, made, tmp_path)
    for disk in SIZES:
        assert not first_difference(found[disk], stage.vm.contents(disk)), disk


def test_a_lost_owner_file_stops_writing_with_a_sentence(stage: Scene) -> None:
    (stage.target / "vm.json").unlink()
    refused = cli.run(*stage.arguments("auto", stage.vm.socket)).check(DAMAGED)
    assert "vm.json" in refused.err

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
from lab.damage import flip
from lab.disks import first_difference
from stock.scene import SIZES, Scene, scene

DAMAGED = 8


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Scene]:
    with scene(tmp_path) as stage:
        stage.renew("inc")
        yield stage


def stored(stage: Scene, number: int) -> Path:
    """The file of vda in a point."""
    (name,) = (d["file"] for d in manifests(stage.target)[number]["disks"] if d["id"] == "vda")
    return stage.target / str(name)


def newest(stage: Scene) -> Path:
    """The newest file of vda."""
    return stored(stage, -1)


def marks(stage: Scene) -> list[str]:
    """What the target says to be damaged."""
    return sorted(path.name for path in stage.target.rglob("*.damaged"))


def levels(result: cli.Result) -> dict[str, str]:
    """The levels of the disks of a point that was made."""
    return {disk["id"]: disk["level"] for disk in json.loads(result.out)["point"]["disks"]}


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


def flipped(stage: Scene) -> None:
    flip(newest(stage), -1000)


def exchanged(stage: Scene) -> None:
    """The two newest files of vda change places; both are of one length."""
    one, other = newest(stage), stored(stage, -2)
    length = max(one.stat().st_size, other.stat().st_size)
    assert one.stat().st_size == other.stat().st_size == length
    contents = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(contents)


@pytest.mark.parametrize("damage", [missing, truncated, grown, flipped, a_folder_in_its_place])
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


@pytest.mark.parametrize("damage", [flipped, exchanged])
def test_damage_to_the_newest_file_is_found_by_the_next_run_itself(
    stage: Scene, tmp_path: Path, damage: Callable[[Scene], None]
) -> None:
    for _ in range(2):
        stage.write()
        cli.run(*stage.arguments("inc", stage.vm.socket)).check()
    damage(stage)
    stage.write()
    refused = cli.run(*stage.arguments("inc", stage.vm.socket)).check(4)
    assert "Disk vda" in refused.err
    made = cli.run(*stage.arguments("auto", stage.vm.socket), "--json").check()
    assert levels(made) == {"vda": "full", "vdb": "inc"}
    check_newest(stage, tmp_path)
    stage.make_good("inc")


def test_damage_to_an_old_file_is_found_by_a_run_that_is_asked_to_look(
    stage: Scene, tmp_path: Path
) -> None:
    for _ in range(2):
        stage.write()
        cli.run(*stage.arguments("inc", stage.vm.socket), "--verify-chain").check()
    flip(stored(stage, 1), -1000)
    stage.write()
    refused = cli.run(*stage.arguments("inc", stage.vm.socket), "--verify-chain").check(4)
    assert stored(stage, 1).name in refused.err
    arguments = (*stage.arguments("auto", stage.vm.socket), "--verify-chain", "--json")
    assert levels(cli.run(*arguments).check()) == {"vda": "full", "vdb": "inc"}
    check_newest(stage, tmp_path)


@pytest.mark.parametrize("finder", ["verify", "restore"])
def test_a_flipped_bit_that_was_found_is_remembered(
    stage: Scene, tmp_path: Path, finder: str
) -> None:
    stage.write()
    cli.run(*stage.arguments("inc", stage.vm.socket)).check()
    full = stored(stage, 0)
    good = full.read_bytes()
    flip(full, -1000)
    output = ("--output", tmp_path / "no") if finder == "restore" else ()
    cli.run(finder, "--target", stage.target, *output).check(DAMAGED)
    assert marks(stage) == [f"vda.{full.name}.damaged"]
    listed = cli.run("list", "--target", stage.target).check(DAMAGED)
    assert f"vda/{full.name}" in listed.err
    assert all(point["id"] in listed.err for point in manifests(stage.target))
    objects = cli.run("list", "--target", stage.target, "--json").check(DAMAGED).objects
    assert [each["damaged"] for each in objects] == [["vda"], ["vda"]]
    refused = cli.run(*stage.arguments("inc", stage.vm.socket)).check(4)
    assert full.name in refused.err
    if finder == "verify":
        made = cli.run(*stage.arguments("auto", stage.vm.socket), "--json").check()
        assert levels(made) == {"vda": "full", "vdb": "inc"}
        check_newest(stage, tmp_path)
    full.write_bytes(good)
    cli.run("verify", "--target", stage.target).check()
    assert marks(stage) == []
    cli.run("list", "--target", stage.target).check()
    stage.make_good("inc")


def test_damage_is_told_where_no_mark_can_be_left(stage: Scene, tmp_path: Path) -> None:
    full = stored(stage, 0)
    flip(full, -1000)
    (stage.target / "points" / f"vda.{full.name}.damaged.tmp").mkdir()
    found = cli.run("verify", "--target", stage.target).check(DAMAGED)
    assert full.name in found.out
    assert "could not be marked" in found.err
    output = ("--output", tmp_path / "no")
    found = cli.run("restore", "--target", stage.target, *output).check(DAMAGED)
    assert full.name in found.err


@pytest.mark.parametrize("spoilt", ["", "{}", "[" * 100_000])
def test_a_mark_that_cannot_be_read_counts(stage: Scene, spoilt: str) -> None:
    mark = stage.target / "points" / f"vda.{stored(stage, 0).name}.damaged"
    mark.write_text(spoilt)
    refused = cli.run(*stage.arguments("inc", stage.vm.socket)).check(4)
    assert "Disk vda" in refused.err
    cli.run("verify", "--target", stage.target).check()
    stage.make_good("inc")

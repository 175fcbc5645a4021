# SPDX-License-Identifier: Apache-2.0
"""`list`, `show`, `verify` and `restore` as users type them: exit codes, tables, JSON, sentences."""

from pathlib import Path

import pytest

from lab import cli
from qmpbackup.model import Level
from stock.stored import MIB, Stored, Write


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """A full and an incremental of one disk."""
    stored = Stored(tmp_path / "target", size=MIB)
    stored.add(Level.FULL, {"hd0": [Write(1, 0, MIB)]})
    stored.add(Level.INC, {"hd0": [Write(2, 65536, 512)]})
    return stored


def test_list_is_a_table_oldest_point_first(stored: Stored) -> None:
    lines = cli.run("list", "--target", stored.path).check().out.splitlines()
    assert lines[0].split()[0] == "ID"
    assert [line.split()[0] for line in lines[1:]] == [point.id for point in stored.points]
    assert stored.points[0].id in lines[2].split()


def test_list_as_json_is_one_object_a_point(stored: Stored) -> None:
    objects = cli.run("list", "--target", stored.path, "--json").check().objects
    assert [each["id"] for each in objects] == [point.id for point in stored.points]
    assert objects[1] == {
        "schema": 1,
        "type": "point",
        "id": stored.points[1].id,
        "time": "2026-11-02T05:00:00.000000Z",
        "level": "inc",
        "parent": stored.points[0].id,
        "vm": stored.points[1].vm.identity.name,
        "uuid": stored.points[1].vm.identity.uuid,
        "host": stored.points[1].vm.identity.host,
        "disks": ["hd0"],
        "labels": {},
        "consistency": "crash",
        "size": stored.points[1].size,
        "merged": [],
        "damaged": [],
    }


def test_list_shows_what_is_whole_beside_a_damaged_manifest(stored: Stored) -> None:
    stored.manifest(stored.points[0]).write_text("{}")
    result = cli.run("list", "--target", stored.path).check(8)
    assert stored.points[1].id in result.out
    assert stored.points[0].id in result.err


@pytest.mark.parametrize("command", ["list", "show", "verify", "restore"])
def test_no_target_is_said_with_its_own_code(tmp_path: Path, command: str) -> None:
    output = ["--output", str(tmp_path / "out")] if command == "restore" else []
    result = cli.run(command, "--target", tmp_path / "none", *output).check(10)
    assert "There is no target" in result.err
    assert "Traceback" not in result.err


def test_show_tells_all_of_the_latest_point(stored: Stored) -> None:
    out = cli.run("show", "--target", stored.path).check().out
    disk = stored.points[1].disks[0]
    for text in (stored.points[1].id, disk.file, disk.digest, "qemu-system-x86_64 -name vm"):
        assert text in out


def test_show_as_json_is_the_manifest(stored: Stored) -> None:
    point = stored.points[0]
    (shown,) = cli.run("show", "-t", stored.path, "-p", point.id, "--json").check().objects
    assert (shown["id"], shown["sequence"]) == (point.id, 1)
    assert shown["disks"][0]["digest"] == point.disks[0].digest


def test_names_in_manifests_cannot_command_a_terminal(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "target", size=MIB)
    stored.add(Level.FULL, {"a\x1b[2Jb": []})
    for command in ("list", "show"):
        out = cli.run(command, "--target", stored.path).check().out
        assert "\x1b" not in out
        assert "a\\x1b[2Jb" in out


def test_verify_ends_with_a_summary(stored: Stored) -> None:
    result = cli.run("verify", "--target", stored.path).check()
    assert result.out.splitlines()[-1].startswith("2 points, 2 files, ")
    stored.file(stored.points[0], "hd0").unlink()
    damaged = cli.run("verify", "--target", stored.path, "--json").check(8).objects
    assert [each["ok"] for each in damaged] == [False, False, False]
    assert [each["type"] for each in damaged] == ["verdict", "verdict", "summary"]


def test_restore_says_what_went_where(stored: Stored, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("restore", "--target", stored.path, "--output", out, "--format", "raw")
    (told,) = cli.run(*command, "--json").check().objects
    assert told["point"] == stored.points[1].id
    assert told["disks"] == [{"id": "hd0", "file": str(out / "hd0.raw"), "size": MIB}]
    assert (out / "hd0.raw").read_bytes() == stored.expected[stored.points[1].id, "hd0"]
    again = cli.run(*command).check(2)
    assert "exists already" in again.err
    assert str(out / "hd0.raw") in cli.run(*command, "--force").check().out


def test_a_time_names_the_newest_point_before_it(stored: Stored, tmp_path: Path) -> None:
    out = tmp_path / "out"
    point = ("--point", "2026-11-02T04:30", "--format", "raw")
    cli.run("restore", "--target", stored.path, "--output", out, *point).check()
    assert (out / "hd0.raw").read_bytes() == stored.expected[stored.points[0].id, "hd0"]


def test_a_target_in_use_is_waited_for_or_left(stored: Stored) -> None:
    with stored.target.lock(remove=True):
        assert "using the target" in cli.run("list", "--target", stored.path).check(11).err
        command = cli.start("list", "--target", stored.path, "--lock-wait", 60)
    with command:
        command.wait().check()

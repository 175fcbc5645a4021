# SPDX-License-Identifier: Apache-2.0
"""Command lines that are wrong, and surroundings that are odd: a sentence, a hint, a documented exit
code, never a traceback, nothing left behind and nothing lost."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lab import cli
from lab.disks import MIB, Disk, contents, create
from lab.ports import free_port
from lab.qemu import Qemu, StartQemu
from qmpbackup.machine.view import CBW_TIMEOUT_SECONDS
from qmpbackup.model import Level
from stock.repositories import repository
from stock.stored import Stored, Write

PROGRAM = str(Path(sys.executable).with_name("qmpbackup"))


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """A full and an incremental of one disk."""
    stored = Stored(tmp_path / "target", size=MIB)
    stored.add(Level.FULL, {"hd0": [Write(1, 0, MIB)]})
    stored.add(Level.INC, {"hd0": [Write(2, 65536, 512)]})
    return stored


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Qemu]:
    """A VM with one disk; what its tests do leaves it as it is."""
    image = create(tmp_path_factory.mktemp("vm") / "a.qcow2", MIB)
    with Qemu([Disk("vda", image)], name="vm") as vm:
        yield vm


def refused(*arguments: cli.Argument, code: int = 2, cwd: Path | None = None) -> str:
    """What a command that must not work says."""
    result = cli.run(*arguments, cwd=cwd).check(code)
    assert "Traceback" not in result.err
    assert "Unexpected" not in result.err
    assert not result.out
    return result.err


def backup(vm: Qemu, target: Path | str, *more: cli.Argument) -> Sequence[cli.Argument]:
    """A backup of the VM."""
    return ("--socket", vm.socket, "backup", "--level", "auto", "--target", target, *more)


class TestWrongArguments:
    """They are refused before anything is touched."""

    @pytest.mark.parametrize(
        "option",
        [
            ("--include", ","),
            ("--include", ""),
            ("--exclude", " , "),
            ("--lock-wait", "-1"),
            ("--lock-wait", "nan"),
            ("--lock-wait", "soon"),
            ("--speed-limit", "-5"),
            ("--speed-limit", "99999999999999999999999"),
            ("--speed-limit", "8E"),
            ("--speed-limit", ""),
            ("--scratch", ""),
            ("--uuid", "a b"),
            ("--no-subdir",),
            ("--no-timestamp",),
            ("--cbw-timeout", "5"),
        ],
    )
    def test_of_a_backup(self, vm: Qemu, tmp_path: Path, option: tuple[str, ...]) -> None:
        target = tmp_path / "target"
        assert option[0] in refused(*backup(vm, target, *option)) or option[0] == "--uuid"
        assert not target.exists()

    def test_an_empty_path_is_not_the_current_folder(self, vm: Qemu, stored: Stored) -> None:
        here = stored.path
        before = sorted(here.rglob("*"))
        assert "--target" in refused(*backup(vm, ""), cwd=here)
        for command in ("list", "show", "verify"):
            assert "--target" in refused(command, "--target", "", cwd=here)
        restore = ("restore", "--target", here)
        assert "--output" in refused(*restore, "--output", "", cwd=here)
        assert "--output-file" in refused(*restore, "--output-file", "", cwd=here)
        assert sorted(here.rglob("*")) == before

    def test_a_repository_is_no_folder(self, vm: Qemu, tmp_path: Path) -> None:
        made = repository(tmp_path)
        before = sorted(Path(made.location).rglob("*"))
        assert f"restic:{made.location}" in refused(*backup(vm, made.location))
        assert f"restic:{made.location}" in refused("list", "--target", made.location)
        assert sorted(Path(made.location).rglob("*")) == before

    @pytest.mark.parametrize("location", ["s3:bucket", "rest:https://host/", "sftp:host:/x"])
    def test_a_location_without_its_word_is_no_folder(
        self, vm: Qemu, tmp_path: Path, location: str
    ) -> None:
        assert f"restic:{location}" in refused(*backup(vm, location), cwd=tmp_path)
        assert not list(tmp_path.glob(f"{location[:2]}*"))

    def test_an_id_that_is_empty_is_not_all_ids(self, vm: Qemu) -> None:
        said = refused("--socket", vm.socket, "cleanup", "--remove-bitmaps", "--uuid", "")
        assert "--uuid" in said

    def test_a_disk_without_a_name_is_not_all_disks(self, stored: Stored, tmp_path: Path) -> None:
        out = tmp_path / "out"
        for names in ("", ","):
            refused("restore", "--target", stored.path, "--output", out, "--disk", names)
        assert not out.exists()

    def test_a_folder_is_not_a_file_to_write(self, stored: Stored, tmp_path: Path) -> None:
        restore = ("restore", "--target", stored.path, "--output-file", tmp_path)
        for force in ((), ("--force",)):
            assert "--output" in refused(*restore, *force)

    def test_a_time_beyond_the_calendar_is_no_point(self, stored: Stored) -> None:
        time = "9999-12-31T23:59:59-23:00"
        shown = cli.run("show", "--target", stored.path, "--point", time)
        assert "Unexpected" not in shown.err
        assert shown.code in {0, 10}

    def test_options_of_all_commands_behind_the_command(self, stored: Stored) -> None:
        said = refused("list", "--target", stored.path, "--debug")
        assert "before the command" in said

    def test_a_target_that_is_a_file_or_lies_below_one(self, vm: Qemu, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_text("mine")
        for target in (file, file / "below"):
            assert "not a folder" in refused(*backup(vm, target), code=7)
        assert file.read_text() == "mine"

    def test_the_doctor_sees_a_target_that_is_a_file(self, vm: Qemu, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_text("mine")
        doctor = ("--socket", vm.socket, "doctor", "--target", file, "--json")
        found = cli.run(*doctor).check(1).objects
        assert [each["about"] for each in found if each["health"] == "problem"] == ["target"]


def test_options_of_the_original_that_change_nothing_here(vm: Qemu, tmp_path: Path) -> None:
    more = ["--include-raw", "--no-symlink", "--progress-interval", "5", "--remove-delay", "3"]
    more += (
        "--blockdev-disable-cache",
        "--blockdev-aio",
        "io_uring",
        "--cbw-timeout",
        str(CBW_TIMEOUT_SECONDS),
    )
    done = cli.run(*backup(vm, tmp_path / "target", *more)).check()
    assert "--blockdev-aio" in done.err, "it says what has no effect"


class TestRestoreHarmsNothing:
    """Whatever place is named, and whatever is forced."""

    def test_a_backup_file_is_never_the_output(self, stored: Stored, tmp_path: Path) -> None:
        file = stored.file(stored.points[0], "hd0")
        before = file.read_bytes()
        restore = ("restore", "--target", stored.path, "--force")
        assert "target" in refused(*restore, "--output-file", file)
        (tmp_path / "link").symlink_to(stored.path / "hd0")
        for folder in (stored.path, stored.path / "hd0", stored.path / "new", tmp_path / "link"):
            assert "target" in refused(*restore, "--output", folder)
        assert file.read_bytes() == before
        cli.run("verify", "--target", stored.path).check()
        assert not (stored.path / "new").exists()

    def test_the_image_of_a_running_vm_is_never_replaced(
        self, tmp_path: Path, start_qemu: StartQemu
    ) -> None:
        image = create(tmp_path / "a.qcow2", MIB, contents=bytes(range(256)) * (MIB // 256))
        vm = start_qemu([Disk("vda", image)], name="vm")
        cli.run(*backup(vm, tmp_path / "target")).check()
        number = image.stat().st_ino
        restore = ("restore", "--target", tmp_path / "target", "--force", "--output-file", image)
        assert "in use" in refused(*restore)
        assert image.stat().st_ino == number
        vm.quit()
        cli.run(*restore).check()
        assert contents(image) == bytes(range(256)) * (MIB // 256)


class TestSurroundings:
    """Streams, languages, users and file systems that are not as usual."""

    def test_a_reader_that_leaves(self, stored: Stored) -> None:
        for arguments in (["list", "-t", str(stored.path)], ["--help"]):
            done = subprocess.run(
                ["sh", "-c", '"$@" | true', "sh", PROGRAM, *arguments],
                capture_output=True, text=True, check=True, timeout=30,
            )  # fmt: skip
            assert not done.stderr

    def test_help_that_cannot_be_printed(self) -> None:
        full = ["sh", "-c", '"$@" >/dev/full', "sh", PROGRAM, "--help"]
        done = subprocess.run(full, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr == "error: The help cannot be printed: No space left on device.\n"

    def test_closed_streams_are_like_dev_null(self, vm: Qemu, tmp_path: Path) -> None:
        target = tmp_path / "target"
        for command in (
            backup(vm, target),
            ("verify", "--target", target),
            ("restore", "--target", target, "--output", tmp_path / "out"),
        ):
            closed = ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", PROGRAM, *map(str, command)]
            subprocess.run(closed, check=True, timeout=30)
        assert (tmp_path / "out" / "vda.qcow2").stat().st_size
        cli.run("verify", "--target", target).check()

    def test_a_result_that_cannot_be_printed(self, vm: Qemu, tmp_path: Path) -> None:
        target = tmp_path / "target"
        full = ["sh", "-c", '"$@" >/dev/full', "sh", PROGRAM]
        made = subprocess.run(
            [*full, *map(str, backup(vm, target))], capture_output=True, text=True, check=False
        )
        assert made.returncode == 3, "the point exists"
        assert "No space left" in made.stderr
        assert "Unexpected" not in made.stderr
        listed = subprocess.run(
            [*full, "list", "--target", str(target)], capture_output=True, text=True, check=False
        )
        assert listed.returncode == 7
        assert "Unexpected" not in listed.stderr
        assert len(cli.run("list", "--target", target, "--json").check().objects) == 1

    def test_a_terminal_that_knows_few_letters(self, vm: Qemu) -> None:
        env = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
        cli.run("--socket", vm.socket, "doctor", env=env).check()
        assert "exit codes" in cli.run("--help", env=env).check().out

    @pytest.mark.parametrize("columns", ["1", "0", "many"])
    def test_narrow_terminals(self, columns: str) -> None:
        assert "--level" in cli.run("backup", "--help", env={"COLUMNS": columns}).check().out

    def test_no_environment_at_all(self, stored: Stored) -> None:
        arguments = [PROGRAM, "list", "-t", str(stored.path)]
        done = subprocess.run(arguments, env={}, capture_output=True, check=True)
        assert not done.stderr

    def test_as_a_module(self, stored: Stored) -> None:
        arguments = [sys.executable, "-m", "qmpbackup", "list", "-t", str(stored.path), "--json"]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        assert len(done.stdout.splitlines()) == len(stored.points)

    def test_a_log_file_that_cannot_be_opened(self, stored: Stored, tmp_path: Path) -> None:
        said = refused("--logfile", tmp_path, "list", "--target", stored.path, code=7)
        assert said.startswith("error: ")

    def test_a_log_file_that_runs_full_costs_nothing(self, vm: Qemu, tmp_path: Path) -> None:
        done = cli.run("--logfile", "/dev/full", *backup(vm, tmp_path / "target")).check()
        assert "Traceback" not in done.err
        assert done.err.count("/dev/full") == 1

    def test_messages_stay_on_their_line(self, tmp_path: Path) -> None:
        said = refused("list", "--target", f"{tmp_path}/a\nerror: b\x1b[2J", code=10)
        assert len(said.splitlines()) == 2
        assert "\x1b" not in said

    def test_names_that_are_no_text(self, stored: Stored, tmp_path: Path) -> None:
        folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe\n out")
        restore = ("restore", "--target", stored.path, "--output", folder)
        (told,) = cli.run(*restore, "--json").check().objects
        assert (Path(folder) / "hd0.qcow2").exists()
        assert told["disks"][0]["file"] == f"{folder}/hd0.qcow2"
        cli.run(*restore, "--force").check()
        renamed = stored.path.rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xfe target"))
        merge = ("merge", "--dir", renamed / "hd0", "--targetfile", Path(folder) / "merged")
        cli.run(*merge, program="qmprestore").check()
        assert (Path(folder) / "merged").exists()

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
    def test_a_run_folder_that_cannot_be_written(self, vm: Qemu) -> None:
        script = 'mount -t tmpfs -o ro none /run && exec "$@"'
        info = [PROGRAM, "--socket", str(vm.socket), "info", "--show", "bitmaps"]
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", script, "sh", *info],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 7
        assert "Unexpected" not in done.stderr
        assert "/run/qmpbackup" in done.stderr


def test_over_tcp_paths_are_ours_and_not_relative_to_qemu(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    port = free_port()
    monitor = ("-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off")
    vm = start_qemu([Disk("vda", create(tmp_path / "a.qcow2", MIB))], args=monitor)
    arguments = ("--socket", f"tcp:127.0.0.1:{port}", "backup", "--level", "auto")
    (tmp_path / "scratch").mkdir()
    paths = ("--target", "target", "--scratch", "scratch")
    cli.run(*arguments, *paths, cwd=tmp_path).check()
    cli.run("verify", "--target", tmp_path / "target").check()
    assert not list((tmp_path / "scratch").iterdir())
    # QMP is UTF-8 throughout.
    for option in ("--target", "--scratch"):
        paths = ("--target", str(tmp_path / "target"), option, os.fsdecode(b"\xff"))
        (tmp_path / os.fsdecode(b"\xff")).mkdir(exist_ok=True)
        said = cli.run(*arguments, *paths, cwd=tmp_path).check(2)
        assert "UTF-8" in said.err
    assert vm.running


@pytest.mark.parametrize("program", ["qmpbackup", "qmprebase", "qmprestore"])
def test_every_command_helps(program: str) -> None:
    text = cli.run("--help", program=program).check().out
    commands = [line.split()[0] for line in text.splitlines() if line.startswith("    ")]
    for command in (each for each in commands if each.isalpha() and each.islower()):
        if cli.run(command, "--help", program=program).code:
            continue  # a word of a description
        options = cli.run(command, "--help", program=program).check().out
        assert "--help" in options


def test_json_is_one_object_a_line(vm: Qemu, tmp_path: Path) -> None:
    target = tmp_path / "target"
    for arguments in (
        backup(vm, target, "--dry-run", "--json"),
        backup(vm, target, "--json"),
        ("--socket", vm.socket, "doctor", "--json"),
        ("list", "--target", target, "--json"),
        ("show", "--target", target, "--json"),
        ("verify", "--target", target, "--json"),
        ("restore", "--target", target, "--output", tmp_path / "out", "--json"),
    ):
        objects = cli.run(*arguments).check().objects
        assert objects
        assert all(each["schema"] == 1 and each["type"] for each in objects), arguments


def test_info_is_json(vm: Qemu, tmp_path: Path) -> None:
    cli.run(*backup(vm, tmp_path / "target")).check()
    shown = cli.run("--socket", vm.socket, "info", "--show", "blockdev").check().out
    assert json.loads(shown)["id"] == "vda"


def test_what_is_made_is_for_its_owner_alone(vm: Qemu, tmp_path: Path) -> None:
    log = tmp_path / "log"
    cli.run("--logfile", log, *backup(vm, tmp_path / "target")).check()
    cli.run("restore", "--target", tmp_path / "target", "--output", tmp_path / "out").check()
    assert log.read_text()
    files = [path for path in (tmp_path / "target").rglob("*") if path.is_file()]
    for path in (*files, tmp_path / "out" / "vda.qcow2"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path

# SPDX-License-Identifier: Apache-2.0
"""Drills of machines that show nothing, or whose points are damaged. Those of a Linux are in `guest/`."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from lab import cli
from lab.backups import back_up
from lab.disks import MIB, Disk, create, pattern
from lab.patience import wait_until
from lab.qemu import HALT, Firmware, Qemu

RESET = HALT[:-16] + b"\xb0\xfe\xe6\x64\xf4\xeb\xfd" + HALT[:9]
"""A ROM that resets the machine by its keyboard controller."""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A point of a VM that shows nothing, which still runs no more."""
    (tmp_path / "rom").write_bytes(HALT)
    disk = Disk("vda", create(tmp_path / "vda", 4 * MIB, contents=pattern(4 * MIB, 1)))
    with Qemu([disk], args=("-bios", str(tmp_path / "rom")), firmware=None) as vm:
        back_up(vm, tmp_path / "target")
    return tmp_path / "target"


def drill(target: Path, *more: cli.Argument) -> cli.Result:
    """A drill of the newest point."""
    env = {**os.environ, "XDG_STATE_HOME": str(target.parent / "state")}
    return cli.run("drill", "--target", target, "--json", *more, env=env)


def folder_of(target: Path) -> Path | None:
    """The folder of a drill of this target."""
    for journal in Path("/var/tmp").glob("qmpb-drill-*/boot.json"):
        with suppress(OSError):
            if str(target) in journal.read_text():
                return journal.parent
    return None


def processes(folder: Path) -> list[Path]:
    """What runs (in /proc) for a drill, but for servers, which end by themselves when nobody is there."""
    found = []
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            words = (process / "cmdline").read_bytes()
            if os.fsencode(folder) in words and b"serve" not in words.split(b"\0"):
                found.append(process)
    return found


def environment_of_the_machine(folder: Path) -> bytes:
    """What the machine of a drill is told; empty while there is none, or only what it is started by."""
    for process in processes(folder):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"-sandbox" in words and words[0] not in {b"env", b"unshare", b"setpriv"}:
                return (process / "environ").read_bytes()
    return b""


def made(folder: Path, *args: str, firmware: Firmware | None = None) -> Path:
    """A point of a VM that is started so, with an empty disk."""
    disk = Disk("vda", create(folder / "vda", 4 * MIB))
    with Qemu([disk], args=args, firmware=firmware) as vm:
        back_up(vm, folder / "target")
    return folder / "target"


def test_a_machine_that_resets_itself_again_and_again_fails(tmp_path: Path) -> None:
    rom = tmp_path / "rom"
    rom.write_bytes(HALT)
    target = made(tmp_path, "-bios", str(rom), "-no-reboot")
    rom.write_bytes(RESET)
    found = drill(target).check(1).objects[0]
    assert "reset itself" in found["reason"]


def test_a_machine_without_a_system_fails_and_its_screen_is_kept(tmp_path: Path) -> None:
    target = made(tmp_path, "-device", "VGA", firmware="seabios")
    found = drill(target).check(1).objects[0]
    assert "No bootable device" in found["reason"]
    assert Path(found["screenshot"]).read_bytes().startswith(b"\x89PNG")
    assert Path(found["screenshot"]).stat().st_mode & 0o777 == 0o600


def test_a_machine_writes_no_more_than_it_may(target: Path) -> None:
    found = drill(target, "--room", "1").check(3).objects[0]
    assert "more than it may" in found["reason"]


def test_a_vm_that_shows_nothing_is_unknown_and_nothing_is_left(target: Path) -> None:
    found = drill(target, "--within", "1").check(3).objects[0]
    assert found["verdict"] == "unknown"
    (noted,) = drill(target, "--history").check().objects
    assert noted == found
    assert folder_of(target) is None


def test_a_drill_that_is_killed_leaves_no_machine_and_is_cleared_up(target: Path) -> None:
    env = {"XDG_STATE_HOME": str(target.parent / "state"), "RESTIC_PASSWORD": "not-for-guests"}
    with cli.start("drill", "--target", target, env=env) as running:
        wait_until(running.unless_over(lambda: folder_of(target)), "its folder")
        folder = folder_of(target)
        assert folder
        told = running.unless_over(lambda: environment_of_the_machine(folder))
        wait_until(told, "the machine")
        assert b"not-for-guests" not in told()
    wait_until(lambda: not processes(folder), "the end of the machine")
    assert folder.exists()
    drill(target, "--within", "1").check(3)
    assert not folder.exists()


def test_a_damaged_point_is_no_success(target: Path) -> None:
    (file,) = (target / "vda").glob("FULL-*")
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size - 1000)
        opened.write(b"damage")
    result = drill(target).check(8)
    assert "damaged" in result.err
    (noted,) = drill(target, "--history").check().objects
    assert noted["verdict"] == "fail"

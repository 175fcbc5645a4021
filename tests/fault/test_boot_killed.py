# SPDX-License-Identifier: Apache-2.0
"""`boot` and `drill` are killed before any of their steps on files: the next one does all there is to do."""

import itertools
import os
import signal
from pathlib import Path

import pytest

from lab import cli
from lab.booted import Booted, point_that_halts
from lab.file_steps import signalled
from lab.patience import wait_until

DONE, LOCKED, UNKNOWN = 0, 11, 3
SPREAD = 7
"""Without the slow tests, one step of so many is tried."""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A point of a VM that is no more."""
    return point_that_halts(tmp_path)


def drills(target: Path) -> list[Path]:
    """Folders of drills of this target."""
    journals = Path("/var/tmp").glob("qmpb-drill-*/boot.json")
    return [each.parent for each in journals if each.exists() and str(target) in each.read_text()]


def machines(folder: Path) -> list[str]:
    """Processes of a QEMU that has something in a folder."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if b"-blockdev" in words and os.fsencode(folder) in words:
            found.append(process.name)
    return found


@pytest.mark.parametrize(
    "every", [SPREAD, pytest.param(1, marks=pytest.mark.slow)], ids=["a spread", "all"]
)
def test_a_boot_that_is_killed_before_a_file_step(target: Path, every: int) -> None:
    env = {"XDG_STATE_HOME": str(target.parent / "state")}
    folder = target.parent / "booted"
    for step in itertools.count(every, every):
        boot = ("boot", "--target", target, "--to", folder, "--json")
        with signalled(signal.SIGKILL, step, *boot, env=env) as running:
            was_killed = running.wait().code == -signal.SIGKILL
        result = cli.run(*boot, env=env)
        while result.code == LOCKED:  # what the killed one has started is just beginning
            result = cli.run(*boot, env=env)
        vm = Booted(result.check(DONE).objects[0])
        wait_until(vm.socket.exists, "the VM")
        vm.await_running()
        vm.disconnect()
        cli.run("boot", "--end", env=env).check()
        vm.assert_gone()
        assert cli.run("boot", "--list", env=env).check().out == ""
        if not was_killed:
            return


@pytest.mark.parametrize(
    "every", [SPREAD, pytest.param(1, marks=pytest.mark.slow)], ids=["a spread", "all"]
)
def test_a_drill_that_is_killed_before_a_file_step(target: Path, every: int) -> None:
    env = {"XDG_STATE_HOME": str(target.parent / "state")}
    drill = ("drill", "--target", target, "--within", "1", "--json")
    for step in itertools.count(every, every):
        with signalled(signal.SIGKILL, step, *drill, env=env) as running:
            code = running.wait().code
        for folder in drills(target):
            wait_until(lambda: not machines(folder), "the end of the machine")  # noqa: B023
        if code != -signal.SIGKILL:
            assert code == UNKNOWN
            break
    cli.run(*drill, env=env).check(UNKNOWN)
    assert drills(target) == []
    noted = cli.run("drill", "--history", "--json", env=env).check().objects
    assert {each["verdict"] for each in noted} == {"unknown"}

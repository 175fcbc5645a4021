# SPDX-License-Identifier: Apache-2.0
"""The tool is killed before any of its steps on a file system, and nothing is lost or left behind.

The steps count themselves: runs are killed at their first, second, third … until one survives.
"""

import signal
from pathlib import Path

import pytest

from lab.aftermath import assert_clean, manifests
from lab.cli import Result
from lab.file_steps import signalled
from stock.scene import KINDS, WHERE, Scene, Where, scene

RUNS_PER_TARGET = 8


@pytest.mark.parametrize(("where", "step"), [("directory", 2), ("repository", 4)])
def test_killed_before_some_file_steps(tmp_path: Path, where: Where, step: int) -> None:
    assert kill_until_one_survives(tmp_path, where, "inc", step) > 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", WHERE)
def test_killed_before_every_file_step(tmp_path: Path, where: Where, kind: str) -> None:
    assert kill_until_one_survives(tmp_path, where, kind, step=1) > 10


def kill_until_one_survives(folder: Path, where: Where, kind: str, step: int) -> int:
    """Kill runs at every `step`-th file step; return how many were killed."""
    with scene(folder, where) as stage:
        kills = 0
        killed = True
        while killed:
            if kind == "first" or kills % RUNS_PER_TARGET == 0:
                stage.renew(kind)
            stage.write()
            killed = run_killed(stage, kind, 1 + step * kills)
            kills += killed
            try:
                stage.make_good(kind)
            except BaseException as error:
                error.add_note(f"{kind} run killed before file step {1 + step * (kills - killed)}")
                raise
    print(f"{kind}: killed {kills} times, before every {step}. file step")
    return kills


@pytest.mark.parametrize(("where", "step"), [("directory", 4), ("repository", 6)])
def test_interrupted_before_file_steps(tmp_path: Path, where: Where, step: int) -> None:
    """A run that is told to end leaves nothing, whatever it was doing; one that had made its point
    may say so."""
    with scene(tmp_path, where) as stage:
        stage.renew("inc")
        interrupted = 0
        for number in range(1, 10000, step):
            stage.write()
            before = len(manifests(stage.place))
            result = run_signalled(stage, "inc", signal.SIGTERM, number)
            made = len(manifests(stage.place)) - before
            assert (result.code, made) in {(143, 0), (0, 1)}, (number, result.err)
            assert_clean(stage.vm, stage.place)
            if result.code == 0 and "file step" in result.err:
                break
            interrupted += result.code == 143
        assert interrupted > 2
        stage.make_good("inc")


def run_killed(stage: Scene, kind: str, fatal: int) -> bool:
    """Run, and say whether the run was killed; else it must have succeeded."""
    result = run_signalled(stage, kind, signal.SIGKILL, fatal)
    assert result.code in {0, -signal.SIGKILL}, str(result)
    return result.code != 0


def run_signalled(stage: Scene, kind: str, number: signal.Signals, step: int) -> Result:
    """Run a backup that gets a signal before a step; one with fewer steps says so at its end."""
    arguments = stage.arguments(kind, stage.vm.socket)
    with signalled(number, step, *arguments, env=stage.environment) as running:
        return running.wait()

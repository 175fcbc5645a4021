# SPDX-License-Identifier: Apache-2.0
"""The watchdog's dealings with an agent that behaves as no real one can be made to at will."""

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.patience import PATIENCE
from lab.scripted import FakeAgent, ScriptedServer
from stock.doomed import DoomedRun


class SlowFreeze:
    """An agent whose freeze takes until `finish` is set."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.finish = threading.Event()
        self.agent = FakeAgent(self._answer)

    def _answer(self, command: str) -> dict[str, Any] | None:
        if command == "guest-fsfreeze-freeze":
            self.begun.set()
            assert self.finish.wait(PATIENCE)
        return None


@pytest.fixture
def agent() -> FakeAgent:
    return FakeAgent()


@pytest.fixture
def run(agent: FakeAgent, tmp_path: Path) -> Iterator[DoomedRun]:
    with ScriptedServer(tmp_path / "qga", agent.serve), DoomedRun(None, tmp_path / "qga") as doomed:
        yield doomed


def freeze(run: DoomedRun) -> None:
    """As the product does it."""
    assert run("arm_freeze", 2 * PATIENCE) is None
    assert run("agent", "freeze", PATIENCE) == 2


def test_guest_is_thawed_after_the_run_was_killed(run: DoomedRun, agent: FakeAgent) -> None:
    freeze(run)
    assert agent.frozen
    run.kill()
    agent.wait(lambda: not agent.frozen)


def test_a_freeze_still_under_way_when_the_run_dies_is_undone(tmp_path: Path) -> None:
    slow = SlowFreeze()
    server = ScriptedServer(tmp_path / "qga", slow.agent.serve)
    with server, DoomedRun(None, tmp_path / "qga") as run:
        assert run("arm_freeze", 2 * PATIENCE) is None
        run.tell("agent", "freeze", PATIENCE)
        assert slow.begun.wait(PATIENCE)
        run.kill()
        slow.finish.set()
        slow.agent.wait(
            lambda: slow.agent.log[-2:] == ["guest-fsfreeze-thaw", "guest-fsfreeze-status"]
        )
        assert not slow.agent.frozen


def test_guest_is_thawed_at_the_time_limit_while_the_run_is_stopped(
    run: DoomedRun, agent: FakeAgent
) -> None:
    freeze(run)
    assert run("arm_freeze", 0.3) is None
    run.signal(signal.SIGSTOP)
    agent.wait(lambda: not agent.frozen)
    run.signal(signal.SIGCONT)
    assert run("agent", "thaw") == 0, "the run must see that its freeze did not last"
    assert run("disarm_freeze").startswith("QuiesceError: The watchdog had to step in")


def test_half_a_command_does_not_hinder(run: DoomedRun, agent: FakeAgent) -> None:
    freeze(run)
    run("raw", "agent", '{"execute": "guest-fsfreeze-th')
    run.kill()
    agent.wait(lambda: not agent.frozen)


def test_freeze_of_somebody_else_is_left_alone(run: DoomedRun, agent: FakeAgent) -> None:
    freeze(run)
    assert run("agent", "thaw") == 2
    assert run("disarm_freeze") is None
    agent.frozen = True
    assert run("close") is None
    run.kill()
    assert "guest-fsfreeze-thaw" not in agent.log[agent.log.index("guest-fsfreeze-thaw") + 2 :]
    assert agent.frozen


def test_time_limit_moves(run: DoomedRun, agent: FakeAgent) -> None:
    freeze(run)
    assert run("arm_freeze", 0.1) is None
    agent.wait(lambda: not agent.frozen)


def test_run_that_gives_up_gets_its_guest_back(run: DoomedRun, agent: FakeAgent) -> None:
    freeze(run)
    assert run("close") is None
    agent.wait(lambda: not agent.frozen)


def test_output_of_a_killed_run_ends_while_the_watchdog_still_works(tmp_path: Path) -> None:
    slow = SlowFreeze()
    server = ScriptedServer(tmp_path / "qga", slow.agent.serve)
    with server, DoomedRun(None, tmp_path / "qga") as run:
        assert run("arm_freeze", 2 * PATIENCE) is None
        run.tell("agent", "freeze", PATIENCE)
        assert slow.begun.wait(PATIENCE)
        run.kill()
        assert run.rest_of_output() == b""
        slow.finish.set()
        slow.agent.wait(lambda: "guest-fsfreeze-thaw" in slow.agent.log)

# SPDX-License-Identifier: Apache-2.0
"""Looking at a VM under drill whose guest lies: whatever it says or does not say, there is a verdict in time."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab.scripted import FakeAgent, FakeMonitor, ScriptedServer
from qmpbackup.machine.monitor import Monitor
from qmpbackup.plan.booting import Launch
from qmpbackup.plan.verdict import BootVerdict
from qmpbackup.process import Child
from qmpbackup.service.drill_looks import Looks

Answer = Callable[[str], dict[str, Any] | None]


@contextmanager
def looking(answer: Answer | None = None, console: bytes = b"") -> Iterator[Looks]:
    """Looks at a VM whose agent answers so."""
    with tempfile.TemporaryDirectory(prefix="qmpb-") as name:
        folder = Path(name)
        (folder / "serial0.log").write_bytes(console)
        launch = Launch((), agent=str(folder / "agent"), consoles=(str(folder / "serial0.log"),))
        monitor = FakeMonitor(lambda _: {"return": {}})
        with (
            ScriptedServer(folder / "qmp", monitor.serve),
            ScriptedServer(folder / "agent", FakeAgent(answer).serve),
            Monitor.connect(str(folder / "qmp")) as connected,
            Child(["sleep", "infinity"]) as child,
            closing(Looks(launch, child, connected, folder)) as looks,
        ):
            while not looks.observe().agent:
                pass
            yield looks


def ended(state: object) -> Answer:
    """An agent that has begun a command, and says this of its end."""
    return lambda name: {"return": {"pid": 1} if name == "guest-exec" else state}


@pytest.mark.parametrize(
    ("state", "verdict"),
    [
        ({"exited": True, "exitcode": 0}, BootVerdict.PASS),
        ({"exited": True, "exitcode": 3}, BootVerdict.FAIL),
        ({"exited": True, "signal": 9}, BootVerdict.FAIL),
        ({"exited": True, "exitcode": "0"}, BootVerdict.FAIL),
        ({"exited": True, "exitcode": [0]}, BootVerdict.FAIL),
        ({"exited": True, "exitcode": None, "signal": {}}, BootVerdict.FAIL),
        ({"exited": {}, "exitcode": 1e400}, BootVerdict.UNKNOWN),
    ],
)
def test_what_became_of_a_command(state: object, verdict: BootVerdict) -> None:
    with looking(ended(state)) as looks:
        found, _ = looks.carry_out(["true"], "it answers", 1.0)
        assert found is verdict


def test_an_agent_that_refuses_proves_nothing() -> None:
    refusal = {"error": {"class": "GenericError", "desc": "\x1b[2J" * 1000}}
    with looking(lambda _: refusal) as looks:
        assert looks.carry_out(["true"], "it answers")[0] is BootVerdict.UNKNOWN
        assert looks.system() == ""


@pytest.mark.parametrize("name", ["x" * 100_000, ["a"], {"b": 1}, None])
def test_the_name_of_a_system_is_short_whatever_it_is(name: object) -> None:
    with looking(lambda _: {"return": {"pretty-name": name}}) as looks:
        assert len(looks.system()) <= 200


def test_of_an_endless_console_the_end_is_read() -> None:
    with looking(console=b"\xff\x00endless " * 1_000_000 + b"\nvm login: ") as looks:
        seen = looks.observe()
    assert len(seen.console) < 1_000_000
    assert seen.console.endswith("\nvm login: ")

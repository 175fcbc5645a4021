# SPDX-License-Identifier: Apache-2.0
"""The guest agent's client against agents that are stale, hostile, silent, or not agents at all."""

import json
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.patience import PATIENCE
from lab.scripted import FakeAgent, ScriptedServer
from qmpbackup import interrupt
from qmpbackup.errors import GuestStateUnknown, Interrupted, QuiesceError, UsageError
from qmpbackup.machine.agent import Agent


@pytest.fixture
def address(tmp_path: Path) -> Path:
    return tmp_path / "qga"


def sync_id(connection: socket.socket) -> int:
    """Read one sync and return its number."""
    data = b""
    while not data.endswith(b"\n"):
        data += connection.recv(65536)
    line = data.lstrip(b"\xff").splitlines()[0]
    number: int = json.loads(line)["arguments"]["id"]
    return number


def swallow(client: socket.socket) -> None:
    """Read on and say nothing."""
    while client.recv(65536):
        pass


def refused(command: str, error: object) -> Callable[[str], dict[str, Any] | None]:
    """An agent's answers where one command is refused."""
    return lambda name: {"error": error} if name == command else None


def answers(command: str, value: object) -> Callable[[str], dict[str, Any] | None]:
    """An agent's answers where one command returns something of its own."""
    return lambda name: {"return": value} if name == command else None


def test_freezes_and_thaws(address: Path) -> None:
    fake = FakeAgent()
    with ScriptedServer(address, fake.serve):
        agent = Agent.connect(str(address))
        assert not agent.frozen()
        assert agent.freeze(5) == 2
        assert agent.frozen()
        assert agent.thaw() == 2
        assert agent.thaw() == 0
        agent.close()


def test_nobody_there(address: Path) -> None:
    with pytest.raises(QuiesceError, match="no socket"):
        Agent.connect(str(address))
    address.touch()
    with pytest.raises(QuiesceError, match="is a file, not a socket"):
        Agent.connect(str(address))
    address.unlink()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(address))
    with pytest.raises(QuiesceError, match="Nobody listens"):
        Agent.connect(str(address))
    with pytest.raises(UsageError):
        Agent.connect("tcp:localhost")


def test_silence_names_the_two_usual_reasons(address: Path) -> None:
    with ScriptedServer(address, swallow), pytest.raises(QuiesceError) as caught:
        Agent.connect(str(address), timeout=0.2)
    assert "does not answer" in caught.value.message
    assert "runs in the guest" in caught.value.hint
    assert "one at a time" in caught.value.hint


def test_second_client_of_an_agent_is_told(address: Path) -> None:
    with ScriptedServer(address, FakeAgent().serve):
        first = Agent.connect(str(address))
        with pytest.raises(QuiesceError, match="does not answer"):
            Agent.connect(str(address), timeout=0.2)
        first.close()
        Agent.connect(str(address)).close()


def test_replies_to_an_earlier_client_are_dropped(address: Path) -> None:
    def serve(client: socket.socket) -> None:
        client.sendall(b'{"return": 17}\n\n{"retu\xff{"return": 4}\n{"error": {}}\nnonsense\n')
        client.sendall(b'{"return": %d}\n' % sync_id(client))
        client.sendall(b'\xff{"return": %d}\n{"return": "thawed"}\n' % sync_id(client))
        swallow(client)

    with ScriptedServer(address, serve):
        agent = Agent.connect(str(address))
        assert not agent.frozen()
        agent.close()


def test_answer_that_comes_byte_by_byte(address: Path) -> None:
    def serve(client: socket.socket) -> None:
        for byte in b'\xff{"return": %d}\n' % sync_id(client):
            client.sendall(bytes([byte]))
        swallow(client)

    with ScriptedServer(address, serve):
        Agent.connect(str(address)).close()


def endless_garbage(client: socket.socket) -> None:
    while True:
        client.sendall(b"garbage\n" * 512)


def endless_line(client: socket.socket) -> None:
    while True:
        client.sendall(b"x" * 65536)


def endless_numbers(client: socket.socket) -> None:
    while True:
        client.sendall(b'{"return": 1}\n' * 512)


def deep_nesting(client: socket.socket) -> None:
    client.sendall(b"[" * 100_000 + b"\n")
    endless_garbage(client)


@pytest.mark.parametrize("serve", [endless_garbage, endless_line, endless_numbers, deep_nesting])
def test_endless_nonsense_is_cut_off(address: Path, serve: Callable[..., None]) -> None:
    with ScriptedServer(address, serve), pytest.raises(QuiesceError, match="protocol"):
        Agent.connect(str(address), timeout=20)


def test_monitor_instead_of_agent(address: Path) -> None:
    def serve(client: socket.socket) -> None:
        client.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\n')
        swallow(client)

    with ScriptedServer(address, serve), pytest.raises(QuiesceError, match="QMP monitor"):
        Agent.connect(str(address))


@pytest.mark.parametrize("sent", [b"", b'\xff{"return"'])
def test_closed_connection(address: Path, sent: bytes) -> None:
    with (
        ScriptedServer(address, lambda client: client.sendall(sent)),
        pytest.raises(QuiesceError, match="was closed"),
    ):
        Agent.connect(str(address), timeout=20)


@pytest.mark.parametrize(
    "reply",
    [b"[]", b"7", b"null", b"{}", b'{"return": 1, "error": {}}', b"\x00\x01", b'{"return": '],
)
def test_reply_that_is_none(address: Path, reply: bytes) -> None:
    def serve(client: socket.socket) -> None:
        client.sendall(b'{"return": %d}\n' % sync_id(client))
        client.sendall(b'{"return": %d}\n%b\n' % (sync_id(client), reply))
        swallow(client)

    with ScriptedServer(address, serve):
        agent = Agent.connect(str(address))
        with pytest.raises(QuiesceError, match="protocol"):
            agent.frozen()
        agent.close()


@pytest.mark.parametrize("value", [None, 1, True, [], {}, "", "FROZEN", "frozen\n"])
def test_state_that_does_not_exist(address: Path, value: object) -> None:
    fake = FakeAgent(answers("guest-fsfreeze-status", value))
    with ScriptedServer(address, fake.serve):
        agent = Agent.connect(str(address))
        with pytest.raises(QuiesceError, match="state"):
            agent.frozen()
        agent.close()


@pytest.mark.parametrize("value", [None, -1, True, 1.5, "2", [], {}, 0])
def test_freeze_that_reports_no_count_is_undone(address: Path, value: object) -> None:
    fake = FakeAgent(answers("guest-fsfreeze-freeze", value))
    fake.frozen = True
    with ScriptedServer(address, fake.serve):
        agent = Agent.connect(str(address))
        with pytest.raises(QuiesceError) as caught:
            agent.freeze(5)
        assert not isinstance(caught.value, GuestStateUnknown)
        agent.close()
    assert not fake.frozen


def test_freeze_that_failed_is_undone(address: Path) -> None:
    error = {"class": "GenericError", "desc": "failed to freeze /mnt:\n\x1b[2J no"}
    fake = FakeAgent(refused("guest-fsfreeze-freeze", error))
    with ScriptedServer(address, fake.serve):
        agent = Agent.connect(str(address))
        with pytest.raises(QuiesceError) as caught:
            agent.freeze(5)
        agent.close()
    assert "failed to freeze /mnt: ?[2J no" in caught.value.message, "fit for a terminal"
    assert fake.log[-2:] == ["guest-fsfreeze-thaw", "guest-fsfreeze-status"]


@pytest.mark.parametrize(
    "error",
    [
        {"class": "CommandNotFound", "desc": "The command guest-fsfreeze-freeze has been disabled"},
        {"class": "GenericError", "desc": "Command guest-fsfreeze-freeze has been disabled"},
    ],
)
def test_disabled_command_is_told_from_a_failing_one(address: Path, error: object) -> None:
    with ScriptedServer(address, FakeAgent(refused("guest-fsfreeze-freeze", error)).serve):
        agent = Agent.connect(str(address))
        with pytest.raises(QuiesceError) as caught:
            agent.freeze(5)
        agent.close()
    assert "block-rpcs" in caught.value.hint


@pytest.mark.parametrize("error", [None, 7, [], {}, {"desc": None}, {"class": [], "desc": {}}])
def test_error_without_a_reason(address: Path, error: object) -> None:
    with ScriptedServer(address, FakeAgent(refused("guest-fsfreeze-status", error)).serve):
        agent = Agent.connect(str(address))
        with pytest.raises(QuiesceError, match="refused guest-fsfreeze-status"):
            agent.frozen()
        agent.close()


class Reluctant:
    """An agent that is done with a freeze only when the client has sent something else."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.finish = threading.Event()
        self.fake = FakeAgent(self._answer)

    def _answer(self, command: str) -> dict[str, Any] | None:
        if command == "guest-fsfreeze-freeze":
            self.begun.set()
            assert self.fake.client
            self.fake.client.recv(1, socket.MSG_PEEK)
            assert self.finish.wait(PATIENCE)
        return None


def test_freeze_that_takes_too_long_is_thawed_when_it_happens(address: Path) -> None:
    slow = Reluctant()
    slow.finish.set()
    with ScriptedServer(address, slow.fake.serve):
        agent = Agent.connect(str(address))
        with pytest.raises(QuiesceError, match="does not answer") as caught:
            agent.freeze(0.1)
        assert not isinstance(caught.value, GuestStateUnknown)
        assert not slow.fake.frozen
        assert not agent.frozen()
        agent.close()


def test_agent_that_hangs_in_a_freeze_leaves_the_outcome_unknown(address: Path) -> None:
    slow = Reluctant()
    with ScriptedServer(address, slow.fake.serve):
        agent = Agent.connect(str(address))
        with pytest.raises(GuestStateUnknown, match="not known"):
            agent.freeze(0.1, settle=0.1)
        slow.finish.set()
        slow.fake.wait(lambda: slow.fake.log[-1:] == ["guest-fsfreeze-status"])
        assert not slow.fake.frozen, "the thaw was queued behind the freeze"
        agent.close()


def test_signal_ends_the_wait_for_a_freeze_and_thaws(address: Path) -> None:
    slow = Reluctant()
    slow.finish.set()

    def interrupt_it(thread: int) -> None:
        assert slow.begun.wait(PATIENCE)
        signal.pthread_kill(thread, signal.SIGTERM)

    with ScriptedServer(address, slow.fake.serve), interrupt.held():
        agent = Agent.connect(str(address))
        threading.Thread(target=interrupt_it, args=[threading.get_ident()]).start()
        with pytest.raises(Interrupted):
            agent.freeze(30)
        assert not slow.fake.frozen
        agent.close()


def test_thaw_that_is_not_confirmed(address: Path) -> None:
    fake = FakeAgent(answers("guest-fsfreeze-status", "frozen"))
    with ScriptedServer(address, fake.serve):
        agent = Agent.connect(str(address))
        with pytest.raises(GuestStateUnknown, match="still frozen"):
            agent.thaw()
        agent.close()


def test_freeze_that_the_guest_ended_by_itself_counts_as_not_frozen(address: Path) -> None:
    error = {"class": "GenericError", "desc": "fsfreeze is limited up to 10 seconds"}
    with ScriptedServer(address, FakeAgent(refused("guest-fsfreeze-thaw", error)).serve):
        agent = Agent.connect(str(address))
        assert agent.thaw() == 0
        agent.close()


def test_agent_that_goes_away_while_frozen(address: Path) -> None:
    def answer(command: str) -> dict[str, Any] | None:
        if command == "guest-fsfreeze-thaw":
            raise ConnectionError
        return None

    with ScriptedServer(address, FakeAgent(answer).serve):
        agent = Agent.connect(str(address))
        assert agent.freeze(5) == 2
        with pytest.raises(GuestStateUnknown):
            agent.thaw()
        agent.close()

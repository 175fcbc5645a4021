# SPDX-License-Identifier: Apache-2.0
"""The monitor against servers that are silent, hostile, or no monitors: exit 6 and never a hang."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab.scripted import FakeAgent, FakeMonitor, ScriptedServer
from qmpbackup.errors import (
    CommandError,
    CommandTimeout,
    ConnectError,
    ConnectionLost,
    MonitorBusy,
    MonitorProtocolError,
    OutcomeUnknown,
    UsageError,
    VmError,
)
from qmpbackup.machine.monitor import Monitor
from qmpbackup.plan.commands import Command

ASK = Command("query-status")


@pytest.fixture
def address(tmp_path: Path) -> Path:
    return tmp_path / "qmp"


def swallow(client: socket.socket) -> None:
    """Read on and say nothing."""
    while client.recv(65536):
        pass


def say(data: bytes) -> Callable[[socket.socket], None]:
    """A server that says one thing and then listens."""

    def serve(client: socket.socket) -> None:
        client.sendall(data)
        swallow(client)

    return serve


def repeat(data: bytes) -> Callable[[socket.socket], None]:
    """A server that says one thing for ever."""

    def serve(client: socket.socket) -> None:
        while True:
            client.sendall(data)

    return serve


@contextmanager
def monitor(address: Path, answer: Callable[[str], dict[str, Any] | bytes]) -> Iterator[Monitor]:
    """A session with a server that greets as QEMU does and answers as the test says."""
    with ScriptedServer(address, FakeMonitor(answer).serve), Monitor.connect(str(address)) as it:
        yield it


def test_nobody_there(address: Path) -> None:
    with pytest.raises(ConnectError, match="no socket"):
        Monitor.connect(str(address))
    address.touch()
    with pytest.raises(ConnectError, match="is a file, not a socket"):
        Monitor.connect(str(address))
    address.unlink()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(address))
    with pytest.raises(ConnectError, match="Nobody listens"):
        Monitor.connect(str(address))


def test_a_socket_whose_queue_is_full(address: Path) -> None:
    """QEMU's has room for one."""
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as waiting:
        listener.bind(str(address))
        listener.listen(0)
        waiting.enter_context(socket.socket(socket.AF_UNIX)).connect(str(address))
        with pytest.raises(MonitorBusy, match="others wait there already"):
            Monitor.connect(str(address), timeout=0.2)


@pytest.mark.parametrize(
    "bad", ["tcp:", "tcp:localhost", "tcp:localhost:", "tcp::4444", "tcp:h:x", "tcp:h:65536"]
)
def test_address_of_no_form(bad: str) -> None:
    with pytest.raises(UsageError, match="tcp:HOST:PORT"):
        Monitor.connect(bad)


@pytest.mark.parametrize(
    "bad", ["", "x" * 200, "a\0b", "unix:", "tcp:\0:1", "tcp:a..b:1", "tcp:é:1"]
)
def test_address_where_nothing_can_be(bad: str) -> None:
    with pytest.raises(ConnectError):
        Monitor.connect(bad)


def test_monitor_held_by_another_client(address: Path) -> None:
    with monitor(address, lambda _: {"return": {}}), pytest.raises(MonitorBusy) as caught:
        Monitor.connect(str(address), timeout=0.2)
    assert "Another client holds it" in caught.value.hint


def test_closes_at_once(address: Path) -> None:
    with ScriptedServer(address, lambda _: None), pytest.raises(ConnectError, match="closed"):
        Monitor.connect(str(address))


@pytest.mark.parametrize(
    "greeting",
    [
        b"garbage\n",
        b"\xff\xfe\x00\n",
        b"7\n",
        b"[]\n",
        b"{}\n",
        b'{"QMP": []}\n',
        b'{"QMP": {}}\n',
        b'{"QMP": {"version": [], "capabilities": []}}\n',
        b'{"QMP": {"version": {}, "capabilities": 3}}\n',
        b'{"event": "RESUME"}\n',
        b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) \n",
        b"[" * 100_000 + b"\n",
        b"x" * 2_000_000 + b"\n",
        b"9" * 10_000 + b"\n",
    ],
)
def test_greeting_that_is_none(address: Path, greeting: bytes) -> None:
    with ScriptedServer(address, say(greeting)), pytest.raises(MonitorProtocolError):
        Monitor.connect(str(address), timeout=20)


@pytest.mark.parametrize(
    "version",
    [b"{}", b'{"qemu": 7}', b'{"qemu": {"major": "7"}}', b'{"qemu": {"major": -7, "minor": 2}}'],
)
def test_version_that_is_none(address: Path, version: bytes) -> None:
    greeting = b'{"QMP": {"version": %b, "capabilities": []}}\n{"return": {}}\n' % version
    with (
        ScriptedServer(address, say(greeting)),
        pytest.raises(MonitorProtocolError),
        Monitor.connect(str(address)) as it,
    ):
        assert it.version


@pytest.mark.parametrize("serve", [repeat(b"x" * 65536), repeat(b'{"event": "A"}\n' * 999)])
def test_endless_greeting(address: Path, serve: Callable[..., None]) -> None:
    with ScriptedServer(address, serve), pytest.raises(VmError):
        Monitor.connect(str(address), timeout=20)


def test_greeting_byte_by_byte_for_ever(address: Path) -> None:
    stop = threading.Event()

    def serve(client: socket.socket) -> None:
        while not stop.wait(0.01):
            client.sendall(b" ")

    with ScriptedServer(address, serve), pytest.raises(VmError):
        Monitor.connect(str(address), timeout=0.3)
    stop.set()


def test_guest_agent_instead_of_monitor(address: Path) -> None:
    with ScriptedServer(address, FakeAgent().serve), pytest.raises(MonitorBusy):
        Monitor.connect(str(address), timeout=0.2)


@pytest.mark.parametrize("reply", [b'{"error": {}}\n', b"{}\n", b"[]\n", b"garbage\n", b"7\n"])
def test_refused_negotiation(address: Path, reply: bytes) -> None:
    greeting = b'{"QMP": {"version": {}, "capabilities": []}}\n'
    with ScriptedServer(address, say(greeting + reply)), pytest.raises(MonitorProtocolError):
        Monitor.connect(str(address))


@pytest.mark.parametrize(
    "reply",
    [
        b"garbage\n",
        b"\xff\n",
        b"7\n",
        b"[]\n",
        b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\n',
        b'{"id": {}, "return": 1}\n',
        b'{"id": [], "return": 1}\n',
        b"[" * 100_000 + b"\n",
        b'{"return": ' + b"9" * 10_000 + b"}\n",
    ],
)
def test_reply_that_is_none(address: Path, reply: bytes) -> None:
    with monitor(address, lambda _: reply) as it:
        with pytest.raises((MonitorProtocolError, OutcomeUnknown)) as caught:
            it.execute(ASK, timeout=20)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000
        with pytest.raises(VmError):
            it.execute(ASK, timeout=20)


@pytest.mark.parametrize(
    "reply",
    [{}, {"error": None}, {"error": 7}, {"error": {}}, {"error": {"class": 1, "desc": []}}],
)
def test_reply_without_an_answer(address: Path, reply: dict[str, Any]) -> None:
    with monitor(address, lambda _: reply) as it:
        for _ in range(2):
            with pytest.raises(VmError) as caught:
                it.execute(ASK, timeout=20)
            assert not isinstance(caught.value, CommandError)


def test_refusal_carries_class_and_reason(address: Path) -> None:
    error = {"class": "DeviceNotFound", "desc": "no\x1b[2J\nsuch"}
    session = monitor(address, lambda _: {"error": error})
    with session as it, pytest.raises(CommandError) as caught:
        it.execute(ASK)
    assert caught.value.error_class == "DeviceNotFound"
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_line_that_is_too_long(address: Path) -> None:
    reply = b'{"return": "' + b"x" * (65 << 20) + b'"}\n'
    with monitor(address, lambda _: reply) as it, pytest.raises(VmError):
        it.execute(ASK, timeout=60)


def test_no_answer(address: Path) -> None:
    with monitor(address, lambda _: b"") as it:
        for _ in range(2):
            with pytest.raises(CommandTimeout, match="unknown"):
                it.execute(ASK, timeout=0.1)


@pytest.mark.parametrize("sent", [b"", b'{"retu'])
def test_connection_lost_before_the_answer(address: Path, sent: bytes) -> None:
    def answer(_: str) -> bytes:
        assert fake.client
        fake.client.sendall(sent)
        fake.client.shutdown(socket.SHUT_RDWR)
        return b""

    fake = FakeMonitor(answer)
    with ScriptedServer(address, fake.serve), Monitor.connect(str(address)) as it:
        for _ in range(2):
            with pytest.raises(ConnectionLost):
                it.execute(ASK, timeout=20)
        with pytest.raises(ConnectionLost):
            it.execute_all([ASK, ASK])
        with pytest.raises(ConnectionLost):
            it.wait_for_event(frozenset({"RESUME"}), 20)


def test_answers_to_nobody_are_dropped(address: Path) -> None:
    strays = b'{"id": "watchdog-1", "return": {}}\n{"id": "watchdog-2", "error": {}}\n'

    def answer(name: str) -> dict[str, Any] | bytes:
        return strays if name == "stop" else {"return": 5}

    with monitor(address, answer) as it:
        with pytest.raises(CommandTimeout):
            it.execute(Command("stop"), timeout=0.2)
        assert it.execute(ASK) == 5


@pytest.mark.parametrize(
    "event", [b'{"event": 7}\n', b'{"event": ["RESUME"]}\n', b'{"event": {}}\n']
)
def test_event_that_is_none(address: Path, event: bytes) -> None:
    with monitor(address, lambda _: event) as it:
        with pytest.raises(CommandTimeout):
            it.execute(ASK, timeout=0.2)
        with pytest.raises(MonitorProtocolError):
            it.wait_for_event(frozenset({"RESUME"}), 5)


def test_flood_of_events_does_not_outlast_the_time_limit(address: Path) -> None:
    def serve(client: socket.socket) -> None:
        client.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\n{"return": {}}\n')
        repeat(b'{"event": "NOISE"}\n' * 50)(client)

    with ScriptedServer(address, serve), Monitor.connect(str(address)) as it:
        assert it.wait_for_event(frozenset({"RESUME"}), 0.3) is None
        with pytest.raises(CommandTimeout):
            it.execute(ASK, timeout=0.3)

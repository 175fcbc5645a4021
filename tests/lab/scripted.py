# SPDX-License-Identifier: Apache-2.0
"""Servers that behave as a test says: for what no real QEMU or guest agent can be made to do."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lab.patience import PATIENCE


class ScriptedServer:
    """A unix socket server that serves one client at a time, in a thread. A context manager.

    `serve` gets the connection of each client; when it returns, the connection is closed. What
    `serve` raises because the client left is ignored.
    """

    def __init__(self, path: Path, serve: Callable[[socket.socket], None]) -> None:
        self.path = path
        self._serve = serve
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._client: socket.socket | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for each in (self._listener, self._client):
            if each is not None:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        self._thread.join(30)
        assert not self._thread.is_alive(), "the scripted server does not end"
        self._listener.close()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._client = client
                with client, suppress(OSError):
                    self._serve(client)


class FakeAgent:
    """A guest agent without a guest: the protocol and states of qemu-ga, and its misbehaviours.

    Serves through `ScriptedServer(path, agent.serve)`. `answer`, where given, is asked first for each
    command and returns the reply or `None` for the usual one; it may block to imitate a freeze that
    takes its time. `client` is the connection being served. `log` holds the commands in the order of their execution.
    """

    def __init__(self, answer: Callable[[str], dict[str, Any] | None] | None = None) -> None:
        self.frozen = False
        self.log: list[str] = []
        self.client: socket.socket | None = None
        self._answer = answer
        self._changed = threading.Condition()

    def serve(self, client: socket.socket) -> None:
        """One client, until it leaves. 0xFF and line ends delimit commands."""
        self.client = client
        rest = b""
        while data := client.recv(65536):
            *lines, rest = (rest + data).replace(b"\xff", b"\xff\n").split(b"\n")
            for line in filter(bytes.strip, lines):
                client.sendall(self._reply(line))

    def wait(self, condition: Callable[[], bool], timeout: float = PATIENCE) -> None:
        """Wait until a condition holds; it is looked at after every command."""
        with self._changed:
            assert self._changed.wait_for(condition, timeout), f"never happened; saw {self.log}"

    def _reply(self, line: bytes) -> bytes:
        try:
            request = json.loads(line)
        except ValueError:
            return b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\n'
        name = request["execute"]
        if name == "guest-sync-delimited":
            return b'\xff{"return": %d}\n' % request["arguments"]["id"]
        reply = self._answer(name) if self._answer else None
        with self._changed:
            reply = reply or {"return": self._execute(name)}
            self.log.append(name)
            self._changed.notify_all()
        return json.dumps(reply).encode() + b"\n"

    def _execute(self, name: str) -> object:
        before = self.frozen
        if name == "guest-fsfreeze-freeze":
            self.frozen = True
            return 2
        if name == "guest-fsfreeze-thaw":
            self.frozen = False
            return 2 if before else 0
        if name == "guest-fsfreeze-status":
            return "frozen" if self.frozen else "thawed"
        return {}


class FakeMonitor:
    """A QMP monitor without a VM, for replies that QEMU does not give.

    Serves through `ScriptedServer(path, monitor.serve)`. `answer` gets a command's name and returns
    what is sent for it: an object, which gets the command's id, or bytes, which are sent as they are.
    `client` is the connection being served.
    """

    def __init__(
        self,
        answer: Callable[[str], dict[str, Any] | bytes],
        version: tuple[int, int, int] = (7, 2, 22),
    ) -> None:
        self.client: socket.socket | None = None
        self._answer = answer
        qemu = dict(zip(("major", "minor", "micro"), version, strict=True))
        self._greeting = {"QMP": {"version": {"qemu": qemu, "package": ""}, "capabilities": []}}

    def serve(self, client: socket.socket) -> None:
        """One client, until it leaves."""
        self.client = client
        client.sendall(json.dumps(self._greeting).encode() + b"\n")
        for request in _objects(client):
            client.sendall(self._reply(request["execute"], request.get("id")))

    def _reply(self, name: str, number: object) -> bytes:
        answer = {"return": {}} if name == "qmp_capabilities" else self._answer(name)
        if isinstance(answer, bytes):
            return answer
        return json.dumps({**answer, "id": number}).encode() + b"\n"


class RenderedMonitor(FakeMonitor):
    """As `FakeMonitor`; `text` gives what stands behind "return", which need not be JSON."""

    def __init__(self, text: Callable[[str], bytes]) -> None:
        super().__init__(text)
        self._text = text

    def _reply(self, name: str, number: object) -> bytes:
        text = b"{}" if name == "qmp_capabilities" else self._text(name)
        return b'{"id": %b, "return": %b}\n' % (json.dumps(number).encode(), text)


def _objects(client: socket.socket) -> Iterator[dict[str, Any]]:
    """The JSON objects that a client sends, with or without something between them."""
    decoder, text = json.JSONDecoder(), ""
    while data := client.recv(65536):
        text += data.decode()
        with suppress(ValueError):
            while text := text.lstrip():
                value, end = decoder.raw_decode(text)
                text = text[end:]
                yield value

# SPDX-License-Identifier: Apache-2.0
"""A man in the middle of the monitor: every command of a run is seen, and things happen between.

The proxy passes a client's commands to QEMU one at a time, each after the answer to the one before,
with the descriptors that belong to them. So there is a well-defined place between any two commands,
and what is done there is done in exactly the state that the commands so far have made.
"""

import json
import os
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from lab.patience import PATIENCE

FLUSH = b"\xff"
_DESCRIPTORS = 16


class _Gone(Exception):
    """The client or QEMU has gone; none of the test's business."""


When = Literal["before", "after"]


@dataclass(frozen=True)
class Place:
    """A place in a run: before command `number` (from 0) is passed on, or after it was carried out
    and before its answer is passed back."""

    number: int
    when: When
    command: str


class Proxy:
    """Stands at `path` for the monitor at `upstream`, in a thread. A context manager.

    `hook` is called at every place of the run, in the proxy's thread. `log` holds the names of the
    commands in order, over all clients. A hook may set `answer` after a command: its answer is then
    replaced by what that function makes of it. What a hook raises ends the connection and is raised again
    at the end of the block.
    """

    def __init__(self, path: Path, upstream: Path, hook: Callable[["Proxy", Place], None]) -> None:
        self.path = path
        self.log: list[str] = []
        self.killed = False
        self.answer: Callable[[dict[str, Any]], bytes] | None = None
        self._upstream = upstream
        self._hook = hook
        self._failure: BaseException | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._wake, self._over = socket.socketpair()
        self._client: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="proxy")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._wake.close()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the proxy does not end"
        self._listener.close()
        self._over.close()
        self.path.unlink(missing_ok=True)
        if self._failure and error:
            error.add_note(f"In the proxy: {self._failure!r}")
        elif self._failure:
            raise self._failure

    # What a hook may do

    def kill_client(self) -> None:
        """SIGKILL the client and wait for its death. Of what it had sent, QEMU gets nothing more;
        what others write to the same connection afterwards, it gets."""
        assert self._client
        pid = _peer(self._client)
        death = os.pidfd_open(pid)
        self.killed = True
        os.kill(pid, signal.SIGKILL)
        select.select([death], [], [], 30)
        os.close(death)

    def signal_client(self, number: signal.Signals) -> None:
        """Send the client a signal."""
        assert self._client
        os.kill(_peer(self._client), number)

    def cut(self) -> None:
        """Close the connection between client and proxy."""
        assert self._client
        with suppress(OSError):
            self._client.shutdown(socket.SHUT_RDWR)

    # The thread

    def _run(self) -> None:
        try:
            while self._readable(self._listener):
                self._client, _ = self._listener.accept()
                # A QEMU that has died refuses; the client then sees its connection end.
                with (
                    self._client,
                    socket.socket(socket.AF_UNIX) as server,
                    suppress(_Gone, ConnectionRefusedError),
                ):
                    server.connect(str(self._upstream))
                    _Session(self, self._client, server).serve()
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            self._failure = error

    def _readable(self, *sockets: socket.socket) -> list[socket.socket]:
        """The sockets that something can be read from; empty when the proxy is to end."""
        ready, _, _ = select.select([*sockets, self._over], [], [])
        return [] if self._over in ready else ready


class _Session:
    """One client of the proxy."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._received = b""
        self._answered = b""
        self._descriptors: list[int] = []
        self._rescued = b""  # set once somebody else writes in a killed client's place
        self._waiting = ""

    def serve(self) -> None:
        try:
            # To the end of its last client, which is the watchdog of a run that failed.
            while ready := select.select([self._client, self._server], [], [])[0]:
                if self._server in ready and not self._from_server():
                    return
                if self._client in ready and not self._from_client():
                    return
        finally:
            for fd in self._descriptors:
                os.close(fd)

    def _from_client(self) -> bool:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._client, 65536, _DESCRIPTORS)
        except ConnectionError as error:
            raise _Gone from error
        self._descriptors += descriptors
        if not data:
            return False
        self._received += data
        self._pass_commands()
        return True

    def _pass_commands(self) -> None:
        """Pass on the next command, unless one is not answered yet."""
        while not self._waiting:
            if self._proxy.killed and not self._rescued:
                _, self._rescued, rest = self._received.partition(FLUSH)
                self._received = self._rescued + rest
            if self._proxy.killed and not self._rescued:
                self._received = b""
            found = _command(self._received)
            if found is None:
                return
            raw, message, self._received = found
            self._pass_command(raw, message)

    def _pass_command(self, raw: bytes, message: dict[str, Any]) -> None:
        name = str(message.get("execute"))
        number = len(self._proxy.log)
        self._proxy.log.append(name)
        self._proxy._hook(self._proxy, Place(number, "before", name))
        if self._proxy.killed and not self._rescued:
            return
        self._waiting = name
        try:
            if name in {"add-fd", "getfd"}:
                fd = self._descriptors.pop(0)
                socket.send_fds(self._server, [b" "], [fd])
                os.close(fd)
            self._server.sendall(raw)
        except OSError as error:
            raise _Gone from error

    def _from_server(self) -> bool:
        try:
            data = self._server.recv(65536)
        except ConnectionError as error:
            raise _Gone from error
        if not data:
            return False
        self._answered += data
        while b"\n" in self._answered:
            line, _, self._answered = self._answered.partition(b"\n")
            self._pass_answer(line + b"\n")
        return True

    def _pass_answer(self, line: bytes) -> None:
        message = json.loads(line)
        if self._waiting and ("return" in message or "error" in message):
            name, self._waiting = self._waiting, ""
            place = Place(len(self._proxy.log) - 1, "after", name)
            self._proxy._hook(self._proxy, place)
            if self._proxy.answer:
                line, self._proxy.answer = self._proxy.answer(message), None
        with suppress(OSError):  # the client may be gone; QEMU's answers are read all the same
            self._client.sendall(line)
        self._pass_commands()


def _command(data: bytes) -> tuple[bytes, dict[str, Any], bytes] | None:
    """The first whole command of a stream as it was written, parsed, and what follows it."""
    text = data.lstrip(b" \r\n\t\xff")
    if not text:
        return None
    for end in _ends(text):
        with suppress(ValueError):
            message = json.loads(text[:end])
            lead = data[: len(data) - len(text)].replace(b" ", b"")
            return lead + text[:end], message, text[end:]
    return None


def _ends(text: bytes) -> Iterator[int]:
    """Where a JSON object could end."""
    at = text.find(b"}")
    while at >= 0:
        yield at + 1
        at = text.find(b"}", at + 1)


def _peer(connection: socket.socket) -> int:
    """The process at the other end."""
    size = struct.calcsize("3i")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return int(struct.unpack("3i", credentials)[0])

# SPDX-License-Identifier: Apache-2.0
"""A small synchronous client for QMP and the guest agent, independent of the product's."""

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from lab.patience import PATIENCE

T = TypeVar("T")


class QmpError(AssertionError):
    """A command failed that the test needs. `error` is what QEMU answered."""

    def __init__(self, command: str, error: dict[str, Any]) -> None:
        super().__init__(f"{command}: {error.get('desc', error)}")
        self.error = error


class LineSocket:
    """Lines over a unix socket."""

    def __init__(self, path: Path, timeout: float = PATIENCE) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout)
        self._buffer = b""
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; harmless when repeated."""
        self._socket.close()

    def send_line(self, line: bytes) -> None:
        """Send one line."""
        self._socket.sendall(line + b"\n")

    def receive_line(self) -> bytes:
        """The next line.

        Raises:
            TimeoutError: none came in time.
            ConnectionError: the peer has gone.
        """
        while b"\n" not in self._buffer:
            chunk = self._socket.recv(65536)
            if not chunk:
                raise ConnectionError("the peer closed the connection")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


class JsonSocket(LineSocket):
    """JSON objects, one a line."""

    def send(self, message: dict[str, Any]) -> None:
        """Send one object."""
        self.send_line(json.dumps(message).encode())

    def receive(self) -> dict[str, Any]:
        """The next object."""
        # The agent puts 0xff before the answer to guest-sync-delimited.
        message: dict[str, Any] = json.loads(self.receive_line().lstrip(b"\xff"))
        return message

    def command(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """Send one command and return its result.

        Raises:
            QmpError: it failed.
        """
        self.send({"execute": name, "arguments": arguments or {}})
        while True:
            answer = self.receive()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise QmpError(name, answer["error"])
            self.note(answer)

    def note(self, message: dict[str, Any]) -> None:
        """Called with what is no answer."""


class Monitor(JsonSocket):
    """A QMP connection. Argument names are written with `_` for `-`.

    `events` holds every event since the connection was made, oldest first.
    """

    def __init__(self, path: Path, timeout: float = PATIENCE) -> None:
        super().__init__(path, timeout)
        self.events: list[dict[str, Any]] = []
        self.greeting = self.receive()
        self("qmp_capabilities")

    def __call__(self, name: str, **arguments: Any) -> Any:
        """Carry out a QMP command: `qmp("block-dirty-bitmap-add", node="n", name="b")`."""
        plain = {key.replace("_", "-"): value for key, value in arguments.items()}
        return self.command(name, plain)

    def note(self, message: dict[str, Any]) -> None:
        """Keep events."""
        self.events.append(message)

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's version."""
        qemu = self.greeting["QMP"]["version"]["qemu"]
        return qemu["major"], qemu["minor"], qemu["micro"]

    def hmp(self, line: str) -> str:
        """Carry out a line of the human monitor and return what it printed."""
        return str(self.command("human-monitor-command", {"command-line": line}))

    def wait_event(self, name: str, timeout: float = PATIENCE) -> dict[str, Any]:
        """The first event of this name since the connection was made, waiting where needed."""

        def seen() -> dict[str, Any] | None:
            return next((event for event in self.events if event["event"] == name), None)

        return self.poll(seen, timeout)

    def poll(self, question: Callable[[], T | None], timeout: float = PATIENCE) -> T:
        """Ask again and again until the answer is something else than `None` or `False`."""
        deadline = time.monotonic() + timeout
        while not (answer := question()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not true after {timeout} s: {question}")
            self("query-status")  # collects events
            time.sleep(0.01)
        return answer

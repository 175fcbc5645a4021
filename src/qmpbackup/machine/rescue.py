# SPDX-License-Identifier: Apache-2.0
"""What the watchdog's process does: watch over a run, and bring VM and guest back if it fails.

It shares the run's connections to the monitor and to the guest agent, because both serve one client
at a time and the run may still hold them. What it may do with them depends on whether the run still
lives:

- The run is dead. Its last command may be half written, and QEMU's parser waits for the rest. A
  byte 0xFF resets it in every state, a line end does not (tried: inside a number or a word nothing
  helps but 0xFF). QEMU reports the broken command in an error without an id. What the run had not
  read, however much it is, is read in its place, for the answers come behind it.
- The run is stopped or hangs. It may live on and need every byte, so what comes back is only
  *peeked* at. That error would make its QMP client give up the connection, so the first attempt
  goes without the 0xFF. Replies with our ids are dropped by the run's client.

QEMU drops the commands it has not begun when a client leaves, so the connection is kept until the
answer has come. The guest agent carries out its commands in order; a thaw that is sent while a
freeze is still under way waits behind it.

Everything here runs in a process of its own after a fork: no logging, no event loop, no exceptions
that leave it, nothing that needs memory or files of the run.
"""

import json
import re
import secrets
import select
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

from qmpbackup.plan.names import STOPPED_MARKER

VM_SECONDS = 60.0
"""How long the watchdog tries to let the VM run again. QEMU may be busy with storage that stalls."""

GUEST_SECONDS = 30.0
"""How long it tries to have the guest thawed. The agent may be busy with a freeze that stalls."""

RETRY_SECONDS = 3.0

LEAVE_SECONDS = 5.0
"""How long a run that gives up waits for its VM to run again before it goes on."""

_TICK_SECONDS = 0.02
_READ_BYTES = 1024 * 1024
_KEPT_BYTES = 64 * 1024
"""Of what a dead run had not read: more than all answers to the attempts together."""

FREEZE, STOP = "freeze", "stop"
FINE, FIRED = b"fine", b"fired"

FLUSH = b"\xff"


class Rescue:
    """Attempts at one connection, until success is seen, the other side is gone, or time is up.

    `orphaned` says that the run is dead, `flush` that the parser is reset at the first attempt, too.
    Never blocks, never raises.
    """

    def __init__(
        self, what: str, connection: socket.socket, seconds: float, *, orphaned: bool, flush: bool
    ) -> None:
        self.what = what
        self.done = False
        self.number = secrets.randbits(48)
        self._connection = connection
        self._orphaned = orphaned
        self._flush = flush
        self._received = b""
        self._next = time.monotonic()
        self._until = self._next + seconds
        self._attempts = 0

    def tick(self) -> None:
        """Look for an answer; try again when it is time to."""
        now = time.monotonic()
        if now >= self._until or (self._attempts and self._answered()):
            self.done = True
        elif now >= self._next:
            self._attempts += 1
            self._next = now + RETRY_SECONDS
            self._send()

    def register(self, poll: "select.poll") -> None:
        """Have it end when something came; not where it stays there unread."""
        if self._orphaned:
            poll.register(self._connection, select.POLLIN)

    def _send(self) -> None:
        flush = FLUSH if self._flush or self._attempts > 1 else b""
        lines = b"".join(json.dumps(request).encode() + b"\n" for request in self._requests())
        try:
            flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
            self._connection.send(flush + b"\n" + lines, flags)
        except BlockingIOError:
            pass  # the other side is busy; there is a next attempt
        except OSError:
            self.done = True

    def _answered(self) -> bool:
        try:
            flags = socket.MSG_DONTWAIT | (0 if self._orphaned else socket.MSG_PEEK)
            data = self._connection.recv(_READ_BYTES, flags)
        except BlockingIOError:
            return False
        except OSError:
            return True  # nobody is left who could be helped
        if self._orphaned:
            self._received = (self._received + data)[-_KEPT_BYTES:]
        return not data or self._succeeded(list(_objects(self._received or data)))

    def _requests(self) -> Sequence[dict[str, object]]:
        raise NotImplementedError

    def _succeeded(self, replies: Sequence[dict[str, object]]) -> bool:
        raise NotImplementedError


class VmRescue(Rescue):
    """Let the VM run. The marker goes only where the run will not come back to it."""

    def __init__(self, connection: socket.socket, *, orphaned: bool, unmark: bool) -> None:
        super().__init__(STOP, connection, VM_SECONDS, orphaned=orphaned, flush=orphaned)
        self._unmark = unmark

    def _requests(self) -> Sequence[dict[str, object]]:
        requests: list[dict[str, object]] = [{"execute": "cont", "id": self._id("cont")}]
        if self._unmark:
            name = {"id": STOPPED_MARKER}
            requests.append({"execute": "object-del", "arguments": name, "id": self._id("marker")})
        return requests

    def _succeeded(self, replies: Sequence[dict[str, object]]) -> bool:
        continued = any("return" in reply for reply in replies if self._is(reply, "cont"))
        unmarked = any(self._is(reply, "marker") for reply in replies)
        return continued and (unmarked or not self._unmark)

    def _id(self, what: str) -> str:
        return f"watchdog-{what}-{self.number}"

    def _is(self, reply: dict[str, object], what: str) -> bool:
        return reply.get("id") == self._id(what)


class GuestRescue(Rescue):
    """Thaw the guest; done when the agent says that it is thawed."""

    def __init__(self, connection: socket.socket, *, orphaned: bool) -> None:
        super().__init__(FREEZE, connection, GUEST_SECONDS, orphaned=orphaned, flush=True)

    def _requests(self) -> Sequence[dict[str, object]]:
        return [
            {"execute": "guest-sync-delimited", "arguments": {"id": self.number}},
            {"execute": "guest-fsfreeze-thaw"},
            {"execute": "guest-fsfreeze-status"},
        ]

    def _succeeded(self, replies: Sequence[dict[str, object]]) -> bool:
        answers = [reply.get("return") for reply in replies]
        return self.number in answers and "thawed" in answers[answers.index(self.number) :]


class RescueLoop:
    """The watchdog's main loop.

    `armed` maps what is to be undone to the time when it is undone at the latest. `control` leads to
    the run: one message is one order, and its end is the run's end.
    """

    def __init__(
        self, control: socket.socket, vm: socket.socket | None, guest: socket.socket | None
    ) -> None:
        self._control = control
        self._vm = vm
        self._guest = guest
        self._armed: dict[str, float] = {}
        self._rescues: list[Rescue] = []
        self._fired = False

    def run(self) -> None:
        """Obey until the run has ended, then finish what there is to rescue."""
        while self._obey():
            if not self._fired and self._armed and time.monotonic() >= min(self._armed.values()):
                self._fire(orphaned=False, unmark=False)
            self._tick()
        if self._armed:
            self._fire(orphaned=True, unmark=True)
        while self._rescues:
            if self._vm and not self._at_work(STOP):
                self._vm.close()  # the next run must not wait for a guest that hangs
            self._wait_for_more()
            self._tick()

    def _wait_for_more(self) -> None:
        """Until there is something to read in a dead run's place, or to try again."""
        poll = select.poll()
        for rescue in self._rescues:
            rescue.register(poll)
        poll.poll(1000 * _TICK_SECONDS)

    def _obey(self) -> bool:
        """Wait for an order or for the time to do something; `False` when the run has ended."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        if not poll.poll(self._patience()):
            return True
        try:
            order = self._control.recv(256).decode("ascii").split()
        except (OSError, ValueError):
            return False
        if not order:
            return False
        self._carry_out(order)
        with suppress(OSError):
            flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
            self._control.send(FIRED if self._fired else FINE, flags)
        return True

    def _patience(self) -> float | None:
        """Milliseconds to wait for orders; `None` for as long as it takes."""
        if self._rescues:
            return 1000 * _TICK_SECONDS
        if self._fired or not self._armed:
            return None
        return 1000 * max(0.0, min(self._armed.values()) - time.monotonic())

    def _carry_out(self, order: Sequence[str]) -> None:
        match order:
            case ["arm", what, seconds]:
                self._armed[what] = time.monotonic() + float(seconds)
            case ["disarm", what]:
                self._armed.pop(what, None)
                self._rescues = [rescue for rescue in self._rescues if rescue.what != what]
            case ["leave"] if self._armed:
                self._leave()
            case _:
                pass

    def _leave(self) -> None:
        """The run lives but gives up: rescue what it leaves behind, and return when the VM runs."""
        self._fire(orphaned=False, unmark=True)
        until = time.monotonic() + LEAVE_SECONDS
        while self._at_work(STOP) and time.monotonic() < until:
            time.sleep(_TICK_SECONDS)
            self._tick()
        if not self._at_work(STOP):
            self._armed.clear()

    def _fire(self, *, orphaned: bool, unmark: bool) -> None:
        """Undo all that is armed; the VM first, for a guest that stands still cannot thaw."""
        self._fired = True
        self._rescues = []
        if self._vm and STOP in self._armed:
            self._rescues.append(VmRescue(self._vm, orphaned=orphaned, unmark=unmark))
        if self._guest and FREEZE in self._armed:
            self._rescues.append(GuestRescue(self._guest, orphaned=orphaned))
        self._tick()

    def _tick(self) -> None:
        for rescue in self._rescues:
            rescue.tick()
        self._rescues = [rescue for rescue in self._rescues if not rescue.done]

    def _at_work(self, what: str) -> bool:
        return any(rescue.what == what for rescue in self._rescues)


_BY_LINE = re.MULTILINE | re.DOTALL


def _joined(match: re.Match[bytes]) -> bytes:
    return b" ".join(match[0].splitlines())


def _objects(data: bytes) -> Iterator[dict[str, object]]:
    """The JSON objects among the lines of a stream that may begin and end anywhere; those of a monitor
    with `pretty=on` have many lines each."""
    lines = re.sub(rb"^\{\r?$.*?^\}", _joined, data.replace(FLUSH, b"\n"), flags=_BY_LINE)
    for line in lines.splitlines():
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                yield value

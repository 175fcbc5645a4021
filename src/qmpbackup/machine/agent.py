# SPDX-License-Identifier: Apache-2.0
"""The QEMU guest agent: freezing and thawing the guest's file systems.

A small synchronous client (QEMU docs/interop/qemu-ga, qga/qapi-schema.json). The agent is a program
inside the guest, so whatever comes from it may be late, stale, or forged; every wait is bounded and
every reply is checked. Four properties of the agent shape this module:

- It serves one client at a time. A second one connects and then waits in silence.
- Replies carry no reliable id, and those to a client that went away reach the next one. So every
  command goes out behind a byte 0xFF, which resets the agent's parser, and a
  `guest-sync-delimited` with a random number; what comes before the answer to that is dropped.
- It carries out commands strictly in order and knows no time limit. A freeze that we gave up on
  still happens, be it minutes later. Therefore a thaw is queued behind every freeze that failed.
- A freeze sent to an agent that is not running is carried out when it starts. So a freeze goes out
  only after the agent has answered something else on the same connection.

Knows nothing of QMP or of why somebody wants a guest frozen.
"""

import json
import secrets
import select
import socket
import time
from collections.abc import Mapping, Sequence

from qmpbackup import bounded_json, interrupt
from qmpbackup.errors import ConnectError, GuestStateUnknown, MonitorBusy, QuiesceError
from qmpbackup.machine.reply import one_line
from qmpbackup.machine.sockets import open_socket

ANSWER_SECONDS = 10.0
"""Longest wait for the answer to anything but a freeze."""

FLUSH = b"\xff"
"""Resets the agent's parser, whatever a client before us had left in it (qga/qapi-schema.json)."""

_LONGEST_REPLY = 1024 * 1024
_MOST_MEMORY = 16 * 1024 * 1024
_SLICE_SECONDS = 0.5

_NO_ANSWER_HINT = (
    "Check that qemu-guest-agent runs in the guest, and that no other client holds the socket: "
    "the agent serves one at a time. libvirt holds those of its VMs."
)


class Agent:
    """A connection to a guest agent that has answered at least once."""

    def __init__(self, address: str, connection: socket.socket) -> None:
        self.address = address
        self._socket = connection
        self._socket.setblocking(False)
        self._received = b""

    @classmethod
    def connect(cls, address: str, timeout: float = ANSWER_SECONDS) -> "Agent":
        """Reach the agent at `PATH`, `unix:PATH` or `tcp:HOST:PORT`, and see whether it answers.

        Raises:
            UsageError: the address has no such form.
            QuiesceError: nobody listens there, or no agent answers in time.
        """
        try:
            agent = cls(address, open_socket(address, timeout))
        except (ConnectError, MonitorBusy) as error:
            raise QuiesceError(
                f"The guest agent cannot be reached. {error.message}", error.hint
            ) from error
        try:
            agent.sync(timeout)
        except BaseException:
            agent.close()
            raise
        return agent

    def fileno(self) -> int:
        """The descriptor of the connection, for a watchdog to inherit."""
        return self._socket.fileno()

    def close(self) -> None:
        """End the connection; an agent that has not begun a command never will."""
        self._socket.close()

    def sync(self, timeout: float = ANSWER_SECONDS) -> None:
        """Wait until the agent answers, and drop every older reply.

        Raises:
            QuiesceError: it does not answer in time, or what answers is no guest agent.
        """
        self._exchange([], timeout)

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        timeout: float = ANSWER_SECONDS,
        *,
        interruptible: bool = False,
    ) -> object:
        """Carry out one command of the agent's and return its value.

        Raises:
            QuiesceError: the agent refused, or did not answer as an agent does.
            Interrupted: a held signal arrived, where `interruptible`; the outcome is unknown.
        """
        request: dict[str, object] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        (reply,) = self._exchange([request], timeout, interruptible=interruptible)
        return _value(reply, command)

    def frozen(self) -> bool:
        """Whether file systems are frozen through the agent, by us or by somebody else."""
        return _is_frozen(self.execute("guest-fsfreeze-status"))

    def freeze(self, timeout: float, settle: float = ANSWER_SECONDS) -> int:
        """Freeze all file systems of the guest; return how many.

        Waits `timeout` seconds for the guest to flush, and up to `settle` seconds more where a
        freeze that failed has to be followed by a thaw.

        Raises:
            QuiesceError: nothing is frozen (any more), certainly.
            GuestStateUnknown: the freeze failed and the agent does not say in what state the guest
                is. A thaw is queued behind it.
            Interrupted: a held signal arrived; nothing is frozen.
        """
        try:
            value = self.execute("guest-fsfreeze-freeze", timeout=timeout, interruptible=True)
            count = _count(value, "guest-fsfreeze-freeze")
            if count == 0:
                raise QuiesceError(
                    "The guest agent froze no file system.",
                    "Check that the guest has mounted file systems that can be frozen and that "
                    "nobody else froze them.",
                )
        except BaseException as error:
            self._settle(error, settle)
            raise
        return count

    def thaw(self, timeout: float = ANSWER_SECONDS) -> int:
        """Thaw all file systems; return how many were frozen until now.

        0 after a successful freeze means that the freeze did not last. (Windows ends one after 10
        seconds by itself; its agent then reports an error, which counts as 0 here.)

        Raises:
            GuestStateUnknown: the agent does not confirm that the guest is thawed.
        """
        requests = [{"execute": "guest-fsfreeze-thaw"}, {"execute": "guest-fsfreeze-status"}]
        try:
            thawed, status = self._exchange(requests, timeout)
            still_frozen = _is_frozen(_value(status, "guest-fsfreeze-status"))
        except QuiesceError as error:
            raise _unknown(error.message) from error
        if still_frozen:
            raise _unknown("The guest agent says that the guest is still frozen after a thaw.")
        if "error" in thawed:
            return 0
        return _count(_value(thawed, "guest-fsfreeze-thaw"), "guest-fsfreeze-thaw")

    def _settle(self, cause: BaseException, timeout: float) -> None:
        """Undo a freeze whose outcome is not what we wanted, or not known."""
        try:
            self.thaw(timeout)
        except QuiesceError as error:
            reason = (
                cause.message if isinstance(cause, QuiesceError) else "The freeze was broken off."
            )
            raise _unknown(reason) from error

    def _exchange(
        self,
        requests: Sequence[Mapping[str, object]],
        timeout: float,
        *,
        interruptible: bool = False,
    ) -> list[dict[str, object]]:
        """Send a sync and the requests in one piece; return the replies to the requests."""
        deadline = time.monotonic() + timeout
        number = secrets.randbits(48)
        sync = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
        lines = [json.dumps(request).encode() + b"\n" for request in (sync, *requests)]
        self._send(FLUSH + b"".join(lines), deadline)
        self._skip_to(number, deadline)
        return [self._reply(deadline, interruptible=interruptible) for _ in requests]

    def _skip_to(self, number: int, deadline: float) -> None:
        """Drop what comes before the answer to our sync; a stranger's garbage only up to a bound."""
        dropped = 0
        while True:
            line = self._line(deadline)
            dropped += len(line)
            reply = _parsed(line)
            if reply == {"return": number}:
                return
            if reply is not None and "QMP" in reply:
                raise QuiesceError(
                    f"What listens at {self.address} is a QMP monitor, not a guest agent.",
                    "Give the socket of the guest agent's channel "
                    "(org.qemu.guest_agent.0) as --agent-socket.",
                )
            if dropped > _LONGEST_REPLY:
                raise self._garbage()

    def _reply(self, deadline: float, *, interruptible: bool) -> dict[str, object]:
        reply = _parsed(self._line(deadline, interruptible=interruptible))
        if reply is None or ("return" in reply) == ("error" in reply):
            raise self._garbage()
        return reply

    def _line(self, deadline: float, *, interruptible: bool = False) -> bytes:
        """The next line that is not empty, without what precedes the last 0xFF in it."""
        while True:
            line, end, rest = self._received.lstrip(b"\n").partition(b"\n")
            if end:
                self._received = rest
                line = line.rpartition(FLUSH)[2].strip()
                if line:
                    return line
                continue
            if len(self._received) > _LONGEST_REPLY:
                raise self._garbage()
            self._receive(deadline, interruptible=interruptible)

    def _receive(self, deadline: float, *, interruptible: bool) -> None:
        self._wait(select.POLLIN, deadline, interruptible=interruptible)
        try:
            data = self._socket.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            raise self._lost() from error
        if not data:
            raise self._lost()
        self._received += data

    def _send(self, data: bytes, deadline: float) -> None:
        while data:
            self._wait(select.POLLOUT, deadline)
            try:
                data = data[self._socket.send(data, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._lost() from error

    def _wait(self, event: int, deadline: float, *, interruptible: bool = False) -> None:
        poll = select.poll()
        poll.register(self._socket, event)
        while True:
            if interruptible:
                interrupt.check()
            left = deadline - time.monotonic()
            if left <= 0:
                raise QuiesceError(
                    f"The guest agent at {self.address} does not answer.", _NO_ANSWER_HINT
                )
            if poll.poll(1000 * min(left, _SLICE_SECONDS)):
                return

    def _lost(self) -> QuiesceError:
        return QuiesceError(
            f"The connection to the guest agent at {self.address} was closed.",
            "Check that the VM still runs.",
        )

    def _garbage(self) -> QuiesceError:
        return QuiesceError(
            f"What answers at {self.address} does not speak the guest agent's protocol.",
            "Give the socket of the guest agent's channel (org.qemu.guest_agent.0) as "
            "--agent-socket.",
        )


def _parsed(line: bytes) -> dict[str, object] | None:
    """The JSON object of a line, or `None` where there is none."""
    try:
        value = bounded_json.load(line, _MOST_MEMORY)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _value(reply: Mapping[str, object], command: str) -> object:
    if "error" not in reply:
        return reply["return"]
    error = reply["error"]
    details = error if isinstance(error, Mapping) else {}
    why = one_line(str(details.get("desc", "no reason given")))
    if details.get("class") == "CommandNotFound" or "disabled" in why:
        hint = (
            "Allow the command in the guest: see block-rpcs in /etc/qemu/qemu-ga.conf or "
            "FILTER_RPC_ARGS in /etc/sysconfig/qemu-ga."
        )
    else:
        hint = "Look at the guest agent's log in the guest."
    raise QuiesceError(f"The guest agent refused {command}: {why.rstrip('.')}.", hint)


def _count(value: object, command: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise QuiesceError(
            f"The guest agent answered {command} with {value!r:.80} instead of a number.",
            "Update qemu-guest-agent in the guest.",
        )
    return value


def _is_frozen(value: object) -> bool:
    if value not in ("frozen", "thawed"):
        raise QuiesceError(
            f"The guest agent reports the state {value!r:.80}, which does not exist.",
            "Update qemu-guest-agent in the guest.",
        )
    return value == "frozen"


def _unknown(reason: str) -> GuestStateUnknown:
    return GuestStateUnknown(
        f"{reason} Whether the guest's file systems are frozen is not known.",
        "Look into the guest; a thaw has been sent, and the next run checks again.",
    )

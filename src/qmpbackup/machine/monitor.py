# SPDX-License-Identifier: Apache-2.0
"""The QMP monitor of one QEMU process: connect, execute, wait for events.

A synchronous facade over `qemu.qmp`: a backup is a sequence of steps and reads best as one. Every
wait is bounded. A command that was sent and not answered raises a subclass of `OutcomeUnknown`,
because QEMU may have carried it out: whoever catches that asks QEMU again instead of assuming.

Knows the protocol (QEMU docs/interop/qmp-spec), and nothing of what the commands mean.
"""

import asyncio
import socket
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, Self, TypeVar

from qemu.qmp import ConnectError as QmpConnectError
from qemu.qmp import ExecInterruptedError, ExecuteError, QMPError
from qemu.qmp.message import Message
from qemu.qmp.protocol import Runstate, StateError

from qmpbackup import interrupt
from qmpbackup.errors import (
    CommandError,
    CommandTimeout,
    ConnectError,
    ConnectionLost,
    MonitorBusy,
    MonitorProtocolError,
    VmError,
)
from qmpbackup.machine.inbox import Client
from qmpbackup.machine.patience import Patience
from qmpbackup.machine.reply import Reply, one_line
from qmpbackup.machine.sockets import open_socket, peer_pid, require_running
from qmpbackup.plan.commands import Command

T = TypeVar("T")

_OF_THE_LIBRARY = (AssertionError, asyncio.QueueFull)
"""What `qemu.qmp` raises by itself over answers in an order that no QEMU has."""

CONNECT_SECONDS = 5.0
COMMAND_SECONDS = 60.0
"""Longest wait for an answer. Block commands wait for requests in flight, so storage that stalls for
a while is no reason to give up; storage that hangs for a minute is."""

_UNANSWERED = "Look at the VM's storage; the next run finds out and cleans up."

_SLICE_SECONDS = 0.1
"""How long one wait for events lasts before signals, whatever else may end a run, and the connection are
looked at."""


class Monitor:
    """An open QMP session. Use as a context manager; closing never raises."""

    def __init__(self, address: str, connection: socket.socket) -> None:
        self.address = address
        self._socket = connection
        self.peer_pid = peer_pid(connection)
        """The process id of QEMU, where the kernel tells it; also once the connection is lost."""
        self._loop = asyncio.new_event_loop()
        self._patience = Patience()
        self._client = Client(self._acknowledge)

    @classmethod
    def connect(cls, address: str, timeout: float = CONNECT_SECONDS) -> "Monitor":
        """Open a session at `PATH`, `unix:PATH` or `tcp:HOST:PORT`.

        Raises:
            UsageError: the address has no such form.
            ConnectError: nobody listens there, or we may not connect.
            MonitorBusy: another client holds the monitor.
            MonitorProtocolError: what listens there does not speak QMP.
        """
        return cls.over(open_socket(address, timeout), address, timeout)

    @classmethod
    def over(cls, connection: socket.socket, address: str, timeout: float) -> "Monitor":
        """Open a session on a connection, which is the monitor's from then on; `address` is what
        messages call it.

        Raises:
            ConnectError, MonitorBusy, MonitorProtocolError: as `connect`.
        """
        monitor = cls(address, connection)
        try:
            monitor._greet(timeout)
        except BaseException:
            monitor.close()
            raise
        return monitor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor of the connection, for a watchdog to inherit."""
        return self._socket.fileno()

    @property
    def passes_descriptors(self) -> bool:
        """Whether files can be handed over by descriptor (unix sockets only)."""
        return self._socket.family == socket.AF_UNIX

    @property
    def port(self) -> int:
        """The port that our end of a TCP connection has; 0 for a unix socket."""
        return 0 if self.passes_descriptors else int(self._socket.getsockname()[1])

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's version from its greeting."""
        qemu = self._version().nested("qemu")
        return qemu.integer("major"), qemu.integer("minor"), qemu.integer("micro")

    @property
    def resets(self) -> int:
        """How often the guest has reset itself, as far as QEMU has told before its last answer."""
        return self._client.resets

    @property
    def package(self) -> str:
        """The vendor's name of this build of QEMU, often empty."""
        return self._version().text("package", "")

    def execute(self, command: Command, timeout: float = COMMAND_SECONDS) -> object:
        """Carry out one command and return its value.

        Raises:
            CommandError: QEMU refused; nothing was done.
            CommandTimeout, ConnectionLost: the outcome is unknown.
            MonitorProtocolError: the answer is not QMP.
        """
        return self._run(self._execute(command, timeout), command.name)

    def execute_all(self, commands: Sequence[Command]) -> list[object]:
        """Send several commands that only ask, at once, and return their values in order."""

        results = self.execute_each(commands)
        for result in results:
            if isinstance(result, CommandError):
                raise result
        return results

    def execute_each(self, commands: Sequence[Command]) -> list[object]:
        """Carry out several commands, sent at once and done in order; QEMU goes on after a refusal.

        Returns:
            For each command its value, or the `CommandError` with which QEMU refused it.

        Raises:
            CommandTimeout, ConnectionLost: the outcome of some is unknown.
        """

        async def settle() -> list[object]:
            calls = [self._execute(command, COMMAND_SECONDS) for command in commands]
            results = await asyncio.gather(*calls, return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException) and not isinstance(result, CommandError):
                    raise result
            return list(results)

        return self._run(settle(), commands[0].name) if commands else []

    def send_descriptor(self, fd: int, command: Command) -> object:
        """Carry out `add-fd` or `getfd` with the descriptor it is about (unix(7), SCM_RIGHTS)."""

        async def send() -> object:
            self._client.send_fd_scm(fd)
            return await self._execute(command, COMMAND_SECONDS)

        return self._run(send(), command.name)

    def wait_for_event(self, names: frozenset[str], timeout: float) -> Reply | None:
        """The next event of one of these names, or `None` when none came in time.

        Raises:
            ConnectionLost: the monitor went away while we waited.
            Interrupted: a held signal arrived.
        """
        deadline = time.monotonic() + timeout
        while True:
            interrupt.check()
            left = deadline - time.monotonic()
            event = self._run(
                self._next_event(max(0.0, min(left, _SLICE_SECONDS))), "waiting for events"
            )
            if event is not None and event.text("event") in names:
                return event
            if event is None and left <= 0:
                return None

    def events_so_far(self, names: frozenset[str]) -> list[Reply]:
        """The events of these names that have come and that nobody has taken; others are dropped.

        What QEMU told before it answered a question is among them.
        """
        events = [Reply(event, "event") for event in self._client.inbox.clear()]
        return [event for event in events if event.text("event") in names]

    def close(self) -> None:
        """End the session; what cannot be ended in order is dropped."""
        with suppress(Exception):
            self._loop.run_until_complete(asyncio.wait_for(self._client.disconnect(), 2.0))
        with suppress(Exception):
            _drain(self._loop)
        self._loop.close()
        self._socket.close()

    def _acknowledge(self) -> None:
        """Over TCP, QEMU keeps the answer back until we have acknowledged the event before it (Nagle),
        for which our kernel takes 40 ms unless it is told at each time (tcp(7), TCP_QUICKACK)."""
        if not self.passes_descriptors:
            with suppress(OSError):
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def _greet(self, timeout: float) -> None:
        try:
            self._loop.run_until_complete(
                asyncio.wait_for(self._client.connect(self._socket), timeout)
            )
        except TimeoutError:
            require_running(self.address)
            raise MonitorBusy(
                f"The monitor at {self.address} accepted the connection but did not greet us.",
                _way_out(self.address),
            ) from None
        except AssertionError as error:
            # The library's own: the connection went away while it was being set up.
            raise self._closed_at_once() from error
        except QmpConnectError as error:
            if isinstance(error.exc, EOFError | OSError):
                raise self._closed_at_once() from error
            raise MonitorProtocolError(
                f"What listens at {self.address} does not speak QMP.",
                "Give the socket of QEMU's -qmp option, not that of the guest agent or of HMP.",
            ) from error

    def _closed_at_once(self) -> ConnectError:
        return ConnectError(
            f"The monitor at {self.address} closed the connection at once.",
            "Check that the VM is running and that the socket is a QMP monitor.",
        )

    def _version(self) -> Reply:
        greeting = self._client.greeting
        if greeting is None:
            raise MonitorProtocolError(f"The monitor at {self.address} gave no greeting.")
        return Reply(greeting.QMP.version, "greeting.QMP.version")

    async def _execute(self, command: Command, timeout: float) -> object:
        patience = self._patience.left(timeout)
        if not patience:
            first = self._patience.unanswered
            raise CommandTimeout(
                f"QEMU did not answer {first} in time; {command.name} was not sent.", _UNANSWERED
            )
        call = self._client.execute(command.name, command.arguments or None)
        try:
            answer = await asyncio.wait_for(call, patience)
        except TimeoutError:
            self._patience.gave_up(command.name)
            raise
        except ExecuteError as error:
            self._patience.answered()
            refusal = error.error.error
            raise CommandError(command.name, refusal.class_, one_line(refusal.desc)) from error
        self._patience.answered()
        return answer

    async def _next_event(self, timeout: float) -> Reply | None:
        try:
            event: Message = await asyncio.wait_for(self._client.inbox.get(), timeout)
        except TimeoutError:
            if self._client.runstate != Runstate.RUNNING:
                raise self._lost("waiting for events") from None
            return None
        return Reply(event, "event")

    def _run(self, work: Coroutine[Any, Any, T], what: str) -> T:
        self._client.begin()
        try:
            return self._loop.run_until_complete(work)
        except TimeoutError as error:
            raise CommandTimeout(
                f"QEMU did not answer {what} in time; whether it was carried out is unknown.",
                _UNANSWERED,
            ) from error
        except (ExecInterruptedError, StateError, EOFError, OSError) as error:
            raise self._lost(what) from error
        except VmError:
            raise
        except (QMPError, ValueError, KeyError, TypeError, *_OF_THE_LIBRARY) as error:
            raise MonitorProtocolError(
                f"The answer to {what} from {self.address} is not QMP: {one_line(str(error))}.",
                "Check that the socket is a QMP monitor of QEMU.",
            ) from error

    def _lost(self, what: str) -> ConnectionLost:
        if self._client.fault:
            return ConnectionLost(
                f"The connection to the monitor at {self.address} was given up during {what}, as "
                f"what came from there is not QMP: {self._client.fault}.",
                "Check that the socket is a QMP monitor of QEMU.",
            )
        return ConnectionLost(
            f"The connection to the monitor at {self.address} was lost during {what}.",
            "If the VM still runs, run again: the next run cleans up and carries on.",
        )


def _way_out(address: str) -> str:
    """What to do about a monitor that somebody else holds."""
    from qmpbackup.machine import libvirt

    if libvirt.is_own_monitor(address):
        return (
            "It is the one by which libvirt manages the VM, and libvirt keeps it. Give the VM a second "
            "one with <qemu:commandline> in its XML (docs/how-to/libvirt.md), and name that one."
        )
    return (
        "Another client holds it (a monitor serves one at a time): end that client, or start the VM "
        "with a second -qmp socket for backups. The socket of a guest agent does not greet either."
    )


def _drain(loop: asyncio.AbstractEventLoop) -> None:
    """Let what the client left in the loop end, so that nothing complains when it is closed."""

    async def settle(tasks: set[asyncio.Task[Any]]) -> None:
        await asyncio.wait(tasks, timeout=1.0)

    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(settle(tasks))

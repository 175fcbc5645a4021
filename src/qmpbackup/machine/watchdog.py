# SPDX-License-Identifier: Apache-2.0
"""The watchdog: a process that lets the VM run and thaws the guest if the run cannot.

A run that is killed, stopped or hangs between stop and cont, or between freeze and thaw, would leave
its VM standing still. QEMU and the guest agent know no time limit of their own, and QEMU drops what
a client had queued when the client dies, so only a second process helps. It is forked from the run
(one to two milliseconds, no program to find) and told *before* anything is stopped or frozen.

This module is the run's side; `rescue` is what the process does. The process is in a session of its
own, ignores the signals that end a run, and keeps none of the run's files, locks or pipes. What it
cannot survive is being killed together with the run (SIGKILL to a whole control group): then the
markers in QEMU tell the next run.
"""

import gc
import itertools
import os
import select
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, Self

from qmpbackup.errors import QuiesceError, VmError
from qmpbackup.machine.rescue import FIRED, FREEZE, LEAVE_SECONDS, STOP, RescueLoop

ANSWER_SECONDS = 5.0
"""Longest wait for the watchdog's answer. It has nothing else to do; only a host in distress is
slower, and on such a host nothing should be frozen or stopped."""

REAP_SECONDS = 0.5

_IGNORED = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGUSR1,
    signal.SIGUSR2, signal.SIGALRM, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU,
)  # fmt: skip


class Watchdog:
    """A watchdog process of ours. Use as a context manager.

    Between `arm_…` and `disarm_…` the process is on its guard. It acts when the run's process ends,
    when the time given has passed, or when the block is left while something is armed. Then
    everything armed is undone, and every later call says so by raising.
    """

    def __init__(self, control: socket.socket | None, pid: int) -> None:
        self._control = control
        self._trouble = ""
        self.pid = pid

    @classmethod
    def start(cls, qmp_fd: int | None, agent_fd: int | None) -> "Watchdog":
        """Fork the process. It may write to the connections to the monitor and to the agent.

        With neither there is nothing to guard, and nothing is started.
        """
        if qmp_fd is None and agent_fd is None:
            return cls(None, 0)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(ANSWER_SECONDS)
        pid = os.fork()
        if pid == 0:
            _become_guard(theirs.fileno(), qmp_fd, agent_fd)
        theirs.close()
        return cls(ours, pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def arm_freeze(self, seconds: float) -> None:
        """Call before a freeze, and again to move the time limit.

        Raises:
            QuiesceError: there is no watchdog (any more), or it has acted: do not freeze.
        """
        _check_freeze(self._order(f"arm {FREEZE} {seconds}"))

    def disarm_freeze(self) -> None:
        """Call after the thaw.

        Raises:
            QuiesceError: the watchdog has acted or is gone; the guest may have been thawed before.
        """
        _check_freeze(self._order(f"disarm {FREEZE}"))

    def arm_stop(self, seconds: float) -> None:
        """Call before the VM is stopped.

        Raises:
            VmError: there is no watchdog (any more), or it has acted: do not stop the VM.
        """
        _check_stop(self._order(f"arm {STOP} {seconds}"))

    def disarm_stop(self) -> None:
        """Call after the VM was told to run again.

        Raises:
            VmError: the watchdog has acted or is gone; the VM may have run in between, and what was
                done while it was stopped is not of one instant.
        """
        _check_stop(self._order(f"disarm {STOP}"))

    def close(self) -> None:
        """End the process; what is still armed is undone first. Never raises.

        Waits for a VM to run again, but not for a guest whose agent does not answer: the process
        goes on with that by itself for `rescue.GUEST_SECONDS`.
        """
        if self._control is None:
            return
        with self._control as control, suppress(OSError):
            control.settimeout(2 * LEAVE_SECONDS)
            control.send(b"leave")
            control.recv(16)
        self._control = None
        _reap(self.pid)

    def _order(self, order: str) -> str:
        """Give an order and wait for the answer; return what is or has ever been wrong."""
        trouble = self._answer_to(order)
        self._trouble = self._trouble or trouble
        return self._trouble

    def _answer_to(self, order: str) -> str:
        if self._control is None:
            return "The watchdog process was not started"
        try:
            self._control.send(order.encode())
            answer = self._control.recv(16)
        except TimeoutError:
            return "The watchdog process does not answer"
        except OSError:
            answer = b""
        if not answer:
            return "The watchdog process was killed"
        return "The watchdog had to step in" if answer == FIRED else ""


def _check_freeze(trouble: str) -> None:
    if trouble:
        raise QuiesceError(
            f"{trouble}; the guest was not surely frozen at the instant.",
            "Run again; if it happens again, this host or the guest is overloaded.",
        )


def _check_stop(trouble: str) -> None:
    if trouble:
        raise VmError(
            f"{trouble}; the VM may have run while the instant was taken.",
            "Run again; if it happens again, this host or its storage is overloaded.",
        )


def _reap(pid: int) -> None:
    """Collect the process if it ends soon, as it does with nothing left to do."""
    with suppress(OSError):
        pidfd = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll(1000 * REAP_SECONDS)
        finally:
            os.close(pidfd)
        os.waitpid(pid, os.WNOHANG)


def _become_guard(control: int, qmp_fd: int | None, agent_fd: int | None) -> NoReturn:
    """The life of the forked process; nothing of the run's code runs in it ever again."""
    try:
        detach({fd for fd in (control, qmp_fd, agent_fd) if fd is not None})
        RescueLoop(
            socket.socket(fileno=control),
            None if qmp_fd is None else socket.socket(fileno=qmp_fd),
            None if agent_fd is None else socket.socket(fileno=agent_fd),
        ).run()
    finally:
        os._exit(0)


def detach(keep: set[int]) -> None:
    """Leave the run's session, signals, folder and files, but for the descriptors to keep: what a
    forked process does first that is to outlive the run."""
    # A destructor of one of the run's objects would close a descriptor that is now ours.
    gc.disable()
    signal.set_wakeup_fd(-1)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.setsid()
    os.chdir("/")
    edges = [-1, *sorted(keep), os.sysconf("SC_OPEN_MAX")]
    for low, high in itertools.pairwise(edges):
        os.closerange(low + 1, high)
    with suppress(OSError), Path("/proc/self/comm").open("w") as name:
        name.write("qmpbackup-guard")

# SPDX-License-Identifier: Apache-2.0
"""A QEMU of ours that runs a guest: started so that it outlives us, reached again, kept running, ended.

Knows processes and monitors; must not know where the disks come from.
"""

import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.durable import storage_errors
from qmpbackup.errors import (
    CommandError,
    ConnectError,
    MonitorBusy,
    NobodyThere,
    QmpBackupError,
    VmError,
)
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.reply import Reply
from qmpbackup.machine.sockets import open_socket
from qmpbackup.plan.commands import Command

START_SECONDS = 120.0
"""Longest wait for a monitor of a QEMU that has been started."""

_POLL_SECONDS = 0.05
_REACH_SECONDS = 5.0
_LISTEN_SECONDS = 0.1

_TOLD = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH")

NODE = "boot"
"""What the names of nodes of ours begin with."""


def detached(
    arguments: Sequence[str],
    log: Path,
    *,
    environment: Mapping[str, str],
    prints_to_us: bool = True,
) -> "subprocess.Popen[bytes]":
    """Start a program in a session of its own, which lives on when we end, and with an environment of
    its own. What it says goes to `log`, what it prints to us or there, too.

    Raises:
        QmpBackupError: it cannot be started.
        StorageError: the log cannot be written.
    """
    with storage_errors(f"write {log}"):
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if prints_to_us else fd,
            stderr=fd,
            start_new_session=True,
            env=environment,
            preexec_fn=_take_signals,  # noqa: PLW1509 - a system call only
        )
    except OSError as error:
        raise QmpBackupError(f"Cannot start {arguments[0]}: {error.strerror}.") from error
    finally:
        os.close(fd)


def first_line(child: "subprocess.Popen[bytes]", seconds: float) -> bytes | None:
    """What a `detached` program prints once it is ready: nothing if it ended before, `None` if it takes
    longer than that. What else it prints to us is lost."""
    assert child.stdout is not None  # noqa: S101 - it was asked for
    deadline = time.monotonic() + seconds
    with child.stdout as printed:
        while not select.select([printed], [], [], _LISTEN_SECONDS)[0]:
            interrupt.check()
            if time.monotonic() > deadline:
                return None
        return printed.readline()


def _take_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def start(argv: Sequence[str], monitor: Path, log: Path) -> Monitor:
    """Start QEMU, standing still, and open a monitor of it.

    Raises:
        VmError: it does not start; the sentence has what it said.
    """
    began = log.stat().st_size if log.exists() else 0
    child = detached(argv, log, environment=guest_environment(), prints_to_us=False)
    deadline = time.monotonic() + START_SECONDS
    try:
        while True:
            interrupt.check()
            with suppress(MonitorBusy):  # it listens before it opens its disks, and greets after
                found = reach(monitor)
                if found is not None:
                    return found
            if child.poll() is not None:
                raise VmError(f"QEMU does not start: {_last_words(log, began)}.", f"See {log}.")
            if time.monotonic() > deadline:
                raise VmError("QEMU was started and does not answer.", f"See {log}.")
            time.sleep(_POLL_SECONDS)
    except BaseException:
        child.kill()
        child.wait()
        raise


def guest_environment() -> dict[str, str]:
    """What a QEMU with a guest is told of our environment, which has the keys of the target."""
    return {name: os.environ[name] for name in _TOLD if name in os.environ}


def _last_words(log: Path, began: int) -> str:
    with suppress(OSError), log.open("rb") as file:
        file.seek(began)
        lines = file.read(65536).decode(errors="replace").strip().splitlines()
        if lines:
            return lines[-1].rpartition("}: ")[2].rstrip(".")
    return "it says nothing"


def reach(path: Path, timeout: float = 10.0, patience: float = _REACH_SECONDS) -> Monitor | None:
    """A monitor of a VM that was started before, or `None` where it runs no more; one that cannot be
    reached is tried for some seconds.

    Raises:
        ConnectError: whether it runs cannot be told, as it cannot be reached.
        MonitorBusy: it runs, and does not greet.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            return Monitor.connect(str(path), timeout)
        except NobodyThere:
            return None
        except ConnectError:  # such as of one that ends just now
            interrupt.check()
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_SECONDS)


def listener(path: Path) -> int | None:
    """The process that listens at a socket (unix(7), SO_PEERCRED), or `None`.

    Raises:
        VmError: that cannot be told.
    """
    try:
        with open_socket(str(path), 2.0) as connection:
            size = struct.calcsize("3i")
            found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
            return int(struct.unpack("3i", found)[0]) or None
    except NobodyThere:
        return None


def is_there(path: Path) -> bool:
    """Whether somebody listens at a socket, or may."""
    try:
        return listener(path) is not None
    except VmError:
        return True


def status(monitor: Monitor) -> str:
    """QEMU's `RunState`."""
    return Reply(monitor.execute(Command("query-status")), "query-status").text("status")


def let_run(monitor: Monitor) -> str:
    """Have a VM run that stands still because it has just been started, or because a disk could not be
    read; its state afterwards. Where the disk still cannot be read, it stands still again at once."""
    now = status(monitor)
    if now in {"prelaunch", "io-error"}:
        with suppress(CommandError):
            monitor.execute(Command("cont"))
        now = status(monitor)
    return now


def end(pid: int, number: signal.Signals, seconds: float) -> bool:
    """End a process that is not a child of ours, and see that it is gone; SIGKILL at the end."""
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return True
    try:
        for each, patience in ((number, seconds), (signal.SIGKILL, 30.0)):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, each)
            if select.select([handle], [], [], patience)[0]:
                return True
        return False
    finally:
        os.close(handle)

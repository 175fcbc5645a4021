# SPDX-License-Identifier: Apache-2.0
"""How runs on one VM see each other, whoever and wherever they are.

Locks in files are seen by those alone who see the same folder: not by another user, nor in a
container or a mount namespace. So each run that changes anything leaves a mark in the VM itself: a
character device that is one end of a pair of sockets, whose other end the run holds. When the run
ends, in whatever way, the kernel closes that end, and QEMU calls the device disconnected
(chardev/char-socket.c). No clock, process id, or name of a host has a part in that.

Over TCP no socket can be handed over. There the mark's name holds the port from which the run's
connection to the monitor comes, and it lives for as long as QEMU shows a connection from that port.

Two runs that come at once: each looks *after* it has made its mark, so one of them at least sees the
other. Who sees another takes the own mark away, and tries again a random while later.
"""

import os
import random
import re
import secrets
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from qmpbackup import interrupt
from qmpbackup.errors import Locked, VmError
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.reply import objects
from qmpbackup.plan.commands import Command, Json
from qmpbackup.plan.names import LIVING, RUN_PREFIX

_LABEL = re.compile(
    re.escape(f"{RUN_PREFIX}{LIVING}-")
    + r"[0-9a-f]{12}(?P<ports>(?:\.[0-9]+)*)-(?P<pid>[0-9]+)-(?P<host>[A-Za-z0-9._-]{0,64})"
)
_PEER = re.compile(r" <-> .*:(?P<port>[0-9]+)$")
_GONE = "disconnected:"
_UNKNOWN_PORT = 0

LEAST_SECONDS = 1.0
"""How long the same living mark is seen before it counts. QEMU sees the end of a run only when it gets
to it, which may be after the first answer; and of two runs that come at once, one is to win."""

_PAUSE_SECONDS = 0.05, 0.25


@dataclass(frozen=True, slots=True)
class RunMark:
    """The mark of a run, as QEMU shows it."""

    label: str
    lives: bool
    pid: str
    host: str
    by_port: bool

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host or 'an unknown host'}"


@contextmanager
def claimed(monitor: Monitor, wait: float) -> Iterator[None]:
    """Have the VM for this run alone; marks of runs that died are removed.

    Raises:
        Locked: a run had it for all of `wait` seconds.
        VmError: the mark could not be made.
    """
    patience = _Patience(wait)
    while True:
        _await_end(monitor, patience)
        label = _make_label(monitor)
        with _marked(monitor, label):
            others = [mark for mark in marks(monitor) if mark.label != label]
            if not any(mark.lives for mark in others):
                for mark in others:
                    _remove(monitor, mark.label)
                yield
                return
        patience.exercise(others)


def require_none(monitor: Monitor, wait: float) -> None:
    """Wait until no run has the VM.

    Raises:
        Locked: a run had it for all of `wait` seconds.
    """
    _await_end(monitor, _Patience(wait))


def marks(monitor: Monitor) -> list[RunMark]:
    """The marks of runs of ours in the VM, of the living and of the dead."""
    answer = monitor.execute(Command("query-chardev"))
    devices = objects(answer, "query-chardev")
    return among([(device.text("label"), device.text("filename", "")) for device in devices])


def among(devices: Sequence[tuple[str, str]]) -> list[RunMark]:
    """The marks among character devices, given as (label, file name)."""
    peers = {int(found["port"]) for _, name in devices if (found := _PEER.search(name))}
    return [
        _mark(match, name, peers)
        for label, name in devices
        if (match := _LABEL.fullmatch(label)) is not None
    ]


def _mark(match: re.Match[str], name: str, peers: set[int]) -> RunMark:
    ports = {int(port) for port in match["ports"].split(".")[1:]}
    lives = bool(ports & peers) if ports else not name.startswith(_GONE)
    return RunMark(match[0], lives, match["pid"], match["host"], bool(ports))


def _await_end(monitor: Monitor, patience: "_Patience") -> None:
    found = marks(monitor)
    while any(mark.lives for mark in found):
        patience.exercise(found)
        found = marks(monitor)


class _Patience:
    """Waiting for others, at least for `seconds`.

    What makes us give up is a run that has the VM, never one that only tries to get it: that one has
    another label each time.
    """

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        self._seen: dict[str, float] = {}

    def exercise(self, others: Iterable[RunMark]) -> None:
        """Sleep a while, or raise `Locked`."""
        interrupt.check()
        now = time.monotonic()
        living = [mark for mark in others if mark.lives]
        self._seen = {mark.label: self._seen.get(mark.label, now) for mark in living}
        for mark in living:
            if now >= max(self._until, self._seen[mark.label] + LEAST_SECONDS):
                raise _locked(mark)
        time.sleep(random.uniform(*_PAUSE_SECONDS))  # noqa: S311 - no secret


def _locked(mark: RunMark) -> Locked:
    gone = f" If its host is gone for good: chardev-remove {mark.label}." if mark.by_port else ""
    return Locked(
        f"Another run of qmpbackup is using this VM ({mark}).",
        f"Wait for its end, or let this one wait with --lock-wait SECONDS.{gone}",
    )


def _make_label(monitor: Monitor) -> str:
    ports = "" if monitor.passes_descriptors else _ports(monitor)
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64]
    return f"{RUN_PREFIX}{LIVING}-{secrets.token_hex(6)}{ports}-{os.getpid()}-{host}"


def _ports(monitor: Monitor) -> str:
    """Our port as QEMU sees it; where something translates addresses, all that it could be."""
    devices = objects(monitor.execute(Command("query-chardev")), "query-chardev")
    names = (device.text("filename", "") for device in devices)
    seen = {int(found["port"]) for name in names if (found := _PEER.search(name))}
    ports = seen & {monitor.port} or seen or {_UNKNOWN_PORT}
    return "".join(f".{port}" for port in sorted(ports))


@contextmanager
def _marked(monitor: Monitor, label: str) -> Iterator[None]:
    with _device(monitor) as backend:
        monitor.execute(Command("chardev-add", {"id": label, "backend": backend}))
        try:
            yield
        finally:
            _remove(monitor, label)


@contextmanager
def _device(monitor: Monitor) -> Iterator[dict[str, Json]]:
    """What the mark is made of, alive inside the block."""
    if not monitor.passes_descriptors:
        yield {"type": "null", "data": {}}
        return
    name = f"{RUN_PREFIX}{LIVING}"
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            monitor.send_descriptor(theirs.fileno(), Command("getfd", {"fdname": name}))
        address: dict[str, Json] = {"type": "fd", "data": {"str": name}}
        yield {"type": "socket", "data": {"addr": address, "server": False}}


def _remove(monitor: Monitor, label: str) -> None:
    # Where QEMU is gone or does not answer, the mark dies with us.
    with suppress(VmError):
        monitor.execute(Command("chardev-remove", {"id": label}))

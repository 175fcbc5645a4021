# SPDX-License-Identifier: Apache-2.0
"""The appliance at work: started, asked, and gone with us.

    socketpair ── QEMU -nic none -sandbox on: virtio disks, one virtio port ── agent.sh

Questions go over the port one after the other; each answer ends with a mark that nobody could know
before. Whatever happens inside, from here it is bytes on a socket, with bounds to all that is kept of
them, and a limit to how long nothing comes.
"""

import json
import os
import select
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qmpbackup import interrupt
from qmpbackup.errors import QmpBackupError, VmError
from qmpbackup.machine.appliance.building import Appliance
from qmpbackup.machine.confining import SANDBOX, confined
from qmpbackup.machine.launching import found_program
from qmpbackup.plan.guest_files import quoted
from qmpbackup.process import Child

NOT_THERE = 44
NOT_MOUNTED = 45
NO_FILE = 46

_START_SECONDS = 300.0
_SILENCE_SECONDS = 300.0
"""Longest time in which nothing comes: a kernel may be slow, and storage far away."""

_POLL_SECONDS = 0.1
_MEMORY_MIB = 512
_MEMORY_TO_UNLOCK_MIB = 1664
"""Argon2 takes up to 1 GiB where cryptsetup has chosen it."""
_CPU = "max,-erms,-fsrm"
"""Without KVM, a string of bytes is copied byte by byte, and Linux would copy so where a processor says
that it is fast; so it copies words."""

_MOST_IN_A_SLOT = 8
_FIRST_SLOT = 4
_PIECE = 256 * 1024
_LONGEST_END = 8192
_LARGEST_ANSWER = 64 * 1024 * 1024
_LONGEST_REST = 1024 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Machine:
    """How the appliance is started: its disks as (node, nodes below), and whether it unlocks any.

    `largest_file`: bytes that any file may have that it writes.
    """

    appliance: Appliance
    disks: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]
    unlocks: bool
    largest_file: int


class GuestAgent:
    """What answers in the appliance."""

    def __init__(self, port: socket.socket, child: Child) -> None:
        self._port = port
        self._child = child
        self._kept = b""
        self._answer: GuestAnswer | None = None

    def wait_until_ready(self) -> None:
        """Wait until it has started."""
        while b"ready\n" not in self._kept:
            self._kept += self._more(_START_SECONDS)
            if len(self._kept) > _LONGEST_END:
                raise VmError("The appliance does not start as it should.")
        self._kept = b""

    def ask(self, question: str, *words: str | bytes) -> "GuestAnswer":
        """Have it carry out a function; what is not read of its answer before the next question is passed
        over then."""
        if self._answer is not None:
            self._answer.pass_over()
        mark = os.urandom(24).hex().encode()
        line = b" ".join([b"answer", mark, question.encode(), *(quoted(_bytes(w)) for w in words)])
        self._send(line + b"\n")
        self._answer = GuestAnswer(self, mark)
        return self._answer

    def told(self, question: str, *words: str | bytes) -> tuple[bytes, "End"]:
        """A short answer as a whole, and how it ended."""
        answer, parts, size = self.ask(question, *words), [], 0
        for part in answer:
            parts.append(part)
            size += len(part)
            if size > _LARGEST_ANSWER:
                raise VmError("The appliance answers without end.")
        return b"".join(parts), answer.end

    def _send(self, data: bytes) -> None:
        deadline = time.monotonic() + _SILENCE_SECONDS
        while data:
            interrupt.check()
            if select.select([], [self._port], [], _POLL_SECONDS)[1]:
                try:
                    data = data[self._port.send(data) :]
                except OSError as error:
                    raise self._ended() from error
            elif time.monotonic() > deadline:
                raise VmError("The appliance takes no question any more.")

    def _more(self, seconds: float | None = None) -> bytes:
        """What comes next, at least a byte."""
        seconds = _SILENCE_SECONDS if seconds is None else seconds
        deadline = time.monotonic() + seconds
        while True:
            interrupt.check()
            if select.select([self._port], [], [], _POLL_SECONDS)[0]:
                try:
                    found = self._port.recv(_PIECE)
                except OSError as error:
                    raise self._ended() from error
                if not found:
                    raise self._ended()
                return found
            if time.monotonic() > deadline:
                raise VmError(
                    f"The appliance says nothing for {seconds:.0f} seconds.",
                    "The storage may hang, or a damaged file system may have its kernel run in circles.",
                )

    def _ended(self) -> QmpBackupError:
        result = self._child.end(5.0)
        why = f": {result.reason.rpartition('}: ')[2]}" if result.messages.strip() else ""
        return VmError(
            f"The appliance has ended{why}.",
            "A damaged file system may have brought its kernel down; nothing else was touched.",
        )


@dataclass(frozen=True, slots=True)
class End:
    """How an answer ended: a status, 0 where all is well, and what was complained of."""

    status: int
    said: str


class GuestAnswer:
    """An answer that is read piece by piece; `end` once that is over."""

    def __init__(self, agent: GuestAgent, mark: bytes) -> None:
        self._agent = agent
        self._mark = mark
        self._kept = b""
        self._is_over = False
        self.end = End(-1, "")

    def __iter__(self) -> Iterator[bytes]:
        while not self._is_over:
            kept = self._kept + self._agent._more()  # noqa: SLF001 - two halves of one thing
            at = kept.find(self._mark)
            if at >= 0:
                self._is_over = True
                self._finish(kept[at + len(self._mark) :])
                if at:
                    yield kept[:at]
                return
            ready = max(len(kept) - len(self._mark), 0)
            self._kept = kept[ready:]
            if ready:
                yield kept[:ready]

    def pass_over(self) -> None:
        """Read what is left of it, for nobody.

        Raises:
            VmError: that is too much.
        """
        size = 0
        for piece in self:
            size += len(piece)
            if size > _LONGEST_REST:
                raise VmError(
                    "What was not read of the last answer is too much to be passed over.",
                    "Start again.",
                )

    def _finish(self, rest: bytes) -> None:
        while b"\n" not in rest:
            rest += self._agent._more()  # noqa: SLF001
            if len(rest) > _LONGEST_END:
                raise VmError("The appliance ends an answer without end.")
        status, _, said = rest.partition(b"\n")[0].partition(b" ")
        try:
            number = int(status)
        except ValueError as error:
            raise VmError("The appliance ends an answer strangely.") from error
        self.end = End(number, said.decode("utf-8", "replace").strip())


@contextmanager
def running(machine: Machine) -> Iterator[GuestAgent]:
    """The appliance, for the block.

    Raises:
        VmError: it cannot be started.
    """
    ours, theirs = socket.socketpair()
    with ours:
        bounds = ("prlimit", f"--fsize={machine.largest_file}", "--core=0", "--")
        command = [*confined(bounds), *_command(machine, theirs.fileno())]
        with Child(command, pass_fds=[theirs.fileno()]) as child:
            theirs.close()
            agent = GuestAgent(ours, child)
            agent.wait_until_ready()
            yield agent


def _command(machine: Machine, port: int) -> list[str]:
    memory = _MEMORY_TO_UNLOCK_MIB if machine.unlocks else _MEMORY_MIB
    return [
        *(found_program(""), "-nodefaults", "-no-user-config", "-nic", "none", "-display", "none"),
        *("-machine", "pc", "-accel", "kvm", "-accel", "tcg,tb-size=64", "-cpu", _CPU),
        *("-m", str(memory), "-no-reboot", "-sandbox", SANDBOX),
        *("-kernel", str(machine.appliance.kernel), "-initrd", str(machine.appliance.initramfs)),
        *("-append", "console=none quiet loglevel=0 panic=-1"),
        *("-chardev", f"socket,id=port,fd={port}"),
        *("-device", "virtio-serial-pci,addr=3"),
        *("-device", "virtserialport,chardev=port,name=port"),
        *(word for number, disk in enumerate(machine.disks) for word in _disk(number, *disk)),
    ]


def _disk(
    number: int, node: Mapping[str, Any], below: Sequence[Mapping[str, Any]]
) -> Sequence[str]:
    slot, function = divmod(number, _MOST_IN_A_SLOT)
    device = {
        "driver": "virtio-blk-pci",
        "drive": node["node-name"],
        "serial": f"d{number}",
        "addr": f"{_FIRST_SLOT + slot:x}.{function}",
        "multifunction": True,
    }
    nodes = [("-blockdev", json.dumps(dict(each))) for each in (*below, node)]
    return [*(word for each in nodes for word in each), "-device", json.dumps(device)]


def _bytes(word: str | bytes) -> bytes:
    return os.fsencode(word) if isinstance(word, str) else word

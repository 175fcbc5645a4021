# SPDX-License-Identifier: Apache-2.0
"""A VM that `qmpbackup boot` has started, seen from outside."""

import json
import os
import select
import shutil
import signal
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lab import cli
from lab.backups import back_up
from lab.disks import MIB, Disk, create, pattern
from lab.machine import LINE_BUFFERED, Machine
from lab.patience import PATIENCE
from lab.qemu import HALT, Qemu
from lab.qmp import Monitor


class Booted(Machine):
    """A booted VM. `socket` is its monitor for users, `folder` where its overlays are."""

    def __init__(self, said: Mapping[str, Any]) -> None:
        self.disks: list[Disk] = []
        self.folder = Path(said["folder"])
        self.socket = Path(said["qmp"])
        self.sockets = self.socket.parent
        self.agent_socket = Path(said["agent"])
        self._qmp: Monitor | None = None

    @property
    def qmp(self) -> Monitor:
        """The monitor that `boot` names."""
        if self._qmp is None:
            self._qmp = Monitor(self.socket)
        return self._qmp

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        pid = listener(self.socket)
        assert pid, "the VM does not run"
        return pid

    @property
    def printed(self) -> Path:
        """What QEMU has printed."""
        return self.folder / "qemu.log"

    @property
    def phase(self) -> str:
        """What its journal says."""
        return str(json.loads((self.folder / "boot.json").read_text())["phase"])

    def disconnect(self) -> None:
        """Close the monitor, as when QEMU ends."""
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None

    def kill(self) -> None:
        """SIGKILL for QEMU; returns when it and its keeper are gone."""
        keeper = self.keeper
        kill(self.pid)
        self.disconnect()
        if keeper:
            await_end(keeper)

    def quit(self) -> None:
        """Have QEMU end in order; returns when it and its keeper are gone."""
        pid, keeper = self.pid, self.keeper
        self.qmp("quit")
        self.disconnect()
        await_end(pid)
        if keeper:
            await_end(keeper)

    @property
    def keeper(self) -> int | None:
        """The process that watches it, if it lives."""
        with suppress(OSError, ValueError):
            pid = int((self.folder / "keeper.lock").read_text())
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if os.fsencode(self.folder) in words:
                return pid
        return None

    @property
    def server(self) -> int | None:
        """The process that serves its point, if one does."""
        return listener(self.sockets / "point")

    def await_running(self) -> None:
        """Wait until the VM runs."""
        self.qmp.poll(lambda: self.qmp("query-status")["running"])

    def processes(self) -> list[str]:
        """All that there is of it."""
        found = []
        for process in Path("/proc").iterdir():
            with suppress(OSError):
                words = (process / "cmdline").read_bytes()
                if os.fsencode(self.sockets) in words or os.fsencode(self.folder) in words:
                    found.append(words.replace(b"\0", b" ").decode())
        return found

    def assert_gone(self) -> None:
        """Nothing of it is left, neither processes nor files."""
        deadline = time.monotonic() + PATIENCE
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.processes() == []
        assert not self.sockets.exists()
        assert not self.folder.exists()


def listener(path: Path) -> int | None:
    """The process that listens at a socket."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        found = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", found)[0])


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal, and wait for the end."""
    handle = os.pidfd_open(pid)
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(handle, number)
    assert select.select([handle], [], [], PATIENCE)[0], f"process {pid} does not end"
    os.close(handle)


def await_end(pid: int) -> None:
    """Wait until a process has ended."""
    with suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        assert select.select([handle], [], [], PATIENCE)[0], f"process {pid} does not end"
        os.close(handle)


@contextmanager
def booted(*arguments: cli.Argument, env: Mapping[str, str]) -> Iterator[Booted]:
    """Boot a VM; whatever happens, nothing of it runs afterwards."""
    result = cli.run("boot", "--json", *arguments, env={**env, **LINE_BUFFERED}).check()
    vm = Booted(result.objects[0])
    try:
        yield vm
    finally:
        vm.disconnect()
        for pid in (vm.keeper, listener(vm.sockets / "settle"), vm.server):
            if pid:
                kill(pid)
        shutil.rmtree(vm.sockets, ignore_errors=True)


def point_that_halts(folder: Path) -> Path:
    """A target with a point of a VM that is no more, which shows nothing and stands still."""
    (folder / "rom").write_bytes(HALT)
    disk = Disk("vda", create(folder / "vda", 4 * MIB, contents=pattern(4 * MIB, 1)))
    with Qemu([disk], args=("-bios", str(folder / "rom")), firmware=None) as vm:
        back_up(vm, folder / "target")
    return folder / "target"

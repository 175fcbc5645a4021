# SPDX-License-Identifier: Apache-2.0
"""One QEMU process for tests: started in 0.1 s, driven from outside, always ended.

Without a guest, writes come through the human monitor's `qemu-io` (`Qemu.write`), which enters
at the guest device's own place in the block graph, so that the product sees them as guest writes.
"""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from lab.disks import Disk
from lab.machine import LINE_BUFFERED, Machine
from lab.patience import PATIENCE
from lab.qmp import Monitor

BINARY_VARIABLE = "QMPBACKUP_TEST_QEMU"
ACCEL_VARIABLE = "QMPBACKUP_TEST_ACCEL"

Firmware = Literal["halt", "seabios"]

HALT = b"\xf4" * (65536 - 16) + b"\xfa\xf4\xeb\xfd" + b"\xf4" * 12
"""A ROM whose reset vector stops the CPU for good: the VM runs, costs nothing, touches no disk."""


class Qemu(Machine):
    """A VM without an operating system. Use as a context manager.

    `socket` is the monitor for the product, `qmp` the test's own monitor. `folder` is a short-lived
    folder with a short path, for sockets. `user` runs QEMU as that user; images for it have to be
    where it may go (fixture `open_folder`). With firmware `halt` the CPU stands still; `seabios`
    starts virtio drivers, which is what brings iothreads into play. `paused` leaves the VM in
    `prelaunch`. `args` are added to QEMU's command line as they are.
    """

    def __init__(
        self,
        disks: Sequence[Disk] = (),
        *,
        args: Sequence[str] = (),
        machine: str = "q35",
        memory: str = "64M",
        firmware: Firmware | None = "halt",
        paused: bool = False,
        name: str = "",
        uuid: str = "",
        iothreads: Sequence[str] = (),
        user: str = "",
        accelerators: Sequence[str] = ("tcg",),
        binary: str = "",
    ) -> None:
        self.disks = list(disks)
        self.user = user
        self.folder = Path(tempfile.mkdtemp(prefix="qmpb-", dir="/tmp"))
        self.socket = self.folder / "qmp"
        self._test_socket = self.folder / "test"
        self._log = self.folder / "stderr"
        self._printed = self.folder / "stdout"
        self._process: subprocess.Popen[bytes] | None = None
        self._qmp: Monitor | None = None
        self.argv = [
            binary or os.environ.get(BINARY_VARIABLE) or "qemu-system-x86_64",
            *("-nodefaults", "-no-user-config", "-display", "none"),
            *("-machine", machine, "-m", memory),
            *(part for accelerator in accelerators for part in ("-accel", accelerator)),
            *("-qmp", f"unix:{self.socket},server=on,wait=off"),
            *("-qmp", f"unix:{self._test_socket},server=on,wait=off"),
            *(("-name", name) if name else ()),
            *(("-uuid", uuid) if uuid else ()),
            *(("-S",) if paused else ()),
            *(part for thread in iothreads for part in ("-object", f"iothread,id={thread}")),
            *(part for disk in disks for part in disk.arguments()),
            *self._firmware(firmware),
            *args,
        ]

    def _firmware(self, firmware: Firmware | None) -> Sequence[str]:
        if firmware != "halt":
            return ()
        rom = self.folder / "halt.rom"
        rom.write_bytes(HALT)
        return ("-bios", str(rom))

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self.stderr:
            error.add_note(f"QEMU said:\n{self.stderr}")
        self._end()

    @property
    def qmp(self) -> Monitor:
        """The test's own monitor."""
        assert self._qmp is not None, "the VM is not running"
        return self._qmp

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        assert self._process is not None, "the VM is not running"
        return self._process.pid

    @property
    def printed(self) -> Path:
        """The file that holds QEMU's standard output."""
        return self._printed

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def stderr(self) -> str:
        """What QEMU has printed since it was first started."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    # Life and death

    def start(self) -> None:
        """Start QEMU and wait until both monitors are there."""
        assert self._process is None, "the VM is running already"
        self._allow_user()
        for path in (self.socket, self._test_socket):
            path.unlink(missing_ok=True)
        with self._log.open("ab") as log, self._printed.open("ab") as printed:
            self._process = subprocess.Popen(
                [*self._privileges(), *self.argv],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=log,
                env={**os.environ, **LINE_BUFFERED},
            )
        self._qmp = self.monitor()

    def _privileges(self) -> Sequence[str]:
        # A test run that is killed must leave no QEMU behind.
        arguments = ["setpriv", "--pdeathsig", "KILL"]
        if self.user:
            group = pwd.getpwnam(self.user).pw_gid
            arguments += ["--reuid", self.user, "--regid", str(group), "--clear-groups"]
        return [*arguments, "--"]

    def _allow_user(self) -> None:
        if self.user:
            account = pwd.getpwnam(self.user)
            os.chown(self.folder, account.pw_uid, account.pw_gid)
            self.folder.chmod(0o755)

    def monitor(self, timeout: float = PATIENCE) -> Monitor:
        """Another connection to the test's monitor socket; only one can be open at a time."""
        deadline = time.monotonic() + timeout
        while True:
            assert self.running, f"QEMU did not start:\n{self.stderr}"
            with suppress(FileNotFoundError, ConnectionRefusedError):
                return Monitor(self._test_socket, timeout)
            assert time.monotonic() < deadline, f"no monitor after {timeout} s:\n{self.stderr}"
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL: what was not flushed is lost, bitmaps are not stored."""
        self._finish(signal.SIGKILL)

    def quit(self) -> None:
        """End QEMU in order: bitmaps are stored."""
        with suppress(ConnectionError):
            self.qmp("quit")
        self._finish(None)

    def restart(self) -> None:
        """End QEMU in order and start it again with the same command line."""
        self.quit()
        self.start()

    def _finish(self, number: signal.Signals | None) -> None:
        process, self._process = self._process, None
        if self._qmp:
            self._qmp.close()
            self._qmp = None
        if process is None:
            return
        if number:
            process.send_signal(number)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    def _end(self) -> None:
        self._finish(signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


StartQemu = Callable[..., Qemu]
"""What the fixture `start_qemu` gives."""

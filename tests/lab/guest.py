# SPDX-License-Identifier: Apache-2.0
"""A booted Linux: file systems, the guest agent, and a root shell that bypasses the agent.

The system is what `scripts/guest.sh` has built. The shell has its own serial port, because the
agent serves one client at a time and while a backup runs that client is the product.
"""

import base64
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lab.disks import Disk
from lab.patience import PATIENCE
from lab.qemu import ACCEL_VARIABLE, Qemu
from lab.qmp import JsonSocket, LineSocket

SCRIPT = Path(__file__).parents[2] / "scripts" / "guest.sh"

Boot = Literal["initramfs", "install", "disk"]

_BOOT_ARGUMENT: dict[Boot, str] = {
    "initramfs": "",
    "install": "lab.install=/dev/{device}",
    "disk": "lab.root=/dev/{device}",
}


class GuestError(AssertionError):
    """A command in the guest failed."""


def system() -> Path:
    """The folder with the guest's `vmlinuz` and `initramfs`, built first where it is not there."""
    done = subprocess.run(
        [SCRIPT], stdout=subprocess.PIPE, text=True, check=True, timeout=4 * PATIENCE
    )
    return Path(done.stdout.strip())


def accelerators() -> Sequence[str]:
    """KVM where the guest boots under it, else emulation; `QMPBACKUP_TEST_ACCEL` has precedence.

    There are machines on which /dev/kvm opens and starts a VM whose Linux then hangs, so the only
    proof is a guest that is up. The answer is kept beside the guest until the host boots again.
    """
    wish = os.environ.get(ACCEL_VARIABLE, "")
    if wish:
        return (wish,)
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return ("tcg",)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    verdict = system().parent / f"accelerator-{boot}"
    if not verdict.exists():
        verdict.write_text("kvm" if _boots_under_kvm() else "tcg")
    return (verdict.read_text(),)


def _boots_under_kvm() -> bool:
    try:
        with Guest(accelerators=("kvm",), patience=10):
            return True
    except (AssertionError, OSError):
        return False


class Guest(Qemu):
    """A VM with a running Linux. Use as a context manager; inside, the guest is up.

    `boot` is `initramfs` (the disks are the test's), `install` (the system is first put on
    the disk `root` and then runs from it) or `disk` (it runs from what is on that disk, such as a
    restored one). `agent_socket` is for the product. `patience` is how many seconds the guest may take to
    start or to carry out a command. Options are those of `Qemu`.
    """

    def __init__(
        self,
        disks: Sequence[Disk] = (),
        *,
        boot: Boot = "initramfs",
        root: str = "vda",
        modules: Sequence[str] = (),
        args: Sequence[str] = (),
        memory: str = "192M",
        agent: bool = True,
        patience: float = PATIENCE,
        **options: Any,
    ) -> None:
        built = system()
        asked = f"lab.modules={','.join(modules)}" if modules else ""
        command_line = (
            # Without no_timer_check a guest on an overloaded host can take its own timer for broken.
            f"console=ttyS0 quiet panic=-1 no_timer_check {_BOOT_ARGUMENT[boot].format(device=root)} {asked}"
        )
        options["accelerators"] = options.get("accelerators") or accelerators()
        super().__init__(disks, memory=memory, firmware=None, **options)
        self.agent_socket = self.folder / "agent"
        self._shell_socket = self.folder / "shell"
        self._shell: Shell | None = None
        self._patience = patience
        self.argv += [
            *("-kernel", str(built / "vmlinuz"), "-initrd", str(built / "initramfs")),
            *("-append", command_line),
            *("-serial", f"file:{self.folder / 'console'}"),
            "-no-reboot",
            *("-device", "virtio-serial-pci,id=ports"),
            *(self._port("agent", self.agent_socket, "org.qemu.guest_agent.0") if agent else ()),
            *self._port("shell", self._shell_socket, "lab.shell"),
            *args,
        ]

    @staticmethod
    def _port(identity: str, socket: Path, name: str) -> Sequence[str]:
        return (
            *("-chardev", f"socket,id={identity},path={socket},server=on,wait=off"),
            *("-device", f"virtserialport,chardev={identity},name={name},id=port-{identity}"),
        )

    def start(self) -> None:
        """Start QEMU and wait until the guest's shell answers."""
        super().start()
        self._shell = Shell(self._shell_socket, self._patience)
        try:
            self.run("true")
        except (TimeoutError, OSError) as error:
            error.add_note(f"The guest's console said:\n{self.console}")
            raise

    def _finish(self, number: Any) -> None:
        if self._shell:
            self._shell.close()
            self._shell = None
        super()._finish(number)

    @property
    def console(self) -> str:
        """What the guest has printed on its console."""
        path = self.folder / "console"
        return path.read_text(errors="replace") if path.exists() else ""

    def run(self, command: str) -> str:
        """Run a shell command in the guest as root and return what it printed.

        Not through the agent, so it works while the product holds the agent. A command that
        writes to a frozen file system waits for the thaw.

        Raises:
            GuestError: its exit code is not 0.
        """
        assert self._shell is not None, "the guest is not running"
        return self._shell.run(command)

    @contextmanager
    def background(self, command: str) -> Iterator[None]:
        """Keep a command running in the guest: `with guest.background("write-records /mnt"):`."""
        pid = self.run(f"{command} >/run/background 2>&1 & echo $!").strip()
        try:
            yield
        finally:
            if self.running:
                self.run(f"kill {pid}; while [ -e /proc/{pid}/exe ]; do usleep 10000; done; sync")

    def agent(self, command: str, **arguments: Any) -> Any:
        """Carry out a command of the guest agent; only while the product does not use it."""
        plain = {key.replace("_", "-"): value for key, value in arguments.items()}
        with JsonSocket(self.agent_socket) as connection:
            self._synchronise(connection)
            return connection.command(command, plain)

    @staticmethod
    def _synchronise(connection: JsonSocket) -> None:
        # Answers to an earlier client that did not wait for them come first.
        number = int.from_bytes(os.urandom(4))
        connection.send({"execute": "guest-sync-delimited", "arguments": {"id": number}})
        while connection.receive().get("return") != number:
            pass

    def wait_for_agent(self) -> None:
        """Wait until the guest's agent answers."""
        self.agent("guest-ping")

    def sync(self) -> None:
        """Bring everything the guest has written to its disks, and from there to the images."""
        self.run("sync")
        self.flush()


class Shell(LineSocket):
    """The end of the shell's serial port; the guest's end is `shell-server`."""

    def __init__(self, socket: Path, timeout: float) -> None:
        super().__init__(socket, timeout)
        self._number = 0

    def run(self, command: str) -> str:
        # What is sent before the guest has opened its port waits for that.
        self._number += 1
        number = str(self._number).encode()
        self.send_line(number + b" " + base64.b64encode(command.encode()))
        while True:
            identity, code, *output = self.receive_line().split(b" ")
            if identity == number:
                break
        text = base64.b64decode(b"".join(output)).decode(errors="replace")
        if code != b"0":
            raise GuestError(f"in the guest: {command}\nexit code {code.decode()}\n{text}")
        return text

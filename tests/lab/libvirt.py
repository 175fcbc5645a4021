# SPDX-License-Identifier: Apache-2.0
"""A libvirt daemon for tests, and VMs that are its own, each with a second monitor for backups.

It is a session daemon: all it has lies in one private folder, it needs no account, changes nothing
of the system, and its QEMU runs as another user than the product where the tests run as root.
"""

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from lab.cli import Result
from lab.disks import Disk
from lab.machine import LINE_BUFFERED, Machine
from lab.patience import PATIENCE
from lab.qemu import HALT
from lab.qmp import Monitor

USER = "nobody" if os.geteuid() == 0 else ""

EMULATOR = "/usr/bin/qemu-system-x86_64"
"""The system's, which its libvirt knows."""

_KEEPER = """
read -r _ # ends with the tests, however they end
for file in "$0"/run/libvirt/qemu/run/*.pid; do
    [ "${file##*/}" = driver.pid ] || ! [ -s "$file" ] || kill -KILL "$(cat "$file")"
done
rm -rf "$0"
"""

_NAMED = 'printf "%s" "$0" >/proc/sys/kernel/hostname; exec "$@"'

DOMAIN = """
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <memory unit='MiB'>64</memory>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <loader type='rom'>{rom}</loader>
  </os>
  <devices>
    <emulator>{emulator}</emulator>
    {disks}
    <controller type='scsi' model='virtio-scsi'/>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-qmp'/>
    <qemu:arg value='unix:{socket},server=on,wait=off'/>
    <qemu:arg value='-qmp'/>
    <qemu:arg value='unix:{test_socket},server=on,wait=off'/>
    {environment}
  </qemu:commandline>
</domain>
"""

DISK = """
    <disk type='file' device='disk'>
      <driver name='qemu' type='{disk.format}'/>
      <source file='{disk.image}'/>
      <target dev='{target}' bus='{bus}'/>
      {alias}
    </disk>
"""


Bus = Literal["virtio", "scsi"]


class CannotStart(AssertionError):
    """Here no libvirt daemon can run."""


class Libvirt:
    """A daemon of its own. Use as a context manager: afterwards it and its VMs have ended.

    `host` is the name of the host it believes to be on (needs root), for migrations between two.
    """

    def __init__(self, host: str = "") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="qmpb-virt-", dir="/tmp"))
        self.images = self.folder / "images"
        self.uri = f"qemu+unix:///session?socket={self.folder}/run/libvirt/libvirt-sock"
        self.state = self.folder / "run/libvirt/qemu/run"
        self.logs = self.folder / "cache/libvirt/qemu/log"
        self.rom = self.folder / "halt.rom"
        self._host = host
        self._log = self.folder / "log"
        self._daemon: subprocess.Popen[bytes] | None = None
        self._keeper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        for program in ("libvirtd", "virsh"):
            if shutil.which(program) is None:
                raise CannotStart(f"{program} is not installed; scripts/setup.sh installs it")
        try:
            self._furnish()
            self._keeper = subprocess.Popen(
                ["sh", "-c", _KEEPER, str(self.folder)], stdin=subprocess.PIPE, process_group=0
            )
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
        self._end()

    def _furnish(self) -> None:
        for name in ("run", "config", "cache", "data", "config/libvirt", "images"):
            (self.folder / name).mkdir(mode=0o700)
        self.images.chmod(0o755)
        self.folder.chmod(0o755)
        self.rom.write_bytes(HALT)
        uuid = f"00000000-0000-4000-8000-{os.urandom(6).hex()}"
        (self.folder / "libvirtd.conf").write_text(
            f'auth_unix_rw = "none"\nhost_uuid = "{uuid}"\nlog_outputs = "2:stderr"\n'
        )
        # virtlogd, which would keep QEMU's output instead, is one daemon more to start.
        (self.folder / "config/libvirt/qemu.conf").write_text('stdio_handler = "file"\n')
        self.give(self.folder, *self.folder.rglob("*"))

    def give(self, *paths: Path) -> None:
        """Make files the daemon's own."""
        if USER:
            account = pwd.getpwnam(USER)
            for path in paths:
                os.chown(path, account.pw_uid, account.pw_gid)

    def start(self) -> None:
        """Start the daemon and wait until it answers."""
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "XDG_RUNTIME_DIR": str(self.folder / "run"),
            "XDG_CONFIG_HOME": str(self.folder / "config"),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "XDG_DATA_HOME": str(self.folder / "data"),
        }
        pid_file = self.folder / "run/libvirtd.pid"
        with self._log.open("ab") as log:
            self._daemon = subprocess.Popen(
                [
                    *(("unshare", "--uts", "sh", "-c", _NAMED, self._host) if self._host else ()),
                    *self._privileges(),
                    *("libvirtd", "-f", str(self.folder / "libvirtd.conf"), "-p", str(pid_file)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd="/",
            )
        self._wait()

    def _wait(self) -> None:
        assert self._daemon is not None
        deadline = time.monotonic() + PATIENCE
        while self.try_virsh("uri").code:
            if self._daemon.poll() is not None:
                raise CannotStart(f"libvirtd did not start:\n{self.log}")
            assert time.monotonic() < deadline, f"libvirtd does not answer:\n{self.log}"
            time.sleep(0.05)

    def _privileges(self) -> Sequence[str]:
        # The daemon alone; of its VMs, which outlive it, the keeper takes care.
        arguments = ["setpriv", "--pdeathsig", "KILL"]
        if USER:
            group = pwd.getpwnam(USER).pw_gid
            arguments += ["--reuid", USER, "--regid", str(group), "--clear-groups"]
        return [*arguments, "--"]

    @property
    def log(self) -> str:
        """What the daemon has printed."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def kill(self) -> None:
        """SIGKILL to the daemon; its VMs run on."""
        daemon, self._daemon = self._daemon, None
        if daemon:
            daemon.kill()
            daemon.wait()

    def _end(self) -> None:
        self.kill()
        if self._keeper:
            self._keeper.communicate()
        shutil.rmtree(self.folder, ignore_errors=True)

    def try_virsh(self, *arguments: str | Path, timeout: float = PATIENCE) -> Result:
        """Carry out a command of virsh, however it ends."""
        argv = ("virsh", "--quiet", "--connect", self.uri, *map(str, arguments))
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C"},
        )
        return Result(argv, done.returncode, done.stdout.strip(), done.stderr.strip())

    def virsh(self, *arguments: str | Path) -> str:
        """What a command of virsh printed; a failure fails the test."""
        return self.try_virsh(*arguments).check().out


class Managed(Machine):
    """A VM of libvirt's, with `disks` on one `bus`.

    On `virtio`, they are called `virtio-disk0` … by libvirt, and their targets `vda` …; on `scsi`,
    whose disks can be detached without a guest that agrees, `scsi0-0-0-0` … and `sda` …. An id that
    begins with `ua-` is given to libvirt as the user's own.
    """

    def __init__(
        self, host: Libvirt, name: str, disks: Sequence[Disk], bus: Bus = "virtio"
    ) -> None:
        self.host = host
        self.bus = bus
        self.name = name
        self.disks = list(disks)
        self.socket = host.folder / f"{name}.backup.qmp"
        self._test_socket = host.folder / f"{name}.test.qmp"
        self._qmp: Monitor | None = None
        host.give(*(disk.image for disk in disks))

    def define(self) -> None:
        """Make it known to libvirt."""
        file = self.host.folder / f"{self.name}.xml"
        file.write_text(self.xml())
        self.host.virsh("define", file)

    def xml(self) -> str:
        """Its description."""
        disks = (
            DISK.format(
                disk=disk,
                bus=self.bus,
                target=f"{self.bus[0]}d{letter}",
                alias=f"<alias name='{disk.id}'/>" if disk.id.startswith("ua-") else "",
            )
            for letter, disk in zip("abcdef", self.disks, strict=False)
        )
        environment = (
            f"<qemu:env name='{name}' value='{value}'/>" for name, value in LINE_BUFFERED.items()
        )
        return DOMAIN.format(
            name=self.name,
            rom=self.host.rom,
            emulator=EMULATOR,
            disks="".join(disks),
            socket=self.socket,
            test_socket=self._test_socket,
            environment="\n".join(environment),
        )

    def virsh(self, command: str, *arguments: str | Path) -> str:
        """What a command of virsh about this VM printed; a failure fails the test."""
        return self.host.virsh(command, self.name, *arguments)

    def try_virsh(self, command: str, *arguments: str | Path) -> Result:
        """Carry out a command of virsh about this VM, however it ends."""
        return self.host.try_virsh(command, self.name, *arguments)

    def start(self) -> None:
        """Start it (or go on with what was saved)."""
        self.virsh("start")

    def end(self) -> None:
        """End QEMU by SIGTERM, as libvirt does also when a guest has shut down."""
        self.leave()
        self.virsh("destroy", "--graceful")

    def migrate(self, to: Libvirt) -> "Managed":
        """Move it, running, to another daemon; what it is there, with sockets in that one's folder."""
        self.try_migrate(to).check()
        self.leave()
        return Managed(to, self.name, self.disks)

    def try_migrate(self, to: Libvirt) -> Result:
        """The same, however it ends."""
        file = self.host.folder / f"{self.name}.moved.xml"
        mine, its = f"{self.host.folder}/{self.name}.", f"{to.folder}/{self.name}."
        file.write_text(self.virsh("dumpxml", "--migratable").replace(mine, its))
        options = ("--live", "--unsafe", "--persistent", "--undefinesource", "--xml", file)
        way = ("--migrateuri", "tcp://127.0.0.1", "--listen-address", "127.0.0.1")
        return self.try_virsh("migrate", "--desturi", to.uri, *options, *way)

    def active_bitmaps(self, disk: str) -> list[dict[str, Any]]:
        """The bitmaps on the node that a disk sits on, as QEMU describes them."""
        path = self.qdev(disk)
        (device,) = (each for each in self.qmp("query-block") if each.get("qdev") == path)
        found: list[dict[str, Any]] = device["inserted"].get("dirty-bitmaps", [])
        return found

    def leave(self) -> None:
        """Close the test's own monitor, which the next use opens again."""
        if self._qmp:
            self._qmp.close()
            self._qmp = None

    @property
    def qmp(self) -> Monitor:
        """The test's own monitor."""
        deadline = time.monotonic() + PATIENCE
        while self._qmp is None:
            with suppress(FileNotFoundError, ConnectionRefusedError):
                self._qmp = Monitor(self._test_socket, PATIENCE)
            assert self._qmp or time.monotonic() < deadline, "no monitor"
        return self._qmp

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return int((self.host.state / f"{self.name}.pid").read_text())

    @property
    def printed(self) -> Path:
        """The file that holds QEMU's standard output."""
        return self.host.logs / f"{self.name}.log"

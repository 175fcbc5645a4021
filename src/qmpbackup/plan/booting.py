# SPDX-License-Identifier: Apache-2.0
"""The command line that boots a point: the recorded one, with every device kept and back-ends replaced.

    disks                 on nodes of ours, whichever file they were on
    serial ports, other   sockets in a private folder; devices stay, as a guest may wait for them
      character devices
    networks              a hub without anything else on it, unless the network is asked for
    monitors              those of ours
    host devices, what    left out, and said so
      only that host has
    firmware, kernels     as recorded; whether they are there is for others to see
    what is only read     as recorded where it is a file that is here; else its drive is empty, or goes

Pure: decides; must not know what is served where, nor how QEMU is started.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qmpbackup.model import VmConfig
from qmpbackup.plan import boot_backends as backends
from qmpbackup.plan.boot_disks import Attached, RecordedDisks, file_in, flattened, is_read_only
from qmpbackup.plan.qemu_options import Parameters, QemuOption, option, parse, program_of, render
from qmpbackup.plan.sandboxed import sandboxed

MASK = "***"
"""What stands in a recorded command line where a secret was."""

_QEMU = re.compile(r"qemu-system-\w+|qemu-kvm|kvm|qemu")

AGENT_PORT = "org.qemu.guest_agent.0"

_STOPS = ("virtio-blk", "scsi-hd", "ide-hd")
"""Devices that can have the VM stand still where a disk cannot be read or written."""

_KEPT_OF_A_DRIVE = ("if", "index", "bus", "unit", "media", "id", "serial", "addr", "bps", "iops")
_STOPPING_BUSES = frozenset({"", "ide", "scsi", "virtio", "none"})


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a VM is booted. `sockets` is a folder of its own with a short path, `logs` one for what it
    prints; `monitors` are the names of its monitors there. `accelerators` are tried in their order.
    `is_here` tells of a file that is only read, such as an ISO, whether the VM may have it; in a
    `sandbox` there is none of these, and of devices and settings only those that are known."""

    sockets: str
    logs: str
    monitors: Sequence[str] = ()
    network: bool = False
    accelerators: Sequence[str] = ()
    stop_on_error: bool = True
    is_here: Callable[[str], bool] = lambda _: True
    sandbox: bool = False


@dataclass(frozen=True, slots=True)
class Launch:
    """A VM that can be started: its command line and what is known of it.

    `left_out` says what was left out or changed and why, `needs` which files of the host it needs;
    `obstacles` are the reasons for which it must not be started. `agent` is the socket of the guest
    agent's port, `consoles` are the files with what serial ports print.
    """

    argv: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    obstacles: tuple[str, ...] = ()
    agent: str = ""
    consoles: tuple[str, ...] = ()


def launch(record: VmConfig, disks: Sequence[Attached], around: Setting) -> Launch:
    """How a recorded VM is booted from other disks."""
    if not record.command_line:
        return Launch(
            (), obstacles=("The point does not say with which command line the VM was started.",)
        )
    program = program_of(record.command_line)
    name = record.command_line[min(program, len(record.command_line)) - 1].rpartition("/")[2]
    if not _QEMU.fullmatch(name):
        return Launch((), obstacles=(f"The recorded program, {name}, is no QEMU.",))
    given, left_out = list(parse(record.command_line[program:])), list[str]()
    if around.sandbox:
        around = replace(around, is_here=lambda _: False)
        given, left_out = sandboxed(given, backends.OF_THE_PROCESS)
    return _Draft(record, disks, around, given, left_out=left_out).finished()


@dataclass
class _Draft:
    record: VmConfig
    disks: Sequence[Attached]
    around: Setting
    given: list[QemuOption]
    out: list[QemuOption] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    placed: set[str] = field(default_factory=set)
    inline: set[str] = field(default_factory=set)
    gone_ids: set[str] = field(default_factory=set)
    serials: int = 0
    hubs: int = 0

    def finished(self) -> Launch:
        self.recorded = RecordedDisks(self.given, self.disks, self.around.is_here)
        for each in self.given:
            self._take(each)
        self._add_ours()
        missing = [each.id for each in self.disks if each.id not in self.placed]
        if missing:
            self.obstacles.append(
                f"Nothing in the recorded command line holds disk {', '.join(missing)}."
            )
        nodes = [
            option("blockdev", Parameters(node, is_json=True).render())
            for each in self.disks
            if each.id in self.placed
            for node in (*each.below, *(() if each.id in self.inline else (each.node,)))
        ]
        program = self.record.command_line[: program_of(self.record.command_line)]
        argv = (*program, *render([*nodes, *self.out]))
        return Launch(
            argv=argv,
            left_out=tuple(self.left_out),
            needs=tuple(dict.fromkeys(self.needs)),
            obstacles=tuple(self.obstacles),
            agent=self._agent(),
            consoles=tuple(f"{self.around.logs}/serial{n}.log" for n in range(self.serials)),
        )

    # One option after the other

    def _take(self, each: QemuOption) -> None:
        if each.name in backends.OF_THE_PROCESS:
            return
        if each.name in backends.IMAGES or not each.name:
            self._image(each)
            return
        handler = {
            "blockdev": self._blockdev,
            "drive": self._drive,
            "device": self._device,
            "machine": self._machine,
            "M": self._machine,
            "cpu": self._cpu,
            "chardev": self._chardev,
            "serial": self._serial,
            "parallel": self._leave_out,
            "nographic": self._nographic,
            "netdev": self._netdev,
            "nic": self._nic,
            "net": self._net,
            "object": self._object,
            "audiodev": self._audiodev,
            "audio": self._audio,
            "tpmdev": self._leave_out,
            "fsdev": self._leave_out,
            "virtfs": self._leave_out,
            "readconfig": self._readconfig,
        }.get(each.name)
        if handler is not None:
            handler(each)
            return
        if each.name in backends.FILES:
            self._needs(each.value or "")
        if each.members.text("file"):
            self._needs(each.members.text("file"))
        if each.value and MASK in each.value:
            self.left_out.append(f"-{each.name}: a secret in it was not recorded")
        self.out.append(each)

    def _needs(self, file: str) -> None:
        if file.startswith("/"):
            self.needs.append(file)
        elif "/" in file:
            self.obstacles.append(
                f"{file} is named as it was seen from the folder in which QEMU was started."
            )

    def _leave_out(self, each: QemuOption) -> None:
        self.left_out.append(f"-{each.name} {each.value}")

    def _readconfig(self, each: QemuOption) -> None:
        self.obstacles.append(f"What {each.value} held, which -readconfig names, was not recorded.")

    def _blockdev(self, each: QemuOption) -> None:
        if each.members.text("node-name") in self.recorded.kept_nodes:
            file = file_in(each.members)
            if file:
                self._needs(file)
            self.out.append(each)

    def _image(self, each: QemuOption) -> None:
        """`-hda FILE` and its like, which stand for a drive."""
        number = "abcd".find(each.name[-1:]) if each.name.startswith("hd") else 0
        text = {
            "cdrom": "media=cdrom,index=2",
            "pflash": "if=pflash",
            "sd": "if=sd",
            "mtdblock": "if=mtd",
            "fda": "if=floppy,index=0",
            "fdb": "if=floppy,index=1",
        }.get(each.name, f"media=disk,index={number}")
        drive = option("drive", text)
        self._drive(drive.with_members(drive.members.replaced({"file": each.value or ""})))

    def _drive(self, each: QemuOption) -> None:
        members = each.members
        kind, drive = members.text("if"), members.text("id")
        found = self.recorded.attached("", drive, file_in(members))
        if kind == "none":
            return  # its device says what becomes of it
        if found is not None:
            kept = {k: v for k, v in members.values.items() if k in _KEPT_OF_A_DRIVE}
            stopping = self.around.stop_on_error and kind in _STOPPING_BUSES
            stop = {"rerror": "stop", "werror": "stop"} if stopping else {}
            self.placed.add(found.id)
            self.inline.add(found.id)
            ours = {**flattened(found.node), **stop}
            self.out.append(each.with_members(Parameters({**kept, **ours})))
            return
        file = file_in(members)
        name = drive or file or kind
        if is_read_only(members) and self.recorded.may_stay(members, is_firmware=kind == "pflash"):
            if file:
                self._needs(file)
            self.out.append(each)
        elif members.text("media") == "cdrom":
            self.left_out.append(f"what was in drive {name}")
            empty = {k: v for k, v in members.values.items() if k in _KEPT_OF_A_DRIVE}
            self.out.append(each.with_members(Parameters(empty)))
        else:
            self.left_out.append(f"drive {name}, which the point does not hold")

    def _device(self, each: QemuOption) -> None:
        members = each.members
        driver, drive = members.text("driver"), members.text("drive")
        if any(driver.startswith(kind) for kind in backends.HOST_DEVICES):
            self.left_out.append(f"device {driver}, which is of that host")
            return
        if self.gone_ids & {members.text("chardev"), members.text("fsdev"), members.text("tpmdev")}:
            self.left_out.append(f"device {driver}")
            return
        if driver.startswith("virtio-9p"):
            self.left_out.append(f"device {driver}, which shows files of that host")
            return
        if drive:
            self._disk_device(each, driver, drive)
            return
        self.out.append(each)

    def _disk_device(self, each: QemuOption, driver: str, drive: str) -> None:
        members = each.members
        found = self.recorded.attached(members.text("id"), drive)
        if found is not None:
            stops = self.around.stop_on_error and driver.startswith(_STOPS)
            stop = {"rerror": "stop", "werror": "stop"} if stops else {}
            self.placed.add(found.id)
            self.out.append(each.with_members(members.replaced({"drive": found.name, **stop})))
        elif drive in self.recorded.kept_nodes:
            self.out.append(each)
        elif drive in self.recorded.kept_drives:
            self._needs(self.recorded.file_of(drive))
            self.out += [option("drive", self.recorded.drives[drive].render()), each]
        elif driver.endswith("-cd") or driver == "floppy":
            self.left_out.append(f"what was in drive {members.text('id') or drive}")
            self.out.append(each.with_members(members.without("drive")))
        else:
            name = members.text("id") or drive
            self.left_out.append(f"device {name}, whose disk the point does not hold")

    def _machine(self, each: QemuOption) -> None:
        members = each.members.without("accel", "dump-guest-core")
        changes: dict[str, Any] = {}
        if self.record.machine:
            changes["type"] = self.record.machine
        for name in ("pflash0", "pflash1"):
            node = members.text(name)
            found = self.recorded.attached(name, node) if node else None
            if found is not None:
                changes[name] = found.name
                self.placed.add(found.id)
        self.out.append(option("machine", members.replaced(changes).render()))

    def _cpu(self, each: QemuOption) -> None:
        name, sign, rest = (each.value or "").partition(",")
        if name != "host":
            self.out.append(each)
            return
        self.left_out.append("-cpu host, in whose place there is max")
        self.out.append(option("cpu", f"max{sign}{rest}"))

    def _chardev(self, each: QemuOption) -> None:
        identity, backend = each.members.text("id"), each.members.text("backend")
        if identity in self._of_monitors() or backend.startswith("spice"):
            self.gone_ids.add(identity)
            return
        self.out.append(backends.socket(self.around.sockets, identity))

    def _of_monitors(self) -> set[str]:
        return (
            {each.members.text("chardev") for each in self.given if each.name == "mon"}
            - {each.members.text("chardev") for each in self.given if each.name == "device"}
            - {
                (each.value or "").removeprefix("chardev:")
                for each in self.given
                if each.name == "serial"
            }
        )

    def _serial(self, each: QemuOption) -> None:
        value = each.value or ""
        if value == "none" or value.startswith("chardev:"):
            self.out.append(each)
            return
        log = f"{self.around.logs}/serial{self.serials}.log"
        name = self._free_id(f"serial{self.serials}")
        self.serials += 1
        socket = backends.socket(self.around.sockets, name, log)
        self.out += [socket, option("serial", f"chardev:{name}")]

    def _free_id(self, name: str) -> str:
        """A name that no recorded character device has."""
        taken = {each.members.text("id") for each in self.given if each.name == "chardev"}
        while name in taken:
            name += "-ours"
        return name

    def _nographic(self, each: QemuOption) -> None:
        del each
        if not any(other.name == "serial" for other in self.given):
            self._serial(option("serial", "stdio"))

    def _netdev(self, each: QemuOption) -> None:
        if not self.around.network:
            self.hubs += 1
            each = backends.closed_netdev(each, self.hubs)
        self.out.append(each)

    def _nic(self, each: QemuOption) -> None:
        if not self.around.network and each.members.text("type") != "none":
            self.hubs += 1
            each = backends.closed_nic(each, self.hubs)
        self.out.append(each)

    def _net(self, each: QemuOption) -> None:
        if self.around.network or each.members.text("type") in {"nic", "none"}:
            self.out.append(each)

    def _object(self, each: QemuOption) -> None:
        kind = each.members.text("qom-type")
        if kind.startswith(backends.HOST_OBJECTS):
            self.left_out.append(f"object {each.members.text('id')} ({kind})")
            return
        if kind == "memory-backend-file":
            self.left_out.append(f"the file of memory {each.members.text('id')}")
            each = backends.plain_memory(each)
        self.out.append(each)

    def _audiodev(self, each: QemuOption) -> None:
        self.out.append(backends.silent(each))

    def _audio(self, each: QemuOption) -> None:
        self.out.append(backends.silent_card(each))

    # What is ours

    def _add_ours(self) -> None:
        names = {each.name for each in self.given}
        if not names & {"machine", "M"} and self.record.machine:
            self.out.append(option("machine", self.record.machine))
        if not self.around.network and not names & {"nic", "net", "netdev", "nodefaults"}:
            self.out.append(option("nic", f"hubport,hubid={self.hubs + 1}"))
        drivers = {each.members.text("driver") for each in self.given if each.name == "device"}
        if not names & {"serial", "nographic", "nodefaults"} and "isa-serial" not in drivers:
            self._serial(option("serial", "vc"))
        accelerators = self.around.accelerators or backends.accelerators(self.given)
        self.out.append(option("display", "none"))
        self.out += [option("accel", each) for each in accelerators]
        for name in self.around.monitors:
            path = f"{self.around.sockets}/{name}".replace(",", ",,")
            self.out.append(option("qmp", f"unix:{path},server=on,wait=off"))
        self.out += [option("monitor", "none"), QemuOption("S")]

    def _agent(self) -> str:
        for each in self.given:
            if each.name == "device" and each.members.text("name") == AGENT_PORT:
                return backends.socket_path(self.around.sockets, each.members.text("chardev"))
        return ""

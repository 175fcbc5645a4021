# SPDX-License-Identifier: Apache-2.0
"""The folder of a booted VM: its overlays, and a journal that says how far it has come.

    boot.json            which point, what is recorded of the VM, and the phase; replaced durably
    DISK.overlay.qcow2   what the guest has written since
    DISK.qcow2           the disk itself, once `settle` has restored it beside
    *.log                what QEMU, its serial ports and the keeper said

    point       the point is served, overlays stand on it
    restored    the disks are here, too
    local       overlays stand on them
    completing  the VM stands still, and is put on the disks, each of which is noted as `settled` then
    settled     no overlay is left, and the VM runs on

In each phase a VM that is started anew gets the same contents (`nodes_of`): an overlay holds all that
was written since, whatever of it is below already, until its disk is noted as settled, which is done
while the VM stands still.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from qmpbackup.durable import make_folders, replace_file, storage_errors
from qmpbackup.errors import DamagedError, NoSuchTarget
from qmpbackup.filelock import is_locked, locked, runtime_folder
from qmpbackup.machine.booting import NODE, is_there
from qmpbackup.machine.command_line import masked
from qmpbackup.model import VmConfig, VmIdentity
from qmpbackup.plan.boot_disks import OVERLAY, Attached
from qmpbackup.state import state_folder
from qmpbackup.targets.names import folder_name

JOURNAL = "boot.json"
SCHEMA = 1
MONITORS = ("qmp", "keeper", "settle")
"""Monitors of a booted VM: for its users, for what watches it, and for what moves it."""


class BootPhase(StrEnum):
    """How far a booted VM has come."""

    POINT = "point"
    RESTORED = "restored"
    LOCAL = "local"
    COMPLETING = "completing"
    SETTLED = "settled"


@dataclass(frozen=True, slots=True)
class BootedDisk:
    """A disk of a booted VM; `number` names its nodes. `settled`: it has no overlay any more. `bitmap` and
    `end_mark` are those that count from the point. `own_node` is the name that its node had (empty: it is
    known by something else), by which the next backup knows it again."""

    id: str
    source_file: str
    size: int
    number: int
    settled: bool = False
    bitmap: str = ""
    end_mark: str = ""
    own_node: str = ""

    @property
    def node(self) -> str:
        """The node of the overlay, that the guest's device is put on until the disk is settled."""
        return f"{NODE}{self.number}"

    @property
    def point_node(self) -> str:
        """The node of the served point."""
        return f"{NODE}{self.number}-point"

    @property
    def base_node(self) -> str:
        """The node of the disk that has been restored beside."""
        return self.own_node or f"{NODE}{self.number}-base"


@dataclass(frozen=True, slots=True)
class Boot:
    """What the journal says of a booted VM. `accelerators` are those asked for; `original` is the VM that
    the point is of (nothing in journals of before)."""

    target: str
    vm: str
    point: str
    name: str
    machine: str
    command_line: tuple[str, ...]
    disks: tuple[BootedDisk, ...]
    phase: BootPhase = BootPhase.POINT
    network: bool = False
    accelerators: tuple[str, ...] = ()
    original: VmIdentity = field(default_factory=VmIdentity)

    @property
    def shown_target(self) -> str:
        """The target as it may be seen: a location may hold a password."""
        return next(masked([self.target]))

    @property
    def record(self) -> VmConfig:
        """What is recorded of the VM."""
        return VmConfig(VmIdentity(name=self.name), "", self.machine, self.command_line)


@dataclass(frozen=True, slots=True)
class BootFolder:
    """Where a booted VM is."""

    path: Path

    @property
    def sockets(self) -> Path:
        """The folder of its sockets, whose paths have to be short."""
        name = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:10]
        return runtime_folder() / f"boot-{name}"

    @property
    def served(self) -> Path:
        """The socket at which the point is served."""
        return self.sockets / "point"

    @property
    def keeper_log(self) -> Path:
        """What the keeper says."""
        return self.path / "keeper.log"

    @property
    def was_started(self) -> bool:
        """Whether a keeper was ever begun; before that, no VM has written anything."""
        return self.keeper_log.exists()

    def monitor(self, name: str) -> Path:
        """The socket of one of `MONITORS`."""
        return self.sockets / name

    def overlay(self, disk: BootedDisk) -> Path:
        """The file with what the guest has written."""
        return self.path / f"{folder_name(disk.id)}{OVERLAY}"

    def base(self, disk: BootedDisk) -> Path:
        """The file that the disk is restored to, which `restore --output` names so."""
        return self.path / f"{folder_name(disk.id)}.qcow2"

    def load(self) -> Boot:
        """The journal.

        Raises:
            NoSuchTarget: nothing was booted there.
            DamagedError: it cannot be understood.
        """
        try:
            text = (self.path / JOURNAL).read_bytes()
        except FileNotFoundError:
            raise NoSuchTarget(
                f"No VM was booted in {self.path}.",
                "`qmpbackup boot --list` shows those there are.",
            ) from None
        with storage_errors(f"read {self.path / JOURNAL}"):
            try:
                return _parsed(json.loads(text))
            except (ValueError, TypeError, KeyError) as error:
                raise DamagedError(
                    f"{self.path / JOURNAL} is damaged: {error}.",
                    "Disks and overlays are beside it; delete the folder if nobody needs them.",
                ) from error

    def store(self, boot: Boot) -> None:
        """Write the journal, durably."""
        data = json.dumps({"schema": SCHEMA, **asdict(boot)}, indent=1) + "\n"
        with storage_errors(f"write {self.path / JOURNAL}"):
            replace_file(self.path / JOURNAL, data.encode())

    def enter(self, phase: BootPhase) -> Boot:
        """Note that the VM has come to a phase."""
        return self.change(self.load(), phase=phase)

    def change(self, boot: Boot, **changes: Any) -> Boot:
        """Note a change, if it is one."""
        changed = replace(boot, **changes)
        if changed != boot:
            self.store(changed)
        return changed

    @contextmanager
    def claimed(self, what: str = "boot", wait: float = 0.0) -> Iterator[None]:
        """Be the only one to do `what` here.

        Raises:
            Locked: somebody else does.
        """
        with storage_errors(f"write to {self.path}"):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(self.path / f"{what}.lock", flags, 0o600)
        try:
            with locked(fd, f"the booted VM in {self.path}", wait=wait):
                yield
        finally:
            os.close(fd)

    def is_claimed(self, what: str) -> bool:
        """Whether somebody does that here."""
        try:
            return is_locked(self.path / f"{what}.lock")
        except OSError:
            return False

    def remove_sockets(self) -> None:
        """Remove the folder of its sockets, unless anybody listens there; for who keeps it, so that nobody
        begins to meanwhile."""
        for name in (*MONITORS, self.served.name):
            if is_there(self.sockets / name):
                return
        shutil.rmtree(self.sockets, ignore_errors=True)

    # The list of all of them

    def register(self) -> None:
        """Have `booted` list it."""
        with storage_errors(f"write to {_registry()}"):
            make_folders(_registry())
            link = _registry() / self.sockets.name
            link.unlink(missing_ok=True)
            link.symlink_to(self.path)

    def forget(self) -> None:
        """Have it listed no more."""
        with suppress(OSError):
            (_registry() / self.sockets.name).unlink()


def _parsed(value: dict[str, Any]) -> Boot:
    if value.pop("schema") != SCHEMA:
        raise ValueError("a newer version of qmpbackup wrote it")
    return Boot(
        disks=tuple(BootedDisk(**each) for each in value.pop("disks")),
        phase=BootPhase(value.pop("phase")),
        command_line=tuple(value.pop("command_line")),
        accelerators=tuple(value.pop("accelerators")),
        original=VmIdentity(**value.pop("original", {})),
        **value,
    )


def _registry() -> Path:
    return state_folder() / "booted"


def booted() -> Iterator[BootFolder]:
    """All booted VMs of this user."""
    with suppress(FileNotFoundError):
        for link in sorted(_registry().iterdir()):
            if not link.is_symlink():
                continue
            folder = BootFolder(link.readlink())
            if (folder.path / JOURNAL).exists():
                yield folder
            else:
                folder.remove_sockets()
                link.unlink(missing_ok=True)


# What QEMU is given


def nodes_of(folder: BootFolder, boot: Boot) -> list[Attached]:
    """The nodes of the disks for a VM that is started now."""
    return [_attached(folder, disk, boot.phase) for disk in boot.disks]


def _attached(folder: BootFolder, disk: BootedDisk, phase: BootPhase) -> Attached:
    if disk.settled:
        return Attached(disk.id, disk.source_file, _image(disk.base_node, folder.base(disk)))
    served = phase is BootPhase.POINT
    below = point_of(folder, disk) if served else base_of(folder, disk)
    overlay = overlay_of(folder, disk) | {"backing": below["node-name"]}
    return Attached(disk.id, disk.source_file, overlay, (below,))


def overlay_of(folder: BootFolder, disk: BootedDisk) -> dict[str, Any]:
    """The overlay alone, which stands on what its `backing` says."""
    return _image(disk.node, folder.overlay(disk))


def base_of(folder: BootFolder, disk: BootedDisk) -> dict[str, Any]:
    """The disk that has been restored beside. QEMU writes to it only when it commits the overlay."""
    return _image(disk.base_node, folder.base(disk)) | {"read-only": True}


def _image(node: str, path: Path) -> dict[str, Any]:
    return {
        "driver": "qcow2",
        "node-name": node,
        "discard": "unmap",
        "file": {"driver": "file", "filename": str(path), "node-name": f"{node}-file"},
    }


def point_of(folder: BootFolder, disk: BootedDisk) -> dict[str, Any]:
    """The served point. Reads wait so many seconds for a server that was lost; longer, and QEMU could not
    be told anything for as long; then the VM stands still."""
    return {
        "driver": "nbd",
        "node-name": disk.point_node,
        "read-only": True,
        "server": {"type": "unix", "path": str(folder.served)},
        "export": disk.id,
        "reconnect-delay": 10,
        "open-timeout": 30,
    }


def point_uri(folder: BootFolder, disk: BootedDisk) -> str:
    """The address of the served disk, which the overlay's header has, so that nobody takes it for whole."""
    from urllib.parse import quote

    return f"nbd+unix:///{quote(disk.id, safe='')}?socket={quote(str(folder.served))}"

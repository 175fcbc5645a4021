# SPDX-License-Identifier: Apache-2.0
"""The block devices of a VM: which are disks, what each is like, and why the others are none.

A disk's *active node* is the one its device sits on; its *format node* the first below all filters,
where bitmaps live. What could not be backed up rightly is no disk here but is named with the reason, so
that the others can be saved without it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from qmpbackup.errors import CommandError
from qmpbackup.machine.graph import FILTERS, PERIPHERAL, Graph, device_path
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.reply import Reply
from qmpbackup.machine.sharing import Locks, is_shared, writers
from qmpbackup.machine.steps import answers
from qmpbackup.machine.underlays import Search
from qmpbackup.model import Absence, Bitmap, Disk, Skipped
from qmpbackup.plan.commands import Command
from qmpbackup.plan.disk_ids import Candidate, choose_ids
from qmpbackup.plan.names import RUN_PREFIX

_PASSES_COMMANDS = frozenset({"scsi-block", "scsi-generic"})
"""Devices whose guest talks to the host's device itself (hw/scsi/scsi-disk.c, scsi-generic.c): writes
pass by every node as commands, and a filter below them would make the guest's commands fail."""

_LOCAL = frozenset({"file", "host_device"})
"""Drivers that lock what they open."""

_FOLDER = "vvfat"
"""The driver that makes a file system up from a folder of the host, and reads the files there when it is
read itself (block/vvfat.c)."""


@dataclass(frozen=True, slots=True)
class _Device:
    """What the monitor tells of the guest's device that a drive belongs to, besides the drive.

    `kind` is its type, empty where the monitor cannot reach it; `passes_commands` whether a virtio
    device is told to (`scsi=on`).
    """

    kind: str
    passes_commands: bool


@dataclass(frozen=True, slots=True)
class _Found:
    """A disk, at first without an id, and its device. `place` is the name of the device's place in the
    block graph."""

    disk: Disk
    device: _Device
    device_id: str
    user_node: str
    place: str


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What it takes to look at a disk: all nodes, how they hang together, and the files below.

    Only where QEMU is `active` on its images, and not on either side of a migration, do permissions and
    locks say anything.
    """

    nodes: Mapping[str, Reply]
    graph: Graph
    search: Search
    locks: Locks
    active: bool


def disks_of(
    monitor: Monitor, drives: Sequence[Reply], around: Surroundings
) -> tuple[tuple[Disk, ...], tuple[Skipped, ...]]:
    """The disks among the drives of `query-block`, and the others with the reason."""
    skipped: list[Skipped] = []
    writable: list[Reply] = []
    for drive in drives:
        reason = _no_disk(drive)
        if reason:
            skipped.append(Skipped(_shown(drive), reason))
        else:
            writable.append(drive)
    devices = _devices(monitor, writable)
    found = [_found(drive, devices[drive.text("qdev")], around) for drive in writable]
    users = Counter(each.disk.node for each in found)
    disks = []
    for each in _with_ids(found):
        disk = each.disk
        reason = _obstacle(each, users[disk.node], around)
        if reason:
            skipped.append(Skipped(disk.id, reason, Absence.IMPOSSIBLE, disk.aliases))
        else:
            disks.append(replace(disk, other_writers=_other_writers(each, around)))
    return tuple(disks), tuple(skipped)


def _shown(drive: Reply) -> str:
    qdev = drive.text("qdev", "")
    if device := drive.text("device", ""):
        return device
    path = device_path(qdev)
    return path.removeprefix(PERIPHERAL) if path.startswith(PERIPHERAL) else path.rpartition("/")[2]


def _no_disk(drive: Reply) -> str:
    """Why there is nothing to back up in a drive; empty if there may be."""
    inserted = drive.optional("inserted")
    if inserted is None:
        return "empty drive"
    if inserted.boolean("ro"):
        return "read-only"
    return "" if drive.text("qdev", "") else "no guest device uses it"


def _devices(monitor: Monitor, drives: Sequence[Reply]) -> dict[str, _Device]:
    """The devices of drives, by what the drives call them."""
    names = [drive.text("qdev") for drive in drives]
    asked = [(name, each) for name in names for each in ("type", "scsi")]
    told = dict(answers(monitor, asked, lambda question: _property(*question)))
    kinds = {name: told[name, "type"] for name in names}
    return {
        name: _Device(
            "" if isinstance(kind, CommandError) else str(kind), told[name, "scsi"] is True
        )
        for name, kind in kinds.items()
    }


def _property(device: str, name: str) -> Command:
    return Command("qom-get", {"path": device_path(device), "property": name})


def _obstacle(found: _Found, users: int, around: Surroundings) -> str:
    """Why a disk cannot be backed up at all; empty if it can."""
    node, device = found.disk.node, found.device
    if node.startswith(RUN_PREFIX):
        return ""  # it was backed up when a run died, and is to be put back on its node
    if not device.kind:
        return "the monitor cannot reach its device, whose id has characters that QEMU takes apart"
    if device.kind in _PASSES_COMMANDS:
        return f"{device.kind} passes the guest's commands to the host's device, and QEMU sees no writes"
    if users > 1:
        return (
            f"{users} devices of the guest write to its node {node}, and a view has room for one; "
            "unplug the others for the time of the backup"
        )
    return _writing_now(found, around) if around.active else ""


def _writing_now(found: _Found, around: Surroundings) -> str:
    others = writers(around.graph, found.disk.node, found.place)
    if others:
        named = ", ".join(filter(None, others)) or "an export"
        return f"{named} in this QEMU writes to its nodes, too, past any view of the disk"
    if around.locks.others_write(_files(found.disk.format_node, around)):
        return "another process has its image open for writing, and QEMU makes no view of it then"
    return ""


def _other_writers(found: _Found, around: Surroundings) -> str:
    """How others may write to a disk where no bitmap sees it; empty if nobody may."""
    disk = found.disk
    if not around.active:
        return ""
    if found.device.passes_commands:
        return "the guest may send commands to the host's device (scsi=on)"
    if _lies_on(disk.format_node, _FOLDER, around):
        return "it shows a folder of the host (vvfat), where anybody may write"
    if is_shared(around.graph, disk.format_node):
        return "others may write to it (share-rw=on)"
    if around.locks.missing(_files(disk.format_node, around)):
        return "QEMU does not lock its image, so others may write to it (locking=off)"
    return ""


def _lies_on(format_node: str, driver: str, around: Surroundings) -> bool:
    """Whether a node of this driver is below a format node."""
    found = map(around.nodes.get, around.graph.under(format_node))
    return any(reply is not None and reply.text("drv") == driver for reply in found)


def _files(format_node: str, around: Surroundings) -> Iterator[str]:
    """The local files below a format node."""
    for node in around.graph.under(format_node):
        reply = around.nodes.get(node)
        if reply is not None and reply.text("drv") in _LOCAL:
            yield reply.nested("image").text("filename")


def _found(drive: Reply, device: _Device, around: Surroundings) -> _Found:
    inserted, graph, nodes = drive.nested("inserted"), around.graph, around.nodes
    node = inserted.text("node-name")
    format_node = graph.below(node, nodes, _is_filter)
    format_reply = nodes.get(format_node, inserted)
    image = format_reply.nested("image")
    driver = format_reply.text("drv")
    path = device_path(drive.text("qdev"))
    device_id = path.removeprefix(PERIPHERAL) if path.startswith(PERIPHERAL) else ""
    if device.kind:  # else the id itself may have a slash
        device_id = device_id.partition("/")[0]
    below_ours = graph.below(node, nodes, _is_ours)
    user_nodes = (name for name in (below_ours, format_node) if not name.startswith("#"))
    can_persist = _can_persist(driver, image)
    disk = Disk(
        id="",
        qom_path=path,
        drive=drive.text("device", ""),
        node=node,
        format_node=format_node,
        format=driver,
        size=inserted.nested("image").integer("virtual-size"),
        filename=image.text("filename"),
        can_persist=can_persist,
        below_ours=below_ours,
        bitmaps=tuple(map(bitmap_of, format_reply.objects("dirty-bitmaps"))),
        actual_size=image.integer("actual-size", 0),
        encrypted=driver == "luks" or image.boolean("encrypted", False),
        underlays=tuple(around.search.of(format_node, keeps_bitmaps=can_persist)),
        snapshots=tuple(each.text("name", "") for each in image.objects("snapshots")),
    )
    place = disk.drive or drive.text("qdev")
    return _Found(disk, device, device_id, next(user_nodes, ""), place)


def _can_persist(driver: str, image: Reply) -> bool:
    """Only qcow2 of version 3 stores bitmaps (QEMU docs/interop/qcow2, "Bitmaps extension")."""
    if driver != "qcow2":
        return False
    specific = image.optional("format-specific")
    return specific is None or specific.nested("data").text("compat", "1.1") != "0.10"


def bitmap_of(reply: Reply) -> Bitmap:
    """A bitmap as QEMU describes it."""
    return Bitmap(
        name=reply.text("name", ""),
        count=reply.integer("count"),
        granularity=reply.integer("granularity"),
        recording=reply.boolean("recording"),
        busy=reply.boolean("busy"),
        persistent=reply.boolean("persistent"),
        inconsistent=reply.boolean("inconsistent", False),
    )


def _with_ids(found: Sequence[_Found]) -> Iterator[_Found]:
    candidates = [
        Candidate(device=each.device_id, drive=each.disk.drive, node=each.user_node)
        for each in found
    ]
    ids = iter(choose_ids(candidates))
    for each in found:
        names = (each.device_id, each.disk.drive, each.user_node, each.disk.node)
        aliases = tuple(dict.fromkeys(filter(None, names)))
        yield replace(each, disk=replace(each.disk, id=next(ids), aliases=aliases))


def _is_filter(node: Reply) -> bool:
    return node.text("drv") in FILTERS


def _is_ours(node: Reply) -> bool:
    return node.text("node-name").startswith(RUN_PREFIX)

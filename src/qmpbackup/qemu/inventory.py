# SPDX-License-Identifier: Apache-2.0
"""What the VM consists of: its disks, what is no disk of ours and why, its name and state.

Everything is asked in one go and nothing twice. A disk's *active node* is the one its device sits
on; its *format node* the first below all filters, where bitmaps live.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qmpbackup.errors import CommandError, VmError
from qmpbackup.model import Bitmap, Disk, Skipped, Vm, VmConfig, VmIdentity
from qmpbackup.plan.commands import Command
from qmpbackup.plan.disk_ids import Candidate, choose_ids
from qmpbackup.plan.names import FROZEN_MARKER, RUN_PREFIX
from qmpbackup.qemu import command_line, libvirt
from qmpbackup.qemu.monitor import Monitor
from qmpbackup.qemu.reply import Reply, objects

OLDEST_QEMU = (7, 1)
"""`on-cbw-error` and `cbw-timeout`, which keep a failing scratch from the guest, came with 7.1."""

FILTERS = frozenset({"throttle", "copy-on-read", "copy-before-write", "compress", "preallocate"})
"""Filter drivers of QEMU that may sit between a device and its format node."""

PERIPHERAL = "/machine/peripheral/"


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What carries the prefix of a run of ours, when no run of ours is under way."""

    nodes: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    descriptor_sets: tuple[int, ...] = ()
    markers: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return any((self.nodes, self.jobs, self.descriptor_sets, self.markers, self.exports))


@dataclass(frozen=True, slots=True)
class Inventory:
    """The VM, and what an earlier run left in it."""

    vm: Vm
    leftovers: Leftovers

    @property
    def needs_recovery(self) -> bool:
        """Whether anything of an earlier run is left in the VM."""
        temporary = (
            bitmap.name.startswith(RUN_PREFIX) for disk in self.vm.disks for bitmap in disk.bitmaps
        )
        return bool(self.leftovers) or any(temporary)

    @property
    def was_frozen(self) -> bool:
        """Whether an earlier run died between freezing the guest and thawing it."""
        return FROZEN_MARKER in self.leftovers.markers


QUESTIONS = (
    Command("query-status"),
    Command("query-block"),
    Command("query-named-block-nodes", {"flat": True}),
    Command("query-name"),
    Command("query-uuid"),
    Command("query-iothreads"),
    Command("query-jobs"),
    Command("query-fdsets"),
    Command("query-block-exports"),
    Command("qom-list", {"path": "/objects"}),
    Command("qom-get", {"path": "/machine", "property": "type"}),
)


def require_version(monitor: Monitor) -> None:
    """Refuse a QEMU that cannot do what we promise, before anything is touched.

    Raises:
        VmError: QEMU is older than 7.1.
    """
    if monitor.version[:2] < OLDEST_QEMU:
        shown = ".".join(map(str, monitor.version))
        raise VmError(
            f"This VM runs QEMU {shown}; backups need 7.1 or later.",
            "Older versions cannot keep a failing backup from hurting the guest. Restart the VM on "
            "a newer QEMU.",
        )


def take(monitor: Monitor) -> Inventory:
    """Ask the VM for everything a run needs to know.

    Raises:
        VmError: the VM cannot be asked, or answers what cannot be understood.
    """
    status, block, nodes, name, uuid, iothreads, jobs, fdsets, exports, things, machine = (
        monitor.execute_all(QUESTIONS)
    )
    by_name = {node.text("node-name"): node for node in objects(nodes, "query-named-block-nodes")}
    graph = _Graph(monitor)
    seats, skipped = _seats(objects(block, "query-block"), by_name, graph)
    state = Reply(status, "query-status")
    pid = monitor.peer_pid
    vm = Vm(
        config=VmConfig(
            identity=VmIdentity(
                uuid=_real_uuid(Reply(uuid, "query-uuid").text("UUID")),
                name=Reply(name, "query-name").text("name", ""),
                address=_absolute(monitor.address),
            ),
            qemu_version=".".join(map(str, monitor.version)),
            machine=str(machine).removesuffix("-machine"),
            command_line=command_line.of_process(pid),
        ),
        version=monitor.version,
        status=state.text("status"),
        running=state.boolean("running"),
        has_iothreads=any(True for _ in objects(iothreads, "query-iothreads")),
        disks=libvirt.with_labels(_with_ids(seats), pid),
        skipped=tuple(skipped),
        pid=pid,
    )
    leftovers = _leftovers(by_name, jobs, fdsets, exports, things)
    if not vm.running:
        # While a VM does not run, QEMU keeps removed descriptors and goes on listing them
        # (monitor/fds.c, monitor_fdset_cleanup), so they say nothing about a run that died.
        leftovers = replace(leftovers, descriptor_sets=())
    return Inventory(vm, leftovers)


def device_path(qdev: str) -> str:
    """The QOM path of the device whose `drive` property a `query-block` entry names.

    Devices with an id are named by it, others by their path; virtio devices by their inner half.
    """
    if not qdev.startswith("/"):
        return f"{PERIPHERAL}{qdev}"
    return qdev.removesuffix("/virtio-backend")


@dataclass(frozen=True, slots=True)
class _Seat:
    """A disk before it has an id."""

    disk: Disk
    device_id: str
    user_node: str


def _seats(
    drives: Iterable[Reply], nodes: Mapping[str, Reply], graph: "_Graph"
) -> tuple[list[_Seat], list[Skipped]]:
    seats: list[_Seat] = []
    skipped: list[Skipped] = []
    for drive in drives:
        qdev = drive.text("qdev", "")
        shown = drive.text("device", "") or qdev.removesuffix("/virtio-backend").rpartition("/")[2]
        inserted = drive.optional("inserted")
        if inserted is None:
            skipped.append(Skipped(shown, "empty drive"))
        elif inserted.boolean("ro"):
            skipped.append(Skipped(shown, "read-only"))
        elif not qdev:
            skipped.append(Skipped(shown, "no guest device uses it"))
        else:
            seats.append(_seat(drive, qdev, inserted, nodes, graph))
    return seats, skipped


def _seat(
    drive: Reply, qdev: str, inserted: Reply, nodes: Mapping[str, Reply], graph: "_Graph"
) -> _Seat:
    node = inserted.text("node-name")
    format_node = graph.below(node, nodes, _is_filter)
    format_reply = nodes.get(format_node, inserted)
    image = format_reply.nested("image")
    driver = format_reply.text("drv")
    path = device_path(qdev)
    device_id = path.removeprefix(PERIPHERAL).split("/")[0] if path.startswith(PERIPHERAL) else ""
    below_ours = graph.below(node, nodes, _is_ours)
    user_nodes = (name for name in (below_ours, format_node) if not name.startswith("#"))
    disk = Disk(
        id="",
        qom_path=path,
        drive=drive.text("device", ""),
        node=node,
        format_node=format_node,
        format=driver,
        size=inserted.nested("image").integer("virtual-size"),
        filename=image.text("filename"),
        can_persist=_can_persist(driver, image),
        below_ours=below_ours,
        bitmaps=tuple(_bitmap(each) for each in format_reply.objects("dirty-bitmaps")),
        actual_size=image.integer("actual-size", 0),
        encrypted=driver == "luks" or image.boolean("encrypted", False),
    )
    return _Seat(disk, device_id, next(user_nodes, ""))


def _can_persist(driver: str, image: Reply) -> bool:
    """Only qcow2 of version 3 stores bitmaps (QEMU docs/interop/qcow2, "Bitmaps extension")."""
    if driver != "qcow2":
        return False
    specific = image.optional("format-specific")
    return specific is None or specific.nested("data").text("compat", "1.1") != "0.10"


def _bitmap(reply: Reply) -> Bitmap:
    return Bitmap(
        name=reply.text("name", ""),
        count=reply.integer("count"),
        granularity=reply.integer("granularity"),
        recording=reply.boolean("recording"),
        busy=reply.boolean("busy"),
        persistent=reply.boolean("persistent"),
        inconsistent=reply.boolean("inconsistent", False),
    )


def _with_ids(seats: list[_Seat]) -> tuple[Disk, ...]:
    candidates = [
        Candidate(device=seat.device_id, drive=seat.disk.drive, node=seat.user_node)
        for seat in seats
    ]
    return tuple(
        replace(
            seat.disk,
            id=disk_id,
            aliases=tuple(
                dict.fromkeys(
                    filter(None, (seat.device_id, seat.disk.drive, seat.user_node, seat.disk.node))
                )
            ),
        )
        for seat, disk_id in zip(seats, choose_ids(candidates), strict=True)
    )


class _Graph:
    """The edges of the block graph, asked for only when a filter sits on a disk."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._children: dict[str, str] | None = None

    def below(self, node: str, nodes: Mapping[str, Reply], passes: Callable[[Reply], bool]) -> str:
        """The first node from `node` downwards that `passes` does not hold for."""
        for _ in range(len(nodes) + 1):
            reply = nodes.get(node)
            child = self._child(node) if reply is not None and passes(reply) else None
            if child is None:
                return node
            node = child
        raise VmError("The block graph that QEMU shows has a circle.")

    def _child(self, node: str) -> str | None:
        if self._children is None:
            self._children = dict(self._edges())
        return self._children.get(node)

    def _edges(self) -> Iterator[tuple[str, str]]:
        graph = Reply(self._monitor.execute(Command("x-debug-query-block-graph")), "block graph")
        names = {
            item.integer("id"): item.text("name")
            for item in graph.objects("nodes")
            if item.text("type") == "block-driver"
        }
        for edge in graph.objects("edges"):
            parent, child = edge.integer("parent"), edge.integer("child")
            if edge.text("name") == "file" and parent in names and child in names:
                yield names[parent], names[child]


def _is_filter(node: Reply) -> bool:
    return node.text("drv") in FILTERS


def _is_ours(node: Reply) -> bool:
    return node.text("node-name").startswith(RUN_PREFIX)


def _leftovers(
    nodes: Mapping[str, Reply], jobs: object, fdsets: object, exports: object, things: object
) -> Leftovers:
    def ours(value: object, where: str, member: str) -> tuple[str, ...]:
        texts = (reply.text(member, "") for reply in objects(value, where))
        return tuple(text for text in texts if text.startswith(RUN_PREFIX))

    sets = tuple(
        each.integer("fdset-id")
        for each in objects(fdsets, "query-fdsets")
        if any(fd.text("opaque", "").startswith(RUN_PREFIX) for fd in each.objects("fds"))
    )
    return Leftovers(
        nodes=tuple(name for name in nodes if name.startswith(RUN_PREFIX)),
        jobs=ours(jobs, "query-jobs", "id"),
        descriptor_sets=sets,
        markers=ours(things, "qom-list", "name"),
        exports=ours(exports, "query-block-exports", "id"),
    )


def _real_uuid(uuid: str) -> str:
    """QEMU reports zeros for a VM that was started without `-uuid`."""
    return uuid if uuid.strip("0-") else ""


def _absolute(address: str) -> str:
    if address.startswith("tcp:"):
        return address
    return str(Path(address.removeprefix("unix:")).resolve())


def has_tpm(monitor: Monitor) -> bool:
    """Whether the VM has a TPM, whose state no point holds."""
    (answer,) = monitor.execute_each([Command("query-tpm")])
    return not isinstance(answer, CommandError) and any(True for _ in objects(answer, "query-tpm"))


def bitmap_counts(monitor: Monitor, node: str) -> dict[str, int]:
    """How many bytes each bitmap of a node has marked."""
    nodes = monitor.execute(Command("query-named-block-nodes", {"flat": True}))
    for reply in objects(nodes, "query-named-block-nodes"):
        if reply.text("node-name") == node:
            found = map(_bitmap, reply.objects("dirty-bitmaps"))
            return {bitmap.name: bitmap.count for bitmap in found}
    return {}

# SPDX-License-Identifier: Apache-2.0
"""What the VM consists of: its disks, what no point can hold and why, its name and state.

block_devices   which drives are disks, and what these are like
sharing         who else writes to a disk, unseen
underlays       the images below a disk's own
attached        devices that hold data and are no block devices
command_line    what QEMU was started with, without secrets
"""

import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qmpbackup.errors import VmError
from qmpbackup.machine import attached, block_devices, command_line, graph, libvirt
from qmpbackup.machine.block_devices import Surroundings
from qmpbackup.machine.graph import Graph
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.reply import Reply, objects
from qmpbackup.machine.sharing import Locks
from qmpbackup.machine.underlays import Files, Search
from qmpbackup.model import Vm, VmConfig, VmIdentity
from qmpbackup.plan.commands import Command
from qmpbackup.plan.names import FROZEN_MARKER, RUN_PREFIX

_WITHOUT_IMAGES = frozenset({"inmigrate", "postmigrate", "finish-migrate"})
"""States in which another QEMU has the images, and this one has given up all claims (block.c,
bdrv_inactivate_all)."""

OLDEST_QEMU = (7, 1)
"""`on-cbw-error` and `cbw-timeout`, which keep a failing scratch from the guest, came with 7.1."""


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What carries the prefix of a run of ours, when no run of ours is under way."""

    nodes: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    descriptor_sets: tuple[int, ...] = ()
    markers: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return any((self.descriptor_sets, *self._of_a_dead_run))

    @property
    def tell_of_death(self) -> bool:
        """Whether a run died. Descriptor sets alone do not say so: a QEMU that keeps those of a VM that
        stands still shows them for a while once it runs again (`kept_descriptors`)."""
        return any(self._of_a_dead_run)

    @property
    def _of_a_dead_run(self) -> tuple[tuple[str, ...], ...]:
        return self.nodes, self.jobs, self.markers, self.exports


@dataclass(frozen=True, slots=True)
class FoundVm:
    """The VM, and what an earlier run left in it."""

    vm: Vm
    leftovers: Leftovers

    @property
    def needs_recovery(self) -> bool:
        """Whether anything of an earlier run is left in the VM."""
        return bool(self.leftovers) or self._has_temporary_bitmaps

    @property
    def run_died(self) -> bool:
        """Whether that tells of a run that died."""
        return self.leftovers.tell_of_death or self._has_temporary_bitmaps

    @property
    def _has_temporary_bitmaps(self) -> bool:
        return any(
            bitmap.name.startswith(RUN_PREFIX) for disk in self.vm.disks for bitmap in disk.bitmaps
        )

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
    graph.QUESTION,
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


def take(monitor: Monitor, host: str = "") -> FoundVm:
    """Ask the VM for everything a run needs to know; `host` is what its host is called, unless as it
    calls itself.

    Raises:
        VmError: the VM cannot be asked, or answers what cannot be understood.
    """
    status, block, nodes, name, uuid, iothreads, jobs, fdsets, exports, things, machine, edges = (
        monitor.execute_all(QUESTIONS)
    )
    by_name = {node.text("node-name"): node for node in objects(nodes, "query-named-block-nodes")}
    state = Reply(status, "query-status")
    pid = monitor.peer_pid
    words = command_line.of_process(pid)
    files = Files(pid)
    hangs = Graph.of(edges)
    around = Surroundings(
        by_name,
        hangs,
        Search(by_name, hangs, files),
        Locks(files, words),
        active=state.text("status") not in _WITHOUT_IMAGES,
    )
    drives = list(objects(block, "query-block"))
    disks, skipped = block_devices.disks_of(monitor, drives, around)
    vm = Vm(
        config=VmConfig(
            identity=VmIdentity(
                uuid=_real_uuid(Reply(uuid, "query-uuid").text("UUID")),
                name=Reply(name, "query-name").text("name", ""),
                address=_absolute(monitor.address),
                host=host or socket.gethostname(),
            ),
            qemu_version=".".join(map(str, monitor.version)),
            machine=str(machine).removesuffix("-machine"),
            command_line=words,
            process=command_line.process_of(pid),
        ),
        version=monitor.version,
        status=state.text("status"),
        running=state.boolean("running"),
        has_iothreads=any(True for _ in objects(iothreads, "query-iothreads")),
        disks=libvirt.with_labels(disks, pid),
        skipped=(*skipped, *attached.holding_data(monitor.execute_each)),
        pid=pid,
    )
    leftovers = _leftovers(by_name, jobs, fdsets, exports, things)
    if not vm.running:
        # While a VM does not run, QEMU keeps removed descriptors and goes on listing them
        # (monitor/fds.c, monitor_fdset_cleanup), so they say nothing about a run that died.
        leftovers = replace(leftovers, descriptor_sets=())
    return FoundVm(vm, leftovers)


def descriptor_sets(answer: object) -> tuple[int, ...]:
    """The numbers of the descriptor sets of ours, from the answer to `query-fdsets`."""
    return tuple(
        each.integer("fdset-id")
        for each in objects(answer, "query-fdsets")
        if any(fd.text("opaque", "").startswith(RUN_PREFIX) for fd in each.objects("fds"))
    )


def _leftovers(
    nodes: Mapping[str, Reply], jobs: object, fdsets: object, exports: object, things: object
) -> Leftovers:
    def ours(value: object, where: str, member: str) -> tuple[str, ...]:
        texts = (reply.text(member, "") for reply in objects(value, where))
        return tuple(text for text in texts if text.startswith(RUN_PREFIX))

    return Leftovers(
        nodes=tuple(name for name in nodes if name.startswith(RUN_PREFIX)),
        jobs=ours(jobs, "query-jobs", "id"),
        descriptor_sets=descriptor_sets(fdsets),
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


def bitmap_counts(monitor: Monitor, node: str) -> dict[str, int]:
    """How many bytes each bitmap of a node has marked."""
    nodes = monitor.execute(Command("query-named-block-nodes", {"flat": True}))
    for reply in objects(nodes, "query-named-block-nodes"):
        if reply.text("node-name") == node:
            found = map(block_devices.bitmap_of, reply.objects("dirty-bitmaps"))
            return {bitmap.name: bitmap.count for bitmap in found}
    return {}

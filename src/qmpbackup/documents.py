# SPDX-License-Identifier: Apache-2.0
"""What `--json` prints, and whatever else is to say the same: values as versioned JSON objects.

Each has `schema` and `type`; members are added, and none is taken away or given another meaning
(docs/reference/commands.md). Must not know who reads them, nor how they are printed.

Those of many VMs are in `fleet_documents`.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from qmpbackup.model import Disk, Point, Skipped, StoredDisk
from qmpbackup.targets.manifest import point_to_json, time_to_json

if TYPE_CHECKING:
    from qmpbackup.plan.guest_files import GuestFile, GuestFileSystem
    from qmpbackup.plan.missing import NotInPoint
    from qmpbackup.plan.progress import Progress
    from qmpbackup.service import backup, restore, verify
    from qmpbackup.service.boot import Prepared
    from qmpbackup.service.booted import Seen
    from qmpbackup.service.doctor import Finding
    from qmpbackup.service.drill_history import Drilled
    from qmpbackup.service.init import Made
    from qmpbackup.service.serve import Served
    from qmpbackup.service.settle import Settled
    from qmpbackup.targets.removal import Removed

SCHEMA = 1

Document = dict[str, Any]


def document(kind: str, /, **members: object) -> Document:
    """An object of some kind."""
    return {"schema": SCHEMA, "type": kind, **members}


def backed_up(outcome: "backup.Outcome") -> Document:
    """A point that was made."""
    return document(
        "backup",
        point=point_to_json(outcome.point),
        degraded=list(outcome.degraded),
        alarm=outcome.alarm,
    )


def progress(what: "Progress") -> Document:
    """How far a backup is."""
    return document(
        "progress",
        vm=what.vm,
        stage=what.stage.value,
        disks=[{"id": each.disk, "done": each.done, "total": each.total} for each in what.disks],
    )


def plan(what: "backup.Plan") -> Document:
    """What a backup would do."""
    return document(
        "plan",
        target=what.target,
        level=what.level,
        parent=what.parent,
        disks=[
            {
                "id": disk.disk.id,
                "level": disk.level,
                "reason": disk.reason,
                "parent": disk.base.id if disk.base else None,
                "bytes": disk.bytes_to_copy,
            }
            for disk in what.disks
        ],
        skipped=[
            {"name": each.name, "reason": each.reason, "absence": each.absence}
            for each in what.skipped
        ],
        transaction=[command.render() for command in what.transaction],
    )


def listed(point: Point, damaged: Iterable[str]) -> Document:
    """A point in a list; `damaged` are its disks of which a file is known to be."""
    return document(
        "point",
        id=point.id,
        time=time_to_json(point.time),
        level=point.level,
        parent=point.parent,
        vm=point.vm.identity.name,
        uuid=point.vm.identity.uuid,
        host=point.vm.identity.host,
        disks=[disk.id for disk in point.disks],
        labels={disk.id: disk.label for disk in point.disks if disk.label},
        consistency=point.consistency,
        size=point.size,
        merged=[{"id": each.id, "into": each.into} for each in point.merged],
        damaged=list(damaged),
    )


def shown(point: Point) -> Document:
    """A point in full: its manifest."""
    return {**point_to_json(point), "type": "point", "size": point.size}


def restored(outcome: "restore.Outcome") -> Document:
    """What was restored, and what the point lacks."""
    return document(
        "restore",
        point=outcome.point.id,
        disks=[
            {"id": each.disk_id, "file": str(each.path), "size": each.size}
            for each in outcome.disks
        ],
        missing=[_missing(each) for each in outcome.missing],
    )


def _missing(each: "NotInPoint") -> Document:
    return {
        "id": each.id,
        "reason": each.reason,
        "newest": each.newest.id if each.newest else None,
        "degrading": each.degrading,
    }


def verified(report: "verify.Report") -> Iterator[Document]:
    """What was found about each point, and then about all."""
    for verdict in report.verdicts:
        yield document(
            "verdict",
            id=verdict.point.id,
            ok=not verdict.problems,
            problems=list(verdict.problems),
        )
    yield document(
        "summary",
        ok=report.whole,
        points=len(report.verdicts),
        files=report.files,
        size=report.size,
        read_files=report.read_files,
        read_size=report.read_size,
        damaged=[{"path": each.path, "reason": each.reason} for each in report.damaged],
        extra=list(report.extra),
        foreign=list(report.foreign),
    )


def pruned(outcome: "Removed", *, dry_run: bool) -> Iterator[Document]:
    """What became of each point, the newest last, and then of all."""
    for each in reversed(outcome.verdicts):
        yield document(
            "verdict",
            id=each.point.id,
            time=time_to_json(each.point.time),
            keep=each.kept,
            reasons=list(each.reasons),
        )
    yield document(
        "summary",
        dry_run=dry_run,
        kept=len(outcome.kept),
        removed=len(outcome.removed),
        merged=outcome.merged,
        freed=outcome.freed,
    )


def swept(freed: int | None) -> Document:
    """A sweep; `freed` is None where there was nothing to sweep."""
    return document("sweep", freed=freed)


def finding(found: "Finding") -> Document:
    """Something that `doctor` has to say."""
    return document("finding", **asdict(found))


def made(repository: "Made") -> Document:
    """A repository that was made."""
    return document("init", id=repository.id, location=repository.location)


def served(what: "Served") -> Document:
    """Exports that can be read from now on."""
    return document(
        "serve",
        point=what.point.id,
        socket=str(what.socket),
        proved=what.proved,
        exports=[
            {"disk": disk.id, "size": disk.size, "uri": export_uri(what, disk)}
            for disk in what.disks
        ],
    )


def export_uri(what: "Served", disk: StoredDisk) -> str:
    """Where an export is reached, as tools take it."""
    return f"nbd+unix:///{quote(disk.id, safe='')}?socket={quote(str(what.socket.absolute()))}"


def disks(found: Sequence[Disk], skipped: Sequence[Skipped]) -> Iterator[Document]:
    """The disks of a VM, as the original showed them: without a schema."""
    yield from map(asdict, found)
    for each in skipped:
        yield {"skipped": each.name, "reason": each.reason, "absence": each.absence}


def bitmaps(found: Sequence[Disk]) -> Iterator[Document]:
    """The bitmaps of a VM's disks, likewise."""
    for disk in found:
        yield {"disk": disk.id, "node": disk.format_node, "bitmaps": asdict(disk)["bitmaps"]}


def _places(found: "Prepared") -> Document:
    return {
        "point": found.boot.point,
        "folder": str(found.folder.path),
        "qmp": str(found.folder.monitor("qmp")),
        "agent": found.launch.agent,
        "consoles": list(found.launch.consoles),
        "left_out": list(found.launch.left_out),
    }


def booted(found: "Prepared") -> Document:
    """A VM that runs from a point."""
    return document("boot", **_places(found))


def bootable(found: "Prepared") -> Document:
    """How a VM would be booted from a point."""
    return document(
        "boot-print",
        **_places(found),
        commands=found.by_hand(),
        needs=list(found.launch.needs),
        obstacles=list(found.obstacles),
    )


def seen(found: "Seen") -> Document:
    """A VM that was booted, as it is now."""
    return document(
        "booted",
        folder=str(found.folder.path),
        point=found.boot.point,
        target=found.boot.shown_target,
        phase=found.boot.phase.value,
        status=found.status,
        kept=found.kept,
    )


def settled(found: "Settled") -> Document:
    """A VM that depends on no backup."""
    disks = {disk.id: str(found.folder.base(disk)) for disk in found.boot.disks}
    return document("settle", point=found.boot.point, disks=disks, stood_still=found.stood_still)


def vm_config(point: Point) -> Document:
    """What is recorded of the VM of a point, and what else of its host it needs."""
    from qmpbackup.plan.boot_disks import Attached
    from qmpbackup.plan.booting import MASK, Setting, launch

    disks = [Attached(each.id, each.source_file, {"node-name": each.id}) for each in point.disks]
    found = launch(point.vm, disks, Setting("", ""))
    words = point.vm.command_line
    return document(
        "vm-config",
        point=point.id,
        vm=point_to_json(point)["vm"],
        disks=[
            {
                "id": each.id,
                "size": each.size,
                "source_file": each.source_file,
                "source_format": each.source_format,
            }
            for each in point.disks
        ],
        needs=list(found.needs),
        masked=[number for number, word in enumerate(words) if MASK in word],
    )


def drilled(found: "Drilled") -> Document:
    """How a point came up in a drill."""
    return document("drill", **asdict(found))


def guest_file_system(found: "GuestFileSystem", subvolumes: Sequence[bytes]) -> Document:
    """A file system in a point, with the paths of its subvolumes."""
    return document(
        "file_system",
        name=found.name,
        kind=found.type,
        size=found.size,
        label=found.label,
        uuid=found.uuid,
        readable=found.is_readable,
        note=found.note,
        subvolumes=[os.fsdecode(each) for each in subvolumes],
    )


def guest_file(address: bytes, found: "GuestFile") -> Document:
    """A file in a point. Bytes that are no UTF-8 are lone surrogates."""
    return document(
        "file",
        path=os.fsdecode(address),
        name=os.fsdecode(found.path),
        kind=found.kind,
        mode=f"{found.mode:04o}",
        uid=found.user,
        gid=found.group,
        size=found.size,
        time=found.time,
        links=found.links,
        target=os.fsdecode(found.target),
    )

# SPDX-License-Identifier: Apache-2.0
"""Manifests: a restore point as JSON and back. The schema is docs/reference/manifest.md.

Pure: bytes in, `Point` out. What is read may have been written by anybody, so the parser takes
exactly what the schema says and names what it does not like; it must not know where manifests lie.
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime

from qmpbackup import bounded_json
from qmpbackup.errors import DamagedError, StorageError
from qmpbackup.model import (
    LEFT_OUT,
    Absence,
    Consistency,
    Level,
    Merged,
    NeededFile,
    Point,
    Skipped,
    StoredDisk,
    Underlay,
    VmConfig,
    VmIdentity,
)
from qmpbackup.targets.members import (
    MOST_MEMORY,
    RESTORE_HINT,
    SCHEMA,
    Json,
    ObjectReader,
    parse_object,
)
from qmpbackup.targets.names import folder_name, parse_file

LARGEST = 16 * 1024 * 1024
"""Bytes of the largest manifest that is read."""

_DIGEST = re.compile(r"blake3:[0-9a-f]{64}", re.ASCII)
_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"


def time_to_json(time: datetime) -> str:
    """A time in UTC as in every document of ours, such as 2026-11-02T03:04:05.678901Z."""
    return time.astimezone(UTC).strftime(_TIME)


def point_to_json(point: Point) -> Json:
    """The point as a JSON object, without the manifest's own digest."""
    identity = point.vm.identity
    return {
        "schema": SCHEMA,
        "id": point.id,
        "sequence": point.sequence,
        "time": time_to_json(point.time),
        "level": point.level.value,
        "parent": point.parent,
        "consistency": point.consistency.value,
        "vm": {
            **identity_to_json(identity),
            "qemu_version": point.vm.qemu_version,
            "machine": point.vm.machine,
            "command_line": list(point.vm.command_line),
            **({"process": point.vm.process} if point.vm.process else {}),
            **({"files": [asdict(each) for each in point.vm.files]} if point.vm.files else {}),
        },
        "disks": [_disk_to_json(disk) for disk in point.disks],
        "skipped": [_skipped_to_json(each) for each in point.skipped],
        "merged": [{"id": each.id, "into": each.into} for each in point.merged],
        "pause": point.pause,
        "notes": list(point.notes),
    }


def identity_to_json(identity: VmIdentity) -> Json:
    """Which VM, as manifests and `vm.json` both say it."""
    members = {"uuid": identity.uuid, "name": identity.name, "address": identity.address}
    return {**members, "host": identity.host} if identity.host else members


def _skipped_to_json(skipped: Skipped) -> Json:
    content = {"name": skipped.name, "reason": skipped.reason}
    return content | ({"absence": skipped.absence.value} if skipped.absence else {})


def _disk_to_json(disk: StoredDisk) -> Json:
    content: Json = {
        "id": disk.id,
        "level": disk.level.value,
        "file": disk.file,
        "parent": disk.parent,
        "size": disk.size,
        "file_size": disk.file_size,
        "digest": disk.digest,
        "source_format": disk.source_format,
        "source_file": disk.source_file,
        "bitmap": disk.bitmap,
        "end_mark": disk.end_mark,
        "reason": disk.reason,
        "snapshot": disk.snapshot,
        **({"label": disk.label} if disk.label else {}),
    }
    if disk.underlays is not None:
        content["underlays"] = [asdict(each) for each in disk.underlays]
    return content


def encode(point: Point) -> bytes:
    """The manifest of a point, ready to be written.

    Raises:
        StorageError: the point is too large to be read back.
    """
    content = point_to_json(point)
    content["digest"] = _digest(content)
    data = (json.dumps(content, indent=1) + "\n").encode("ascii")
    if len(data) > LARGEST or bounded_json.cost(data) > MOST_MEMORY:
        raise StorageError(f"The manifest of point {point.id} would have {len(data)} bytes.")
    return data


Misplaced = Callable[[StoredDisk], str]
"""Says why the `file` of a disk's record cannot be where such a target keeps that disk, or nothing."""


def outside_its_folder(disk: StoredDisk) -> str:
    """Why the file is none that a directory target has for this disk."""
    file = parse_file(disk.file)
    if file is None or file.folder != folder_name(disk.id):
        return "is not a backup file in that disk's folder"
    return ""


def decode(data: bytes, name: str, misplaced: Misplaced = outside_its_folder) -> Point:
    """Parse a manifest; `name` is what messages call it.

    Raises:
        DamagedError: it is not what the schema says, or not what was written.
        StorageError: a newer version of qmpbackup wrote it.
    """
    reader = ObjectReader(parse_object(data, name), name)
    reader.schema()
    digest = reader.matching("digest", _DIGEST)
    content = {key: value for key, value in reader.content.items() if key != "digest"}
    if digest != _digest(content):
        raise DamagedError(f"{name} was changed after it was written.", RESTORE_HINT)
    point = _point(reader)
    _check_point(point, name, misplaced)
    return point


def _digest(content: Json) -> str:
    """`blake3:<hex>` of the canonical form: keys sorted, no blanks, all but ASCII escaped."""
    from blake3 import blake3

    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"blake3:{blake3(text.encode('ascii')).hexdigest()}"


def _point(reader: ObjectReader) -> Point:
    point = Point(
        id=reader.point_id("id"),
        sequence=reader.integer("sequence"),
        time=reader.time("time"),
        level=reader.choice("level", Level),
        parent=reader.optional_point_id("parent"),
        consistency=reader.choice("consistency", Consistency),
        vm=reader.member("vm", _vm),
        disks=reader.objects("disks", _disk),
        skipped=reader.objects("skipped", _skipped),
        merged=reader.objects(
            "merged", lambda each: Merged(each.text("id"), each.point_id("into"))
        ),
        pause=reader.seconds("pause"),
        notes=reader.texts("notes"),
    )
    reader.end()
    return point


def _vm(reader: ObjectReader) -> VmConfig:
    return VmConfig(
        identity=read_identity(reader),
        qemu_version=reader.text("qemu_version"),
        machine=reader.text("machine"),
        command_line=reader.texts("command_line"),
        process=reader.text("process") if reader.given("process") else "",
        files=reader.objects("files", _needed_file) if reader.given("files") else (),
    )


def _needed_file(reader: ObjectReader) -> NeededFile:
    return NeededFile(
        path=reader.text("path"), size=reader.integer("size"), digest=reader.text("digest")
    )


def read_identity(reader: ObjectReader) -> VmIdentity:
    """Which VM, from an object that says so."""
    host = reader.text("host") if "host" in reader.content else ""
    return VmIdentity(reader.text("uuid"), reader.text("name"), reader.text("address"), host)


def _skipped(reader: ObjectReader) -> Skipped:
    name, reason = reader.text("name"), reader.text("reason")
    if reader.given("absence"):
        return Skipped(name, reason, reader.choice("absence", Absence))
    return Skipped(name, reason, Absence.CHOSEN if reason == LEFT_OUT else Absence.EMPTY)


def _underlay(reader: ObjectReader) -> Underlay:
    return Underlay(
        role=reader.text("role"),
        file=reader.text("file"),
        format=reader.text("format"),
        size=reader.integer("size"),
        stamp=reader.text("stamp"),
        node=reader.text("node"),
    )


def _disk(reader: ObjectReader) -> StoredDisk:
    return StoredDisk(
        id=reader.text("id"),
        level=reader.choice("level", Level),
        file=reader.text("file"),
        parent=reader.optional_point_id("parent"),
        size=reader.integer("size"),
        file_size=reader.integer("file_size"),
        digest=reader.matching("digest", _DIGEST),
        source_format=reader.text("source_format"),
        source_file=reader.text("source_file"),
        bitmap=reader.text("bitmap"),
        end_mark=reader.text("end_mark"),
        reason=reader.text("reason"),
        snapshot=reader.text("snapshot"),
        label=reader.text("label") if reader.given("label") else "",
        underlays=(reader.objects("underlays", _underlay) if reader.given("underlays") else None),
    )


def _check_point(point: Point, name: str, misplaced: Misplaced) -> None:
    """What no single member can say: levels that were made, distinct disks, files in their place."""
    if Level.AUTO in {point.level, *(disk.level for disk in point.disks)}:
        raise DamagedError(f"{name}: 'level' is not one that a point can have.", RESTORE_HINT)
    if len({disk.id for disk in point.disks}) != len(point.disks):
        raise DamagedError(f"{name} names a disk twice.", RESTORE_HINT)
    for disk in point.disks:
        fault = misplaced(disk)
        if fault:
            raise DamagedError(f"{name}: 'file' of disk {disk.id!r} {fault}.", RESTORE_HINT)

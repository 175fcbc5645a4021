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
from enum import Enum
from typing import Any, TypeVar

from qmpbackup import bounded_json
from qmpbackup.errors import DamagedError, QmpBackupError, StorageError
from qmpbackup.model import (
    LEFT_OUT,
    Absence,
    Consistency,
    Level,
    Merged,
    Point,
    Skipped,
    StoredDisk,
    Underlay,
    VmConfig,
    VmIdentity,
)
from qmpbackup.targets.names import folder_name, is_point_id, parse_file

SCHEMA = 1
LARGEST = 16 * 1024 * 1024
"""Bytes of the largest manifest that is read."""

_MOST_MEMORY = 128 * 1024 * 1024
"""Bytes of memory that the values in one may take."""

_LARGEST_SIZE = 2**63 - 1
_LONGEST_TEXT = 65536
_LONGEST_LIST = 65536
_DIGEST = re.compile(r"blake3:[0-9a-f]{64}", re.ASCII)
_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"
_TIME_FORM = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)

T = TypeVar("T")
E = TypeVar("E", bound=Enum)
Json = dict[str, Any]


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
    if len(data) > LARGEST or bounded_json.cost(data) > _MOST_MEMORY:
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
    reader = Reader(parse_object(data, name), name)
    reader.schema()
    digest = reader.matching("digest", _DIGEST)
    content = {key: value for key, value in reader.content.items() if key != "digest"}
    if digest != _digest(content):
        raise DamagedError(f"{name} was changed after it was written.", RESTORE_HINT)
    point = _point(reader)
    _check_point(point, name, misplaced)
    return point


RESTORE_HINT = "Put back an unharmed copy of it."


def _digest(content: Json) -> str:
    """`blake3:<hex>` of the canonical form: keys sorted, no blanks, all but ASCII escaped."""
    from blake3 import blake3

    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"blake3:{blake3(text.encode('ascii')).hexdigest()}"


def parse_object(data: bytes, name: str) -> Json:
    """Parse one JSON object.

    Raises:
        DamagedError: it is none.
    """
    try:
        content = bounded_json.load(data, _MOST_MEMORY, _distinct)
    except ValueError as error:
        raise DamagedError(f"{name} is not valid JSON ({error}).", RESTORE_HINT) from error
    if not isinstance(content, dict):
        raise DamagedError(f"{name} is not a JSON object.", RESTORE_HINT)
    return content


def _distinct(pairs: list[tuple[str, Any]]) -> Json:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return content


class Reader:
    """Takes members out of a JSON object, each with its type and bound; `end` wants none left."""

    def __init__(self, content: Json, name: str) -> None:
        self.content = content
        self._name = name
        self._left = set(content)

    def fail(self, key: str, wanted: str) -> QmpBackupError:
        """The error for a member that is not as the schema says."""
        return DamagedError(f"{self._name}: {key!r} is not {wanted}.", RESTORE_HINT)

    def take(self, key: str) -> Any:
        """The raw member; a missing one is damage."""
        if key not in self.content:
            raise DamagedError(f"{self._name}: {key!r} is missing.", RESTORE_HINT)
        self._left.discard(key)
        return self.content[key]

    def schema(self) -> None:
        """Check the version of the schema."""
        version = self.integer("schema")
        if version > SCHEMA:
            raise StorageError(
                f"{self._name} was written by a newer version of qmpbackup (schema {version}; this "
                f"one knows {SCHEMA}).",
                "Upgrade qmpbackup here.",
            )
        if version != SCHEMA:
            raise self.fail("schema", str(SCHEMA))

    def text(self, key: str, longest: int = _LONGEST_TEXT) -> str:
        """A string of bounded length."""
        return self._text(key, self.take(key), longest)

    def _text(self, key: str, value: object, longest: int) -> str:
        if not isinstance(value, str) or len(value) > longest:
            raise self.fail(key, f"a text of at most {longest} characters")
        return value

    def matching(self, key: str, pattern: re.Pattern[str]) -> str:
        """A string that a pattern matches as a whole."""
        value = self.text(key)
        if not pattern.fullmatch(value):
            raise self.fail(key, f"of the form {pattern.pattern}")
        return value

    def integer(self, key: str) -> int:
        """A size or number, 0 or more."""
        value = self.take(key)
        if type(value) is not int or not 0 <= value <= _LARGEST_SIZE:
            raise self.fail(key, "a number of bytes or a count")
        return value

    def seconds(self, key: str) -> float:
        """A length of time."""
        value = self.take(key)
        if type(value) not in {int, float} or not 0 <= value < 1e12:
            raise self.fail(key, "a length of time in seconds")
        return float(value)

    def time(self, key: str) -> datetime:
        """A time in UTC."""
        text = self.matching(key, _TIME_FORM)
        try:
            return datetime.fromisoformat(text)
        except ValueError:
            raise self.fail(key, "a time like 2026-11-02T03:04:05.000000Z") from None

    def choice(self, key: str, kind: type[E]) -> E:
        """A member of an enumeration."""
        try:
            return kind(self.text(key))
        except ValueError:
            raise self.fail(key, "one of " + ", ".join(str(each.value) for each in kind)) from None

    def point_id(self, key: str) -> str:
        """The id of a point."""
        value = self.text(key)
        if not is_point_id(value):
            raise self.fail(key, "the id of a point")
        return value

    def optional_point_id(self, key: str) -> str | None:
        """The id of a point, or null."""
        return None if self.take(key) is None else self.point_id(key)

    def given(self, key: str) -> bool:
        """Whether a member is there that earlier versions did not write."""
        return key in self.content

    def texts(self, key: str, longest: int = 1024 * 1024) -> tuple[str, ...]:
        """A list of strings."""
        return tuple(self._text(key, each, longest) for each in self._list(key))

    def objects(self, key: str, parse: "Callable[[Reader], T]") -> tuple[T, ...]:
        """A list of objects, each parsed."""
        return tuple(
            self._inside(f"{key}[{number}]", each, parse)
            for number, each in enumerate(self._list(key))
        )

    def member(self, key: str, parse: "Callable[[Reader], T]") -> T:
        """One object, parsed."""
        return self._inside(key, self.take(key), parse)

    def _inside(self, where: str, value: object, parse: "Callable[[Reader], T]") -> T:
        if not isinstance(value, dict):
            raise self.fail(where, "an object")
        inside = Reader(value, f"{self._name}: {where}")
        result = parse(inside)
        inside.end()
        return result

    def _list(self, key: str) -> list[object]:
        value = self.take(key)
        if not isinstance(value, list) or len(value) > _LONGEST_LIST:
            raise self.fail(key, f"a list of at most {_LONGEST_LIST}")
        return value

    def end(self) -> None:
        """Nothing may be left that we have not understood."""
        if self._left:
            unknown = ", ".join(sorted(self._left))
            raise DamagedError(f"{self._name} has unknown members: {unknown}.", RESTORE_HINT)


def _point(reader: Reader) -> Point:
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


def _vm(reader: Reader) -> VmConfig:
    return VmConfig(
        identity=read_identity(reader),
        qemu_version=reader.text("qemu_version"),
        machine=reader.text("machine"),
        command_line=reader.texts("command_line"),
        process=reader.text("process") if reader.given("process") else "",
    )


def read_identity(reader: Reader) -> VmIdentity:
    """Which VM, from an object that says so."""
    host = reader.text("host") if "host" in reader.content else ""
    return VmIdentity(reader.text("uuid"), reader.text("name"), reader.text("address"), host)


def _skipped(reader: Reader) -> Skipped:
    name, reason = reader.text("name"), reader.text("reason")
    if reader.given("absence"):
        return Skipped(name, reason, reader.choice("absence", Absence))
    return Skipped(name, reason, Absence.CHOSEN if reason == LEFT_OUT else Absence.EMPTY)


def _underlay(reader: Reader) -> Underlay:
    return Underlay(
        role=reader.text("role"),
        file=reader.text("file"),
        format=reader.text("format"),
        size=reader.integer("size"),
        stamp=reader.text("stamp"),
        node=reader.text("node"),
    )


def _disk(reader: Reader) -> StoredDisk:
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

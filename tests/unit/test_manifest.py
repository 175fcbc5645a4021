# SPDX-License-Identifier: Apache-2.0
"""Manifests: what is written comes back; what was changed, or is strange, is refused by name."""

import json
from datetime import UTC, datetime

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from qmpbackup.errors import DamagedError, QmpBackupError, StorageError
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
from qmpbackup.targets.manifest import decode, encode
from qmpbackup.targets.names import folder_name

made = st.sampled_from([level for level in Level if level is not Level.AUTO])
sizes = st.integers(0, 2**63 - 1)
texts = st.text(max_size=40)
ids = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}", fullmatch=True)
parents = st.none() | ids


underlays = st.builds(Underlay, role=texts, file=texts, format=texts, size=sizes, stamp=texts)
skipped = st.builds(Skipped, name=texts, reason=texts, absence=st.sampled_from(Absence))


@st.composite
def stored_disks(draw: st.DrawFn) -> StoredDisk:
    disk_id = draw(st.text(min_size=1, max_size=40))
    prefix = draw(st.sampled_from(["FULL", "INC", "DIFF", "COPY"]))
    return StoredDisk(
        id=disk_id,
        level=draw(made),
        file=f"{folder_name(disk_id)}/{prefix}-{draw(st.integers(0, 10**12 - 1))}",
        parent=draw(parents),
        size=draw(sizes),
        file_size=draw(sizes),
        digest=f"blake3:{draw(st.binary(min_size=32, max_size=32)).hex()}",
        source_format=draw(texts),
        source_file=draw(texts),
        bitmap=draw(texts),
        reason=draw(texts),
        snapshot=draw(texts),
        label=draw(texts),
        underlays=draw(st.none() | st.lists(underlays, max_size=3).map(tuple)),
    )


points = st.builds(
    Point,
    id=ids,
    sequence=sizes,
    time=st.datetimes(min_value=datetime(1970, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
    level=made,
    parent=parents,
    consistency=st.sampled_from(Consistency),
    vm=st.builds(
        VmConfig,
        identity=st.builds(VmIdentity, uuid=texts, name=texts, address=texts),
        qemu_version=texts,
        machine=texts,
        command_line=st.lists(texts, max_size=5).map(tuple),
        process=texts,
        files=st.lists(st.builds(NeededFile, path=texts, size=sizes, digest=texts), max_size=2).map(
            tuple
        ),
    ),
    disks=st.lists(stored_disks(), max_size=3, unique_by=lambda disk: disk.id).map(tuple),
    skipped=st.lists(skipped, max_size=3).map(tuple),
    merged=st.lists(st.builds(Merged, id=texts, into=ids), max_size=2).map(tuple),
    pause=st.floats(0, 1e6),
    notes=st.lists(texts, max_size=3).map(tuple),
)


def a_point() -> Point:
    disk = StoredDisk(
        id="hd0",
        level=Level.FULL,
        file="hd0/FULL-1480542683",
        parent=None,
        size=1048576,
        file_size=458752,
        digest="blake3:" + "0" * 64,
    )
    return Point(
        id="20261102T030405Z-00abcd",
        sequence=1,
        time=datetime(2026, 11, 2, 3, 4, 5, tzinfo=UTC),
        level=Level.FULL,
        parent=None,
        consistency=Consistency.CRASH,
        vm=VmConfig(VmIdentity("", "vm", "/run/vm.qmp"), "7.2.22"),
        disks=(disk,),
    )


def forged(**changes: object) -> bytes:
    """A manifest with changes, and a digest that fits them: what an attacker would write."""
    content = json.loads(encode(a_point())) | changes
    del content["digest"]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return json.dumps(content | {"digest": f"blake3:{blake3(text.encode()).hexdigest()}"}).encode()


def forged_disk(**changes: object) -> bytes:
    content = json.loads(encode(a_point()))
    return forged(disks=[content["disks"][0] | changes])


@given(points)
def test_what_is_written_comes_back(point: Point) -> None:
    assert decode(encode(point), "m.json") == point


@given(st.data())
def test_any_changed_character_is_noticed(data: st.DataObject) -> None:
    written = encode(a_point())
    at = data.draw(st.integers(0, len(written) - 1))
    new = data.draw(st.integers(0, 255).filter(lambda value: value != written[at]))
    changed = written[:at] + bytes([new]) + written[at + 1 :]
    try:
        found = decode(changed, "m.json")
    except QmpBackupError:
        return
    assert found == a_point()  # blanks may differ, what is said may not


@given(st.binary(max_size=200))
def test_rubbish_is_damage(data: bytes) -> None:
    with pytest.raises(DamagedError, match=r"m\.json"):
        decode(data, "m.json")


@pytest.mark.parametrize("length", [0, 1, 100])
def test_a_torn_manifest_is_damage(length: int) -> None:
    with pytest.raises(DamagedError):
        decode(encode(a_point())[: -length or None][:-2], "m.json")


def test_a_newer_schema_is_said_to_be_newer() -> None:
    with pytest.raises(StorageError, match="newer version of qmpbackup") as caught:
        decode(forged(schema=2), "m.json")
    assert "Upgrade" in caught.value.hint


@pytest.mark.parametrize(
    "file",
    [
        "hd0/../../../etc/shadow",
        "/etc/shadow",
        "hd1/FULL-1",
        "hd0/image",
        "points/FULL-1",
        "hd0/FULL-1\u0000",
    ],
)
def test_a_file_outside_the_disks_own_folder_is_refused(file: str) -> None:
    with pytest.raises(DamagedError, match="not a backup file in that disk's folder"):
        decode(forged_disk(file=file), "m.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence": -1},
        {"sequence": True},
        {"sequence": 1.5},
        {"sequence": 2**63},
        {"time": "2026-13-02T03:04:05.000000Z"},
        {"time": "yesterday"},
        {"level": "auto"},
        {"level": "huge"},
        {"parent": "../x"},
        {"parent": 7},
        {"id": "../../x"},
        {"vm": []},
        {"disks": {}},
        {"disks": [1]},
        {"notes": "text"},
        {"notes": [1]},
        {"pause": -1},
        {"pause": "long"},
        {"pause": 1e300},
        {"unheard_of": 1},
    ],
    ids=str,
)
def test_members_that_make_no_sense_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(DamagedError):
        decode(forged(**changes), "m.json")


@pytest.mark.parametrize(
    "changes", [{"digest": "md5:0"}, {"size": "1"}, {"snapshot": None}, {"snapshot": "x" * 70000}]
)
def test_records_of_disks_that_make_no_sense_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(DamagedError):
        decode(forged_disk(**changes), "m.json")


def test_a_disk_that_is_named_twice_is_refused() -> None:
    disks = json.loads(encode(a_point()))["disks"]
    with pytest.raises(DamagedError, match="twice"):
        decode(forged(disks=disks * 2), "m.json")


def test_deeply_nested_json_is_damage_and_no_crash() -> None:
    with pytest.raises(DamagedError):
        decode(b"[" * 100_000, "m.json")


def test_a_forged_manifest_without_changes_is_taken() -> None:
    assert decode(forged(), "m.json") == a_point()


def test_manifests_of_versions_that_knew_less_are_read() -> None:
    """Without what a disk was made from, and why something is missing only in words."""
    said = [{"name": "vdb", "reason": LEFT_OUT}, {"name": "cd", "reason": "empty drive"}]
    point = decode(forged(skipped=said), "m")
    assert [each.absence for each in point.skipped] == [Absence.CHOSEN, Absence.EMPTY]
    assert point.disks[0].underlays is None
    assert decode(forged_disk(underlays=[]), "m").disks[0].underlays == ()
    wrong: object
    for wrong in (None, [{}], [{"role": "backing"}], {"role": "backing"}):
        with pytest.raises(DamagedError):
            decode(forged_disk(underlays=wrong), "m")
    with pytest.raises(DamagedError):
        decode(forged(skipped=[said[0] | {"absence": "gone"}]), "m")

# SPDX-License-Identifier: Apache-2.0
"""What a merge means, decided without touching anything: chains, names of snapshots, manifests."""

import struct
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpbackup.errors import DamagedError, NoSuchTarget, StorageError, UsageError
from qmpbackup.images.relink import relinked
from qmpbackup.model import Consistency, Level, Merged, Point, StoredDisk, VmConfig, VmIdentity
from qmpbackup.plan.chain import chain
from qmpbackup.plan.lineage import Bond, LinkedImage, candidates, lineage, time_of
from qmpbackup.plan.merge import (
    Contents,
    MergePlan,
    Operation,
    Rewritten,
    check_siblings,
    rewrite,
    tags_for,
)
from qmpbackup.targets.folder.journal import Intent, Phase

START = datetime(2026, 11, 2, 3, 4, 5, tzinfo=UTC)
NEW = Contents(4711, "blake3:" + "ab" * 32)
MOVED = Contents(815, "blake3:" + "cd" * 32)


def images(text: str) -> list[LinkedImage]:
    """`INC-2>FULL-1 FULL-1`: names, each with its link."""
    return [LinkedImage(*each.partition(">")[::2]) for each in text.split()]


def names(text: str, until: str = "", containing: str = "") -> str:
    return " ".join(lineage(images(text), until=until, containing=containing).names)


# --- chains without manifests


def test_links_decide_where_there_are_links() -> None:
    found = lineage(images("FULL-1 INC-3>INC-2 INC-2>FULL-1 INC-4>INC-3"))
    assert found.names == ("FULL-1", "INC-2", "INC-3", "INC-4")
    assert not found.assumed
    assert not found.misplaced


def test_numbers_decide_where_there_are_none() -> None:
    found = lineage(images("INC-10-a FULL-1-a INC-9-a"))
    assert found.names == ("FULL-1-a", "INC-9-a", "INC-10-a")
    assert found.assumed == (Bond("INC-10-a", "INC-9-a"), Bond("INC-9-a", "FULL-1-a"))


def test_the_newest_of_several_chains_is_meant() -> None:
    assert names("FULL-1 INC-2 FULL-3 INC-4") == "FULL-3 INC-4"
    assert names("FULL-1 INC-2 FULL-3") == "FULL-3"
    assert names("FULL-1 INC-2 FULL-3 INC-4", until="INC-2") == "FULL-1 INC-2"


def test_copies_are_outside_of_chains() -> None:
    assert names("FULL-1 COPY-2 INC-3 COPY-4") == "FULL-1 INC-3"
    assert names("FULL-1 COPY-2", until="COPY-2") == "COPY-2"
    assert names("COPY-2") == "COPY-2"


def test_a_differential_builds_on_the_full() -> None:
    assert names("FULL-1 INC-2 DIFF-3") == "FULL-1 DIFF-3"
    assert names("FULL-1 INC-2 DIFF-3 INC-4") == "FULL-1 DIFF-3 INC-4"


def test_what_builds_on_the_chain_is_known() -> None:
    found = lineage(images("FULL-1 INC-2>FULL-1 INC-3>INC-2 DIFF-4>FULL-1"), until="INC-2")
    assert set(found.children) == {Bond("INC-3", "INC-2"), Bond("DIFF-4", "FULL-1")}


def test_disks_in_one_folder_are_told_apart() -> None:
    both = "FULL-1-a FULL-1-b INC-2-a INC-2-b INC-3-a"
    with pytest.raises(UsageError, match=r"a, b.*--filter"):
        names(both)
    assert names(both, containing="-b") == "FULL-1-b INC-2-b"
    assert names(both, until="INC-2-a") == "FULL-1-a INC-2-a"


def test_a_full_may_be_called_like_its_disk() -> None:
    listing = ["disk1", "INC-2-disk1", "uuid", "image", "disk1.config", "INC-9.partial"]
    assert candidates(listing) == ("disk1", "INC-2-disk1")
    assert names("disk1 INC-2-disk1") == "disk1 INC-2-disk1"


def test_a_link_through_another_folder_is_told() -> None:
    found = lineage(images("FULL-1 INC-2>/old/place/FULL-1"))
    assert found.misplaced == (Bond("INC-2", "FULL-1"),)


@pytest.mark.parametrize(
    "text",
    [
        "FULL-1 INC-2>/etc/passwd",
        "FULL-1 INC-2>../FULL-0",
        "FULL-1 INC-2>nbd://host/x",
        "FULL-1 INC-2>INC-2",
        "INC-2>INC-3 INC-3>INC-2",
        "FULL-1>/etc/passwd INC-2>FULL-1",
        "INC-2",
        "INC-1 FULL-2",
    ],
)
def test_links_that_lead_nowhere_are_damage(text: str) -> None:
    with pytest.raises(DamagedError):
        lineage(images(text), until="INC-1" if "INC-1" in text.split() else "")


def test_until_names_a_file_or_path_that_is_there() -> None:
    assert names("FULL-1 INC-2", until="/some/where/INC-2") == "FULL-1 INC-2"
    with pytest.raises(UsageError, match="There are: FULL-1, INC-2"):
        names("FULL-1 INC-2", until="INC-3")


def test_no_images_is_no_target() -> None:
    with pytest.raises(NoSuchTarget):
        lineage([])
    with pytest.raises(NoSuchTarget, match="'x'"):
        lineage(images("FULL-1"), containing="x")


def test_numbers_that_are_no_time_have_none() -> None:
    assert time_of("INC-1480542701-a") == datetime(2016, 11, 30, 21, 51, 41, tzinfo=UTC)
    assert time_of("INC-999999999999") is None
    assert time_of("disk1") is None


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.randoms())
def test_names_alone_give_the_chain_that_was_made(fulls: list[bool], shuffled: Random) -> None:
    made = [("FULL" if full or not at else "INC") + f"-{at}" for at, full in enumerate(fulls)]
    last_full = max(at for at, name in enumerate(made) if name.startswith("FULL"))
    mixed = list(made)
    shuffled.shuffle(mixed)
    assert list(lineage([LinkedImage(name) for name in mixed]).names) == made[last_full:]


# --- names of snapshots


def test_snapshots_are_called_as_the_original_calls_them() -> None:
    tags = tags_for([("FULL-1", START), ("INC-2", START + timedelta(seconds=7))], [])
    assert [tag.name for tag in tags] == ["FULL-BACKUP", "2026-11-02-03:04:12"]


def test_names_of_snapshots_are_used_once() -> None:
    states = [("FULL-1", START), ("INC-2", START), ("INC-3", START), ("INC-4", None)]
    tags = tags_for(states, ["INC-4"])
    assert [tag.name for tag in tags][1:] == [
        "2026-11-02-03:04:05",
        "2026-11-02-03:04:05-2",
        "INC-4-2",
    ]


def test_a_state_that_has_a_snapshot_gets_no_second() -> None:
    existing = ["FULL-BACKUP", "2026-11-02-03:04:05"]
    first, second = tags_for([("FULL-1", START), ("INC-2", START)], existing)
    assert first.exists
    assert first.name == "2026-11-02-03:04:05"
    assert not second.exists
    assert second.name not in existing


def test_a_full_of_unknown_time_with_snapshots_gets_none_for_its_state() -> None:
    (tag,) = tags_for([("FULL-1", None), ("INC-2", START)], ["FULL-BACKUP"])
    assert tag.file == "INC-2"


# --- what else builds on the chain


def test_what_builds_on_the_newest_can_be_relinked() -> None:
    bonds = [Bond("INC-3", "INC-2"), Bond("INC-3", "INC-2"), Bond("DIFF-4", "INC-2")]
    assert check_siblings(["FULL-1", "INC-2"], bonds) == ("INC-3", "DIFF-4")


def test_what_builds_on_an_older_state_is_never_broken() -> None:
    with pytest.raises(UsageError, match=r"DIFF-3.*FULL-1.*merge --targetfile"):
        check_siblings(["FULL-1", "INC-2"], [Bond("DIFF-3", "FULL-1")])


def test_files_that_are_no_backups_are_never_touched() -> None:
    with pytest.raises(UsageError, match=r"mine\.qcow2"):
        check_siblings(["FULL-1", "INC-2"], [], [Bond("mine.qcow2", "INC-2")])
    assert check_siblings(["FULL-1"], [], [Bond("mine.qcow2", "FULL-1")]) == ()


# --- manifests


def disk(number: int, level: Level, parent: int | None, disk_id: str = "a") -> StoredDisk:
    return StoredDisk(
        id=disk_id,
        level=level,
        file=f"{disk_id}/{level.value.upper()}-{number}",
        parent=None if parent is None else f"p{parent}",
        size=1024,
        file_size=number,
        digest=f"blake3:{number:064x}",
        bitmap=f"bitmap-{number}",
    )


def point(number: int, *disks: StoredDisk, merged: tuple[Merged, ...] = ()) -> Point:
    parents = [each.parent for each in disks if each.parent]
    return Point(
        id=f"p{number}",
        sequence=number,
        time=START + timedelta(hours=number),
        level=Level.INC if parents else Level.FULL,
        parent=max(parents) if parents else None,
        consistency=Consistency.CRASH,
        vm=VmConfig(VmIdentity(), "7.2"),
        disks=disks,
        merged=merged,
    )


def line(disk_id: str = "a", count: int = 4) -> list[Point]:
    """A full and its incrementals of one disk."""
    return [
        point(at, disk(at, Level.INC if at else Level.FULL, at - 1 if at else None, disk_id))
        for at in range(count)
    ]


def merged(points: list[Point], until: int, operation: Operation) -> Rewritten:
    links = chain(points, points[until], "a")
    files = tuple(link.disk.file.rpartition("/")[2] for link in links)
    tags = tags_for(tuple((name, START) for name in files), [])
    plan = MergePlan(operation, files, tags if operation is Operation.SNAPSHOTS else ())
    moved = {"a/INC-3": MOVED} if until == 2 else {}
    return rewrite(points, links, plan, NEW, moved)


def test_points_whose_only_disk_is_merged_away_end() -> None:
    result = merged(line(), 3, Operation.COMMIT)
    assert result.forget == ("p0", "p1", "p2")
    (kept,) = result.record
    stored = kept.disks[0]
    assert (kept.id, kept.level, kept.parent) == ("p3", Level.FULL, None)
    assert (stored.level, stored.file, stored.parent) == (Level.FULL, "a/FULL-0", None)
    assert (stored.file_size, stored.digest) == (NEW.size, NEW.digest)
    assert stored.bitmap == "bitmap-3", "the next incremental still builds on this point"


def test_newer_points_stay_and_keep_their_parent() -> None:
    result = merged(line(), 2, Operation.COMMIT)
    newest = result.record[-1]
    assert newest.id == "p3"
    assert newest.parent == "p2"
    assert newest.disks[0].parent == "p2"
    assert (newest.disks[0].file_size, newest.disks[0].digest) == (MOVED.size, MOVED.digest)


def test_points_with_other_disks_say_where_the_merged_one_went() -> None:
    points = [
        point(at, disk(at, level, parent, "a"), disk(at, level, parent, "b"))
        for at, level, parent in ((0, Level.FULL, None), (1, Level.INC, 0), (2, Level.INC, 1))
    ]
    first, middle, last = merged(points, 2, Operation.COMMIT).record
    assert [each.id for each in first.disks] == ["b"]
    assert first.merged == (Merged("a", "p2"),)
    assert middle.merged == (Merged("a", "p2"),)
    assert (middle.level, middle.parent) == (Level.INC, "p0")
    assert (last.level, last.parent) == (Level.INC, "p1"), "its other disk is an incremental yet"


def test_what_went_into_a_state_that_ends_went_into_its_successor() -> None:
    other = disk(0, Level.FULL, None, "b")
    points = [point(0, other, merged=(Merged("a", "p1"), Merged("c", "p1")))]
    points += [point(1, disk(1, Level.FULL, None)), point(2, disk(2, Level.INC, 1))]
    links = chain(points, points[2], "a")
    plan = MergePlan(Operation.COMMIT, ("FULL-1", "INC-2"))
    result = rewrite(points, links, plan, NEW, {})
    assert result.record[0].merged == (Merged("a", "p2"), Merged("c", "p1"))


def test_snapshots_keep_every_point() -> None:
    result = merged(line(), 2, Operation.SNAPSHOTS)
    assert not result.forget
    stored = [each.disks[0] for each in result.record]
    assert [each.snapshot for each in stored] == ["FULL-BACKUP", "2026-11-02-03:04:05", "", ""]
    assert {(each.file, each.digest) for each in stored[:3]} == {("a/FULL-0", NEW.digest)}
    assert all(each.parent is None and each.level is Level.FULL for each in stored[:3])
    assert stored[3].parent == "p2"


def test_points_that_are_snapshots_of_the_full_follow_it() -> None:
    points = line()
    kept = replace(points[0].disks[0], snapshot="FULL-BACKUP", level=Level.FULL)
    points[0] = replace(points[0], disks=(kept,))
    base = replace(disk(1, Level.FULL, None), file="a/FULL-0")
    points[1] = point(1, base)
    result = merged(points, 3, Operation.COMMIT)
    assert result.record[0].disks[0] == replace(kept, file_size=NEW.size, digest=NEW.digest)
    assert result.forget == ("p1", "p2")


def test_points_of_other_chains_are_left_alone() -> None:
    other = [point(9, disk(9, Level.FULL, None)), point(10, disk(10, Level.FULL, None, "b"))]
    result = merged([*line(), *other], 3, Operation.COMMIT)
    assert {each.id for each in result.record} == {"p3"}


@given(st.integers(2, 8), st.data(), st.sampled_from(Operation))
def test_manifests_after_a_merge_are_whole(
    count: int, data: st.DataObject, operation: Operation
) -> None:
    """Whatever is merged: every chain that is left leads to a full, and nothing names what is gone."""
    points = line(count=count)
    until = data.draw(st.integers(1, count - 1))
    links = chain(points, points[until], "a")
    files = tuple(link.disk.file.rpartition("/")[2] for link in links)
    tags = tags_for(tuple((name, START) for name in files), [])
    plan = MergePlan(operation, files, tags if operation is Operation.SNAPSHOTS else ())
    result = rewrite(points, links, plan, NEW, {})
    after = {each.id: each for each in points if each.id not in result.forget}
    after |= {each.id: each for each in result.record}
    for each in after.values():
        found = chain(after.values(), each, "a")
        assert found[0].disk.level is Level.FULL
        assert not {link.disk.file for link in found} & {f"a/{name}" for name in plan.superseded}
        assert each.parent is None or each.parent in after


# --- the journal


def test_a_journal_is_read_as_it_was_written() -> None:
    intent = Intent(
        Phase.SWAPPING, "FULL-1", 17, ("INC-3",), ("INC-2",), tuple(line()[:2]), ("p9",)
    )
    assert Intent.decode(intent.encode(), "journal") == intent


@pytest.mark.parametrize(
    "intent",
    [
        Intent(Phase.BUILDING, "../vm.json"),
        Intent(Phase.BUILDING, ""),
        Intent(Phase.SWAPPING, "FULL-1", 1, remove=("/etc/passwd",)),
        Intent(Phase.SWAPPING, "FULL-1", 1, relink=("..",)),
        Intent(Phase.SWAPPING, "FULL-1", 1, forget=("../../x",)),
    ],
)
def test_a_journal_never_leads_out_of_its_folder(intent: Intent) -> None:
    with pytest.raises(DamagedError):
        Intent.decode(intent.encode(), "journal")


# --- links in heads


def head(name: bytes, offset: int = 512, behind: bytes = b"") -> bytes:
    whole = bytearray(65536)
    struct.pack_into(">4sIQII", whole, 0, b"QFI\xfb", 3, offset, len(name), 16)
    whole[offset : offset + len(name) + len(behind)] = name + behind
    return bytes(whole)


@given(st.binary(min_size=1, max_size=40), st.integers(1, 40))
def test_a_link_changes_and_nothing_else(old: bytes, length: int) -> None:
    old = old.replace(b"\0", b"x")
    new = "n" * length
    changed = relinked(head(old), "INC-2", new)
    assert changed == head(new.encode())
    assert relinked(changed, "INC-2", new) == changed


def test_half_a_change_can_be_finished() -> None:
    """A write is torn between sectors: the name is there and its length is not, or vice versa."""
    wanted = head(b"FULL-1480542683")
    name_only = head(b"INC-1", behind=b"480542683")
    name_only = name_only[:512] + wanted[512:]
    assert relinked(name_only, "INC-2", "FULL-1480542683") == wanted
    length_only = wanted[:512] + head(b"INC-1480542701")[512:]
    assert relinked(length_only, "INC-2", "FULL-1480542683") == wanted


@pytest.mark.parametrize(
    "full",
    [head(b"a", behind=b"something else"), head(b"a", offset=65530), head(b"a", offset=0)],
)
def test_a_head_without_room_is_left_alone(full: bytes) -> None:
    with pytest.raises(StorageError, match="no room"):
        relinked(full, "INC-2", "FULL-1480542683")

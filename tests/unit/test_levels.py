# SPDX-License-Identifier: Apache-2.0
"""The bitmap rule: which disk gets which level, and what may be removed."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpbackup.errors import IncrementalNotPossible
from qmpbackup.model import (
    Bitmap,
    Consistency,
    Disk,
    Level,
    Point,
    StoredDisk,
    Underlay,
    VmConfig,
    VmIdentity,
)
from qmpbackup.plan.levels import (
    SMALL,
    NewPoint,
    effective_level,
    last_full,
    plan_disks,
    rubbish,
)
from qmpbackup.plan.names import BitmapName

SIZE = 64 << 20
TARGET = "t1"
NEW = NewPoint(TARGET, "p3")


def bitmap(point: str, **changes: bool) -> Bitmap:
    state = {"recording": True, "busy": False, "persistent": True, "inconsistent": False}
    return Bitmap(str(BitmapName(TARGET, point)), 65536, 65536, **(state | changes))


END = Bitmap(str(BitmapName(TARGET, "p1-end")), 65536, 65536, False, False, True)


def disk(
    *bitmaps: Bitmap, size: int = SIZE, can_persist: bool = True, end: Bitmap | None = END
) -> Disk:
    marks = (*bitmaps, end) if end else bitmaps
    return Disk("vda", "/x", "", "n", "n", "qcow2", size, "/x", can_persist, "n", marks)


def point(
    number: int, level: Level, parent: str | None = None, size: int = SIZE, disk_id: str = "vda"
) -> Point:
    stored = StoredDisk(
        disk_id,
        level,
        f"vda/F-{number}",
        parent,
        size,
        1,
        "blake3:0",
        bitmap=str(BitmapName(TARGET, f"p{number}")),
        end_mark=END.name,
    )
    return Point(
        id=f"p{number}",
        sequence=number,
        time=datetime(2026, 1, 1, tzinfo=UTC),
        level=level,
        parent=parent,
        consistency=Consistency.CRASH,
        vm=VmConfig(VmIdentity(), "7.2.0"),
        disks=(stored,),
    )


CHAIN = (point(1, Level.FULL), point(2, Level.INC, "p1"))


def fine(_point: Point, _disk: str) -> str:
    return ""


def decide(each: Disk, level: Level, points: tuple[Point, ...] = CHAIN) -> tuple[Level, str]:
    (plan,) = plan_disks([each], level, points, fine, NEW)
    return plan.level, plan.base.id if plan.base else ""


def test_an_incremental_builds_on_the_last_point_and_a_differential_on_the_last_full() -> None:
    ready = disk(bitmap("p1"), bitmap("p2"))
    assert decide(ready, Level.INC) == (Level.INC, "p2")
    assert decide(ready, Level.AUTO) == (Level.INC, "p2")
    assert decide(ready, Level.DIFF) == (Level.DIFF, "p1")
    assert decide(ready, Level.FULL) == (Level.FULL, "")


@pytest.mark.parametrize(
    ("bitmaps", "word"),
    [
        ((), "gone"),
        ((bitmap("p1"),), "gone"),
        ((bitmap("p2", inconsistent=True),), "inconsistent"),
        ((bitmap("p2", busy=True),), "in use"),
        ((bitmap("p2", recording=False),), "disabled"),
    ],
)
def test_a_bitmap_that_cannot_be_trusted_makes_a_full_or_refuses(
    bitmaps: tuple[Bitmap, ...], word: str
) -> None:
    each = disk(*bitmaps)
    (plan,) = plan_disks([each], Level.AUTO, CHAIN, fine, NEW)
    assert plan.level is Level.FULL
    assert word in plan.reason
    with pytest.raises(IncrementalNotPossible, match="vda"):
        plan_disks([each], Level.INC, CHAIN, fine, NEW)


@pytest.mark.parametrize(
    ("end", "word"),
    [
        (None, "end mark is gone"),
        (replace(END, inconsistent=True), "end mark is gone"),
        (replace(END, recording=True), "made anew"),
        (replace(END, count=0), "shrunk"),
    ],
)
def test_a_bitmap_counts_only_with_its_end_mark_beside_it(end: Bitmap | None, word: str) -> None:
    """Same name, recording, not busy, whole: all that may be said of a bitmap that somebody made anew
    on another node. It is the end mark that cannot be copied so."""
    each = disk(bitmap("p2"), end=end)
    (plan,) = plan_disks([each], Level.AUTO, CHAIN, fine, NEW)
    assert plan.level is Level.FULL
    assert word in plan.reason
    with pytest.raises(IncrementalNotPossible, match="vda"):
        plan_disks([each], Level.INC, CHAIN, fine, NEW)
    with pytest.raises(IncrementalNotPossible, match="vda"):
        plan_disks([disk(bitmap("p1"), end=end)], Level.DIFF, CHAIN, fine, NEW)


def test_a_point_of_a_version_without_end_marks_costs_one_full() -> None:
    (stored,) = CHAIN[-1].disks
    old = (*CHAIN[:-1], replace(CHAIN[-1], disks=(replace(stored, end_mark=""),)))
    (plan,) = plan_disks([disk(bitmap("p2"))], Level.AUTO, old, fine, NEW)
    assert plan.level is Level.FULL
    assert "no end mark" in plan.reason
    assert plan.seat.new_end_mark


def test_another_targets_bitmap_is_no_base() -> None:
    other = Bitmap(str(BitmapName("t2", "p2")), 0, 65536, True, False, True)
    assert decide(disk(other), Level.AUTO) == (Level.FULL, "")


def test_the_first_backup_is_a_full_and_says_why() -> None:
    (plan,) = plan_disks([disk()], Level.AUTO, (), fine, NEW)
    assert plan.level is Level.FULL
    assert "no earlier point" in plan.reason


def test_a_shrunk_disk_is_made_whole_and_a_grown_one_incrementally() -> None:
    assert decide(disk(bitmap("p2"), size=SIZE // 2), Level.AUTO) == (Level.FULL, "")
    assert decide(disk(bitmap("p2"), size=SIZE * 2), Level.AUTO) == (Level.INC, "p2")


def test_a_damaged_base_is_not_built_upon() -> None:
    plans = plan_disks([disk(bitmap("p2"))], Level.AUTO, CHAIN, lambda *_: "it is missing", NEW)
    assert plans[0].level is Level.FULL
    assert "it is missing" in plans[0].reason


def test_small_disks_are_copied_whole_and_keep_no_bitmap() -> None:
    (plan,) = plan_disks([disk(size=SMALL)], Level.INC, CHAIN, fine, NEW)
    assert (plan.level, plan.keeps_bitmap) == (Level.FULL, False)


def test_a_copy_leaves_no_trace() -> None:
    (plan,) = plan_disks([disk(bitmap("p2"))], Level.COPY, CHAIN, fine, NEW)
    assert (plan.level, plan.keeps_bitmap, plan.base_bitmap) == (Level.COPY, False, "")


def test_a_copy_is_nobodys_base() -> None:
    points = (*CHAIN, point(3, Level.COPY))
    assert decide(disk(bitmap("p2")), Level.AUTO, points) == (Level.INC, "p2")


def test_the_level_of_a_point_is_that_of_its_chains() -> None:
    big, small = disk(bitmap("p2")), disk(size=SMALL)
    plans = plan_disks([small, big], Level.AUTO, CHAIN, fine, NEW)
    assert effective_level(plans) is Level.INC


def test_bitmaps_of_the_last_point_and_the_last_full_stay() -> None:
    foreign = Bitmap("somebody-elses", 0, 65536, True, False, True)
    other_target = Bitmap(str(BitmapName("t2", "p0")), 0, 65536, True, False, True)
    busy = bitmap("dead", busy=True)
    each = disk(bitmap("p1"), bitmap("p2"), bitmap("p0"), foreign, other_target, busy)
    assert rubbish(each, CHAIN, TARGET) == (str(BitmapName(TARGET, "p0")),)


LEVELS = st.sampled_from([Level.FULL, Level.INC, Level.DIFF, Level.COPY])


@given(st.lists(LEVELS, max_size=8), st.sets(st.integers(0, 9)), st.sampled_from(list(Level)))
def test_no_plan_ever_builds_on_a_bitmap_that_is_not_there(
    history: list[Level], present: set[int], level: Level
) -> None:
    points: list[Point] = []
    for number, made in enumerate(history):
        full = last_full(points, "vda")
        made_here = made if full or made in {Level.FULL, Level.COPY} else Level.FULL
        points.append(point(number, made_here, full.id if full else None))
    each = disk(*(bitmap(f"p{number}") for number in present))
    try:
        (plan,) = plan_disks([each], level, points, fine, NEW)
    except IncrementalNotPossible:
        assert level in {Level.INC, Level.DIFF}
        return
    if plan.base is not None:
        assert plan.base_bitmap in {b.name for b in each.bitmaps}
        assert plan.base_bitmap not in rubbish(each, points, TARGET)
        assert plan.base.disk("vda") is not None
    else:
        assert plan.level in {Level.FULL, Level.COPY}


BASE = Underlay("backing", "/images/base.qcow2", "qcow2", SIZE, "7 1000 1")


def made_from(*underlays: Underlay) -> tuple[Point, ...]:
    """The chain, its last point made from these images."""
    (stored,) = CHAIN[-1].disks
    return (*CHAIN[:-1], replace(CHAIN[-1], disks=(replace(stored, underlays=underlays),)))


@pytest.mark.parametrize(
    ("now", "word"),
    [
        ((), "another"),
        ((BASE, BASE), "another"),
        ((replace(BASE, file="/images/new.qcow2", stamp="8 1000 1"),), "new.qcow2 now"),
        ((replace(BASE, file="/images/new.qcow2", stamp=""),), "new.qcow2 now"),
        ((replace(BASE, stamp="7 1000 2"),), "changed or replaced"),
        ((replace(BASE, stamp=""),), "changed or replaced"),
        ((replace(BASE, size=1),), "changed or replaced"),
    ],
)
def test_what_a_point_was_made_from_must_be_what_it_builds_on(
    now: tuple[Underlay, ...], word: str
) -> None:
    each = replace(disk(bitmap("p2")), underlays=now)
    (plan,) = plan_disks([each], Level.AUTO, made_from(BASE), fine, NEW)
    assert plan.level is Level.FULL
    assert word in plan.reason
    with pytest.raises(IncrementalNotPossible, match="vda"):
        plan_disks([each], Level.INC, made_from(BASE), fine, NEW)


def test_the_same_images_below_and_points_that_do_not_tell_go_on() -> None:
    each = replace(disk(bitmap("p2")), underlays=(BASE,))
    assert decide(each, Level.INC, made_from(BASE)) == (Level.INC, "p2")
    moved = replace(BASE, file="/elsewhere/base.qcow2")
    assert decide(each, Level.INC, made_from(moved)) == (Level.INC, "p2")
    data = replace(each, underlays=(Underlay("data-file", "/d1", "file", 0, "7"),))
    other = Underlay(
        "data-file", "/d2", "file", 0, "7"
    )  # each file system begins with the same inodes
    assert decide(data, Level.AUTO, made_from(other)) == (Level.FULL, "")
    assert decide(each, Level.INC, CHAIN) == (Level.INC, "p2")
    (plan,) = plan_disks([each], Level.AUTO, made_from(), fine, NEW)
    assert plan.level is Level.FULL


def test_a_disk_that_others_may_write_is_a_full_each_time() -> None:
    shared = replace(disk(bitmap("p2"), bitmap("p1")), other_writers="others may write to it")
    for level in (Level.AUTO, Level.FULL):
        (plan,) = plan_disks([shared], level, CHAIN, fine, NEW)
        assert (plan.level, plan.keeps_bitmap) == (Level.FULL, False)
    for level in (Level.INC, Level.DIFF):
        with pytest.raises(IncrementalNotPossible, match="others may write"):
            plan_disks([shared], level, CHAIN, fine, NEW)
    assert decide(shared, Level.COPY) == (Level.COPY, "")


def test_images_leave_a_chain_by_a_job_of_the_same_process_alone() -> None:
    nodes = [replace(BASE, file=f"/{name}", node=name) for name in "abc"]
    points = made_from(*nodes)
    told = replace(points[-1].vm, process="7 1 boot")
    points = (*points[:-1], replace(points[-1], vm=told))
    kept = (replace(nodes[0], stamp="8 2 2"), nodes[2])  # a commit writes to what stays
    for now, process, level in (
        (kept, "7 1 boot", Level.INC),
        ((), "7 1 boot", Level.INC),
        (kept, "7 2 boot", Level.FULL),
        (kept, "", Level.FULL),
        (tuple(reversed(kept)), "7 1 boot", Level.FULL),
        ((replace(BASE, node="d"),), "7 1 boot", Level.FULL),
        ((kept[0], *nodes[1:]), "7 1 boot", Level.FULL),
    ):
        each = replace(disk(bitmap("p2")), underlays=now)
        (plan,) = plan_disks([each], Level.AUTO, points, fine, NEW, process)
        assert plan.level is level, (now, process)
    unknown = (*points[:-1], replace(points[-1], vm=replace(told, process="")))
    each = replace(disk(bitmap("p2")), underlays=kept)
    (plan,) = plan_disks([each], Level.AUTO, unknown, fine, NEW, "")
    assert plan.level is Level.FULL

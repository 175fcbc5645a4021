# SPDX-License-Identifier: Apache-2.0
"""Chains come from manifests alone, and a user's word for a point means one point or an error."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpbackup.errors import DamagedError, NoSuchTarget, UsageError
from qmpbackup.model import Consistency, Level, Point, StoredDisk, VmConfig, VmIdentity
from qmpbackup.plan.chain import chain, children, find, ordered

START = datetime(2026, 11, 2, 3, 4, 5, 250_000, tzinfo=UTC)


def point(number: int, parent: int | None = None, *, file: str = "", disk: str = "hd0") -> Point:
    level = Level.FULL if parent is None else Level.INC
    parent_id = None if parent is None else name(parent)
    stored = StoredDisk(
        id=disk,
        level=level,
        file=file or f"hd0/{level.value.upper()}-{number}",
        parent=parent_id,
        size=1,
        file_size=1,
        digest="",
    )
    return Point(
        id=name(number),
        sequence=number,
        time=START + timedelta(hours=number),
        level=level,
        parent=parent_id,
        consistency=Consistency.CRASH,
        vm=VmConfig(VmIdentity(), ""),
        disks=(stored,),
    )


def name(number: int) -> str:
    return f"p{number:03}-{number * 7919 % 256:02x}"


@given(st.data())
def test_a_chain_runs_from_a_full_to_the_point_whatever_the_order_of_manifests(
    data: st.DataObject,
) -> None:
    count = data.draw(st.integers(1, 12))
    parents = [
        data.draw(st.none() | st.integers(0, number - 1)) if number else None
        for number in range(count)
    ]
    points = [point(number, parent) for number, parent in enumerate(parents)]
    top = data.draw(st.sampled_from(points))
    links = chain(data.draw(st.permutations(points)), top, "hd0")
    assert links[0].disk.parent is None
    assert links[-1].point is top
    assert all(above.disk.parent == below.point.id for below, above in pairwise(links))


def test_a_missing_parent_is_named() -> None:
    with pytest.raises(DamagedError, match=name(1)):
        chain([point(0), point(2, 1)], point(2, 1), "hd0")


def test_a_parent_without_the_disk_is_damage() -> None:
    with pytest.raises(DamagedError, match="does not hold disk hd0"):
        chain([point(0, disk="hd1"), point(1, 0)], point(1, 0), "hd0")


def test_points_that_build_on_each_other_are_damage_and_no_endless_loop() -> None:
    circle = [point(1, 2, file="hd0/INC-1"), point(2, 1, file="hd0/INC-2")]
    with pytest.raises(DamagedError, match="not older"):
        chain(circle, circle[0], "hd0")


def test_a_file_that_builds_on_itself_is_damage() -> None:
    points = [point(1, file="hd0/FULL-1"), point(2, 1, file="hd0/FULL-1")]
    with pytest.raises(DamagedError, match="its own file"):
        chain(points, points[1], "hd0")


def test_children_are_those_that_build_directly_on_a_point() -> None:
    points = [point(0), point(1, 0), point(2, 1), point(3, 0)]
    assert [each.id for each in children(points, name(0), "hd0")] == [name(1), name(3)]


@given(st.permutations([point(number) for number in range(8)]))
def test_sequence_alone_orders_points(points: list[Point]) -> None:
    assert [each.sequence for each in ordered(points)] == list(range(8))


POINTS = [point(number) for number in range(1, 6)]


@pytest.mark.parametrize(
    ("wanted", "number"),
    [
        ("latest", 5),
        (name(3), 3),
        ("p003", 3),
        ("2026-11-02T06:04:05.25+00:00", 3),
        ("2026-11-02T06:04:05.249999Z", 2),
        ("2026-11-02T06:04:05", 3),  # a time without fractions means the whole second
        ("2026-11-02T06:04", 3),
        ("2026-11-02 06:04", 3),
        ("2026-11-02T06:03", 2),
        ("2026-11-02T07:04:06+01:00", 3),
        ("2026-11-02T01:04:06-05:00", 3),
        ("2026-11-02", 5),
        ("2027-01-01", 5),
    ],
)
def test_a_point_is_found_by_any_of_its_names(wanted: str, number: int) -> None:
    assert find(POINTS, wanted).sequence == number


@pytest.mark.parametrize("wanted", ["2026-11-01", "2026-11-02T04:04:05.249Z", "nonsense", "", "q"])
def test_no_point_is_an_error_that_says_what_to_write(wanted: str) -> None:
    with pytest.raises(NoSuchTarget) as caught:
        find(POINTS, wanted)
    assert caught.value.hint


def test_a_beginning_that_fits_several_is_refused() -> None:
    with pytest.raises(UsageError, match="several"):
        find(POINTS, "p00")


def test_a_beginning_that_is_a_whole_id_means_that_point() -> None:
    longer = [point(1), point(2)]
    short = Point(**{slot: getattr(longer[0], slot) for slot in Point.__slots__} | {"id": "p002"})
    assert find([short, longer[1]], "p002") is short


def test_no_points_at_all_is_said() -> None:
    with pytest.raises(NoSuchTarget, match="no restore point"):
        find([], "latest")

# SPDX-License-Identifier: Apache-2.0
"""What a point lacks of its VM, and where the newest state of that is."""

from datetime import UTC, datetime

import pytest

from qmpbackup.model import (
    Absence,
    Consistency,
    Level,
    Merged,
    Point,
    Skipped,
    StoredDisk,
    VmConfig,
    VmIdentity,
)
from qmpbackup.plan.missing import missing


def point(
    number: int, *disks: str, skipped: tuple[Skipped, ...] = (), merged: tuple[Merged, ...] = ()
) -> Point:
    return Point(
        id=f"p{number}",
        sequence=number,
        time=datetime(2026, 1, number, tzinfo=UTC),
        level=Level.FULL,
        parent=None,
        consistency=Consistency.CRASH,
        vm=VmConfig(VmIdentity(), "7.2.0"),
        disks=tuple(StoredDisk(each, Level.FULL, f"{each}/F", None, 1, 1, "") for each in disks),
        skipped=skipped,
        merged=merged,
    )


def skipped(name: str, absence: Absence) -> tuple[Skipped, ...]:
    return (Skipped(name, "why", absence),)


EARLIER = point(1, "vda", "vdb")
LATER = point(3, "vda", "vdb")

CASES = [
    (point(2, "vda", skipped=skipped("vdb", Absence.CHOSEN)), True),
    (point(2, "vda", skipped=skipped("vdb", Absence.IMPOSSIBLE)), True),
    (point(2, "vda", merged=(Merged("vdb", "p3"),)), True),
    (point(2, "vda"), False),
]


@pytest.mark.parametrize(("lacking", "degrading"), CASES)
def test_a_disk_that_is_not_in_a_point(lacking: Point, degrading: bool) -> None:
    (found,) = missing((EARLIER, lacking, LATER), lacking)
    assert (found.id, found.newest, found.degrading) == ("vdb", EARLIER, degrading)
    assert "vdb is not in this point" in str(found)
    assert "point p1 of 2026-01-01" in str(found)


def test_the_next_point_that_holds_it_where_none_before_does() -> None:
    lacking = point(2, "vda", skipped=skipped("vdb", Absence.CHOSEN))
    (found,) = missing((lacking, LATER, point(4, "vdb")), lacking)
    assert found.newest == LATER


def test_what_no_point_can_hold_and_was_left_out_is_said_and_no_more() -> None:
    lacking = point(2, "vda", skipped=skipped("tpm0", Absence.CHOSEN))
    (found,) = missing((lacking,), lacking)
    assert not found.degrading
    assert "no point holds it" in str(found)
    (found,) = missing((), point(2, "vda", skipped=skipped("tpm0", Absence.IMPOSSIBLE)))
    assert found.degrading


def test_a_whole_point_lacks_nothing() -> None:
    assert not missing((EARLIER, LATER), LATER)
    assert not missing((EARLIER, LATER), EARLIER)
    empty = point(2, "vda", "vdb", skipped=skipped("cd", Absence.EMPTY))
    assert not missing((EARLIER, empty), empty)

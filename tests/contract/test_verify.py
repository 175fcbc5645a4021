# SPDX-License-Identifier: Apache-2.0
"""`verify` finds the damage in every kind of target, names it, and says just which points suffer from it.

What can be damaged in one kind alone is in `images/test_damaged_files.py` and `images/test_damaged_packs.py`.
"""

from pathlib import Path

import pytest

from qmpbackup.errors import DamagedError, Locked, NoSuchTarget
from qmpbackup.model import Point
from qmpbackup.service.restore import Request as RestoreRequest
from qmpbackup.service.restore import restore
from qmpbackup.service.verify import Request, verify
from stock.any_target import THIRD, Place


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_what_is_whole_is_found_whole(place: Place, points: list[Point], share: float) -> None:
    report = verify(Request(place.address, read_data=share))
    assert report.whole
    assert [(each.point, each.problems) for each in report.verdicts] == [(p, ()) for p in points]


@pytest.mark.parametrize("number", range(3))
def test_damaged_are_just_the_points_that_cannot_be_restored(
    place: Place, points: list[Point], tmp_path: Path, number: int
) -> None:
    name = place.spoil(points[number], "hd0")
    report = verify(Request(place.address, read_data=1.0))
    assert not report.whole
    assert [each.point for each in report.verdicts] == points
    assert not any(each.problems for each in report.verdicts[:number])
    assert report.verdicts[number].problems
    for each in report.verdicts:
        assert bool(each.problems) == (name in " ".join(each.problems))
        request = RestoreRequest(place.address, each.point.id, folder=tmp_path / each.point.id)
        if not each.problems:
            restore(request)
            continue
        with pytest.raises(DamagedError):
            restore(request)


def test_one_point_alone(place: Place, points: list[Point]) -> None:
    place.spoil(points[-1], "hd0")
    for point in points[:-1]:
        report = verify(Request(place.address, point.id, read_data=1.0))
        assert report.whole
        assert [each.point for each in report.verdicts] == [point]
    report = verify(Request(place.address, "latest", read_data=1.0))
    assert not report.whole
    assert [each.point for each in report.verdicts] == [points[-1]]
    assert report.verdicts[0].problems


def test_a_backup_in_progress_is_no_damage(place: Place, points: list[Point]) -> None:
    with place.held() as (target, found):
        _, receiver = place.begun(target, found.stored.points, THIRD, points[-1])
        assert verify(Request(place.address, read_data=1.0)).whole
        receiver.abort()


def test_what_cannot_be_verified_at_all(place: Place) -> None:
    with pytest.raises(NoSuchTarget):
        verify(Request(place.address))
    place.add(THIRD)
    with place.alone(), pytest.raises(Locked):
        verify(Request(place.address))

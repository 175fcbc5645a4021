# SPDX-License-Identifier: Apache-2.0
"""What a policy does not keep goes from every kind of target; what stays, stays whole.

How it goes: merged with what builds on it, in `images/test_pruned_chains.py`; swept by restic, in
`images/test_pruned_by_restic.py`.
"""

import re
from datetime import timedelta

import pytest

from lab import cli
from qmpbackup.errors import Locked, NoSuchTarget, UsageError
from qmpbackup.model import Point
from qmpbackup.plan.retention import Policy, parse_duration
from qmpbackup.service.prune import Request, prune
from qmpbackup.service.sweep import sweep
from qmpbackup.service.verify import Request as VerifyRequest
from qmpbackup.service.verify import verify
from qmpbackup.targets import opening
from stock.any_target import SECOND, Place, folder, repository


def assert_left(place: Place, points: list[Point]) -> None:
    """Just these points are left, whole, and give back every byte."""
    with place.read() as target:
        left = target.load().points
        assert [each.id for each in left] == [each.id for each in points]
        for point in left:
            assert place.contents(target, point) == {
                disk.id: place.expected[point.id, disk.id] for disk in point.disks
            }
    assert verify(VerifyRequest(place.address, read_data=1.0)).whole


@pytest.mark.parametrize("last", range(1, 4))
def test_the_last_ones_stay(place: Place, points: list[Point], last: int) -> None:
    outcome = prune(Request(place.address, Policy(last=last)))
    assert [each.point for each in outcome.kept] == points[-last:][::-1]
    assert list(outcome.removed) == points[:-last][::-1]
    assert outcome.freed is not None
    assert_left(place, points[-last:])


def test_sweeping_can_come_later(place: Place, points: list[Point]) -> None:
    prune(Request(place.address, Policy(last=1), sweeping=False))
    assert_left(place, points[-1:])
    sweep(place.address)
    assert_left(place, points[-1:])


def test_pruning_again_changes_nothing(place: Place, points: list[Point]) -> None:
    prune(Request(place.address, Policy(last=2)))
    before = place.everything()
    outcome = prune(Request(place.address, Policy(last=2)))
    assert place.everything() == before
    assert (outcome.removed, outcome.freed) == ((), 0)
    assert_left(place, points[1:])


def test_the_next_point_builds_on_what_has_stayed(place: Place, points: list[Point]) -> None:
    prune(Request(place.address, Policy(last=2)))
    last = place.add(SECOND, points[-1])
    assert_left(place, [*points[1:], last])


def test_a_dry_run_changes_nothing(place: Place, points: list[Point]) -> None:
    before = place.everything()
    outcome = prune(Request(place.address, Policy(last=1), dry_run=True))
    assert place.everything() == before
    assert outcome.removed == (points[1], points[0])
    assert_left(place, points)


def test_a_policy_without_a_rule_or_that_keeps_nothing_is_refused(
    place: Place, points: list[Point]
) -> None:
    before = place.everything()
    for policy in (Policy(), Policy(tags=(("mine",),))):
        with pytest.raises(UsageError):
            prune(Request(place.address, policy))
    assert place.everything() == before
    late = points[-1].time + timedelta(days=30)
    prune(Request(place.address, Policy(within=parse_duration("1h"))), late)
    assert_left(place, points[-1:])


def test_there_is_no_target(place: Place) -> None:
    with pytest.raises(NoSuchTarget):
        prune(Request(place.address, Policy(last=1)))


def test_who_reads_and_who_removes_is_not_disturbed(place: Place, points: list[Point]) -> None:
    for hold in (place.read, place.alone):
        with hold(), pytest.raises(Locked):
            prune(Request(place.address, Policy(last=1)))
    assert_left(place, points)


@pytest.mark.parametrize("place", [folder, repository], indirect=True)
def test_the_command_line(place: Place, points: list[Point]) -> None:
    command = ("prune", "--target", opening.entrance(place.address).spelled, "--keep-last", 2)
    lines = cli.run(*command, "--dry-run").check().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["remove", "keep", "keep"]
    assert re.fullmatch(r"2 kept, 1 would be removed(\.|, about .+)", lines[-1])
    *verdicts, summary = cli.run(*command, "--json").check().objects
    assert [each["keep"] for each in verdicts] == [False, True, True]
    assert verdicts[-1]["reasons"] == ["last", "newest point"]
    assert (summary["kept"], summary["removed"]) == (2, 1)
    assert_left(place, points[1:])
    assert cli.run(*command, "--json").check().objects[-1]["removed"] == 0

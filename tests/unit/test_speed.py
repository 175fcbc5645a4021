# SPDX-License-Identifier: Apache-2.0
"""How limits are shared, and how one that changes is kept."""

from qmpbackup.nbd.reader import _Throttle
from qmpbackup.plan.speed import JobSpeeds, lower, shared


def test_a_share_of_a_limit_is_never_no_limit() -> None:
    assert shared(100, 3) == 33
    assert shared(1, 32) == 1
    assert shared(0, 3) == 0
    assert shared(7, 0) == 7


def test_the_lower_of_two_limits_holds() -> None:
    assert [lower(0, 0), lower(3, 0), lower(0, 3), lower(3, 2)] == [0, 3, 3, 2]


def test_jobs_that_run_have_the_limit_among_them() -> None:
    limit = 90
    pace = JobSpeeds(40, lambda: limit, 3)
    assert pace.each == 30
    assert not pace.changed(3)
    assert pace.changed(2)
    assert pace.each == 40, "no job goes faster than each may"
    limit = 1
    assert pace.changed(2)
    assert pace.each == 1
    limit = 0
    assert pace.changed(1)
    assert pace.each == 40


def test_what_was_read_slowly_holds_nothing_up_once_it_may_go_fast() -> None:
    speed, now = 1, 1000.0
    throttle = _Throttle(lambda: speed, lambda: now)
    assert throttle.wait == 0
    throttle.spend(1000)
    assert throttle.wait == 1000
    now += 100
    assert throttle.wait == 900
    speed = 100
    assert throttle.wait == 9
    speed = 0
    assert throttle.wait == 0
    speed = 1
    assert throttle.wait == 0, "what was read without a limit counts for nothing"
    throttle.spend(5)
    now += 500
    assert throttle.wait == 0
    throttle.spend(5)
    assert throttle.wait == 5, "no credit for times in which nothing was read"

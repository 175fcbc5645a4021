# SPDX-License-Identifier: Apache-2.0
"""Waiting for a monitor that does not answer any more."""

from qmpbackup.machine.patience import Patience


def test_all_commands_after_one_that_was_not_answered_share_a_time() -> None:
    now = 0.0
    patience = Patience(20, lambda: now)
    assert patience.left(60) == 60
    now += 60
    patience.gave_up("stop")
    assert patience.left(60) == 20
    now += 15
    patience.gave_up("cont")
    assert (patience.left(60), patience.left(1)) == (5, 1)
    now += 15
    assert patience.left(60) == 0
    assert patience.unanswered == "stop"


def test_an_answer_ends_that() -> None:
    patience = Patience(20, lambda: 0.0)
    patience.gave_up("stop")
    patience.answered()
    assert patience.left(60) == 60

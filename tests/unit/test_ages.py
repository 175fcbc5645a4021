# SPDX-License-Identifier: Apache-2.0
"""Spans of time as people read them."""

from datetime import timedelta

import pytest

from qmpbackup.plan.ages import age


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (14.2, "14 s"),
        (59.7, "1 m 00 s"),
        (301, "5 m 01 s"),
        (7 * 3600 + 125, "7 h 02 m"),
        (2 * 86400 + 3 * 3600, "2 d 3 h"),
        (11 * 86400, "11 d"),
        (-5, "0 s"),
    ],
)
def test_a_span_is_said_in_its_two_largest_units(seconds: float, said: str) -> None:
    assert age(seconds) == age(timedelta(seconds=seconds)) == said

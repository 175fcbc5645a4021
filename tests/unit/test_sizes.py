# SPDX-License-Identifier: Apache-2.0
"""Sizes as users write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpbackup.errors import UsageError
from qmpbackup.plan.sizes import human, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("2000000", 2000000),
        ("50M", 50 << 20),
        ("1k", 1024),
        ("2GiB", 2 << 30),
        ("3 T", 3 << 40),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5G", "1X", "٣", "1MM", "50M/s"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


@given(st.integers(min_value=0, max_value=1 << 70))
def test_plain_numbers_are_bytes(size: int) -> None:
    assert parse_size(str(size)) == size


@given(st.integers(min_value=0, max_value=1 << 62))
def test_people_get_at_most_four_digits(size: int) -> None:
    number, unit = human(size).split()
    assert float(number) < 1024
    assert unit[-1] == "B"

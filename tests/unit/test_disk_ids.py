# SPDX-License-Identifier: Apache-2.0
"""Disk ids: distinct, and those that users know."""

from hypothesis import given
from hypothesis import strategies as st

from qmpbackup.plan.disk_ids import Candidate, choose_ids

NAMES = st.sampled_from(["", "a", "b", "disk1", "node:a", "a~2", "disk0"])
CANDIDATES = st.lists(st.builds(Candidate, device=NAMES, drive=NAMES, node=NAMES), max_size=8)


def test_the_device_names_a_disk_before_its_drive_and_node() -> None:
    assert choose_ids([Candidate("vda", "drive0", "node0")]) == ["vda"]
    assert choose_ids([Candidate("", "ide0-hd0", "node0")]) == ["ide0-hd0"]
    assert choose_ids([Candidate("", "", "node0")]) == ["node0"]


def test_one_name_of_two_kinds_stays_with_the_device() -> None:
    assert choose_ids([Candidate("", "", "a"), Candidate("a", "", "")]) == ["node:a", "a"]


@given(CANDIDATES)
def test_ids_are_distinct_and_never_empty(candidates: list[Candidate]) -> None:
    ids = choose_ids(candidates)
    assert len(set(ids)) == len(ids) == len(candidates)
    assert all(ids)


@given(CANDIDATES)
def test_ids_are_the_same_each_time(candidates: list[Candidate]) -> None:
    assert choose_ids(candidates) == choose_ids(list(candidates))

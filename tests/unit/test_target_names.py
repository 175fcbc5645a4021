# SPDX-License-Identifier: Apache-2.0
"""Folders of disks: whatever a disk is called, its folder is its own and harmless."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpbackup.targets.names import (
    folder_name,
    is_folder_name,
    is_point_id,
    parse_file,
)

# Names that try to meet: characters that are encoded, and what their encoding looks like.
tricky = st.text(st.sampled_from("aA.%2F-_/\0 ~é\ud800pointsvm.json"), max_size=60)
names = st.one_of(st.text(max_size=80), tricky, st.text(min_size=120, max_size=300))


@given(names, names)
def test_different_disks_have_different_folders(one: str, other: str) -> None:
    assert (folder_name(one) == folder_name(other)) == (one == other)


@given(names)
def test_a_folder_is_one_plain_component_of_a_path(disk_id: str) -> None:
    folder = folder_name(disk_id)
    assert is_folder_name(folder)
    assert Path(folder).name == folder
    assert not folder.startswith(".")
    assert folder not in {"", "points", "vm.json"}
    assert len(folder.encode()) <= 128


@pytest.mark.parametrize("name", ["ide0-hd0", "virtio-disk0", "drive_1.a"])
def test_usual_names_stay_as_they_are(name: str) -> None:
    assert folder_name(name) == name


def test_long_names_that_begin_alike_stay_apart() -> None:
    assert folder_name("x" * 200) != folder_name("x" * 201)


@pytest.mark.parametrize(
    "text",
    [
        "hd0/../../etc/passwd",
        "../FULL-1",
        "/FULL-1",
        "hd0//FULL-1",
        "hd0/FULL-1/x",
        "hd0/FULL-",
        "hd0/FULL-1\n",
        "hd0/FULL-1.partial",
        "hd0/full-1",
        "points/FULL-1",
        ".hidden/FULL-1",
        "hd0/FULL-١",
        "FULL-1",
        "",
    ],
)
def test_only_exact_names_of_backup_files_are_taken(text: str) -> None:
    assert parse_file(text) is None


@pytest.mark.parametrize("text", ["", "../x", "a/b", ".a", "-a", "a" * 65, "a\n", "ä"])
def test_ids_of_points_are_safe_as_names(text: str) -> None:
    assert not is_point_id(text)

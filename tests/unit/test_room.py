# SPDX-License-Identifier: Apache-2.0
"""What must fit on a file system, what stays free there, and who is told when it does not."""

from pathlib import Path

import pytest

from qmpbackup import interrupt
from qmpbackup.errors import StorageError
from qmpbackup.plan import room as plan
from qmpbackup.plan.room import Need, Space
from qmpbackup.service import room

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40


@pytest.mark.parametrize(
    ("total", "free", "wanted", "kept"),
    [
        (10 * TIB, TIB, None, GIB),
        (10 * GIB, 2 * GIB, None, 512 * MIB),
        (10 * GIB, 512 * MIB, None, 256 * MIB),
        (10 * GIB, 0, None, 0),
        (10 * GIB, 2 * GIB, 3 * GIB, 3 * GIB),
        (10 * GIB, 2 * GIB, 0, 0),
    ],
)
def test_what_is_kept(total: int, free: int, wanted: int | None, kept: int) -> None:
    assert Space(1, "/images", total, free).reserve(wanted) == kept


@pytest.mark.parametrize(
    ("certain", "wanted", "fits"),
    [(GIB, None, True), (GIB + 1, None, False), (GIB + 1, 0, True), (1, 2 * GIB, False)],
)
def test_what_fits_beside_it(certain: int, wanted: int | None, fits: bool) -> None:
    space = Space(1, "/images", TIB, 2 * GIB)
    assert (plan.shortage(space, [Need("a", certain), Need("b", 0)], wanted) == "") is fits


def test_a_shortage_names_its_figures() -> None:
    said = plan.shortage(Space(1, "/images", TIB, GIB), [Need("a", GIB), Need("b", GIB)], None)
    assert "/images: 2.0 GiB are needed (a, b), 1.0 GiB are free, and 512.0 MiB of that" in said


@pytest.mark.parametrize(
    ("most", "held", "certain"), [(10, 4, 4), (10, 40, 10), (10, None, 0), (0, 4, 0)]
)
def test_what_a_copy_takes_for_certain(most: int, held: int | None, certain: int) -> None:
    assert plan.certain_bytes(most, held) == certain


def test_one_file_system_counts_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    missing = tmp_path / "missing" / "folder"
    found = room.by_space([(tmp_path / "a", Need("a", 1)), (missing, Need("b", 2))])
    assert [[need.certain for need in needs] for _, needs in found] == [[1, 2]]


def test_who_looks_at_signals_is_told_once(tmp_path: Path) -> None:
    space = room.space(tmp_path)
    assert space is not None
    with room.kept([space], 1 << 62, "Do something") as lookout:
        assert "are kept for the images of running VMs" in lookout.look_now()
        with pytest.raises(StorageError, match="Given up"):
            interrupt.check()
        interrupt.check()
    interrupt.check()


def test_nobody_is_told_while_there_is_room(tmp_path: Path) -> None:
    space = room.space(tmp_path)
    assert space is not None
    for wanted in (1, 0):
        with room.kept([space], wanted, "") as lookout:
            assert not lookout.look_now()
            interrupt.check()

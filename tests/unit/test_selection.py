# SPDX-License-Identifier: Apache-2.0
"""Which disks a run takes, by any of their names, and what is said of those that it does not."""

import pytest

from qmpbackup.errors import UsageError
from qmpbackup.model import LEFT_OUT, Absence, Disk, Skipped
from qmpbackup.plan.selection import Selection


def disk(name: str, label: str = "", *aliases: str) -> Disk:
    path = f"/machine/peripheral/{name}"
    return Disk(name, path, "", "n", "n", "raw", 1, "/x", False, label=label, aliases=aliases)


ROOT, DATA = disk("vda", "root", "node-a"), disk("vdb", "", "node-b")
CDROM = Skipped("cd0", "empty drive")
PASSED_THROUGH = Skipped("hd9", "the host's device", Absence.IMPOSSIBLE, ("scsi9",))


@pytest.mark.parametrize("name", ["vda", "root", "node-a"])
def test_a_disk_is_known_by_all_its_names(name: str) -> None:
    chosen, left_out = Selection(include=(name,)).apply([ROOT, DATA])
    assert chosen == (ROOT,)
    assert left_out == (Skipped("vdb", LEFT_OUT, Absence.CHOSEN),)
    assert Selection(exclude=(name,)).apply([ROOT, DATA])[0] == (DATA,)


def test_without_names_all_are_taken_and_what_is_none_is_told() -> None:
    assert Selection().apply([ROOT, DATA], [CDROM]) == ((ROOT, DATA), (CDROM,))


def test_what_is_included_can_be_excluded_again() -> None:
    assert Selection(("vda", "vdb"), ("vdb",)).apply([ROOT, DATA])[0] == (ROOT,)


def test_what_cannot_be_backed_up_may_be_left_out_knowingly() -> None:
    _, (kept,) = Selection().apply([ROOT], [PASSED_THROUGH])
    assert kept.absence is Absence.IMPOSSIBLE
    _, (left,) = Selection(exclude=("scsi9",)).apply([ROOT], [PASSED_THROUGH])
    assert left.absence is Absence.CHOSEN
    assert left.reason == f"{LEFT_OUT}; {PASSED_THROUGH.reason}"


@pytest.mark.parametrize("name", ["vdc", "", "cd0"])
def test_a_name_of_nobody_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(UsageError, match="has no disk") as refused:
        Selection(exclude=(name,)).apply([ROOT, DATA], [CDROM])
    assert "vda, vdb" in refused.value.hint

# SPDX-License-Identifier: Apache-2.0
"""VMs with one UUID that take turns are said to be clones; one that was renamed or moved is not."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from qmpbackup.model import Consistency, Level, Point, StoredDisk, VmConfig, VmIdentity
from qmpbackup.plan.clones import others_with_uuid

UUID = "7a1c7e7e-6f0c-4d3c-9a27-0d5c1f1c2b3a"


def vm(called: str, uuid: str = UUID) -> VmIdentity:
    name, _, host = called.partition("@")
    return VmIdentity(uuid=uuid, name=name, address="/run/vm.qmp", host=host)


def points(made: Sequence[str]) -> list[Point]:
    """Points as `name@host` or `name@host inc`, the oldest first."""
    found = []
    for number, text in enumerate(made):
        called, _, level = text.partition(" ")
        disk = StoredDisk("vda", Level(level or "full"), "f", None, 9, 9, "d", "qcow2")
        found.append(
            Point(
                id=f"p{number}",
                sequence=number,
                time=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=number),
                level=disk.level,
                parent=None,
                consistency=Consistency.CRASH,
                vm=VmConfig(vm(called), "7.2.22"),
                disks=(disk,),
            )
        )
    return found


@pytest.mark.parametrize(
    ("made", "now"),
    [
        ([], "a@h"),
        (["a@h", "a@h inc"], "a@h"),
        (["a@h", "a@h inc"], "b@h"),
        (["a@h", "b@h inc", "b@h inc"], "b@h"),
        (["a@h", "a@i inc", "a@h inc", "a@i inc"], "a@h"),
        (["a@h", "a@"], "a@h"),
    ],
)
def test_one_vm_that_was_renamed_or_moved(made: Sequence[str], now: str) -> None:
    assert not others_with_uuid(points(made), vm(now))


@pytest.mark.parametrize(
    ("made", "now"),
    [
        (["a@h", "b@h"], "a@h"),
        (["a@h", "b@h inc", "a@h", "b@h"], "b@h"),
        (["a@h", "a@i"], "a@h"),
        (["a@h", "a@h inc", "b@i", "b@i inc", "a@h"], "a@h"),
    ],
)
def test_clones_that_take_turns(made: Sequence[str], now: str) -> None:
    said = others_with_uuid(points(made), vm(now))
    assert "take turns" in said
    assert UUID in said


def test_vms_without_a_uuid_are_told_apart_otherwise() -> None:
    assert not others_with_uuid(points(["a@h", "b@h"]), vm("a@h", uuid=""))

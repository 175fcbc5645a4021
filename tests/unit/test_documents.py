# SPDX-License-Identifier: Apache-2.0
"""What `--json` prints: members that are there for good."""

import json
from datetime import UTC, datetime, timedelta

from qmpbackup import documents, fleet_documents
from qmpbackup.model import Consistency, Level, Merged, Point, StoredDisk, VmConfig, VmIdentity
from qmpbackup.plan.retention import Verdict
from qmpbackup.service.init import Made
from qmpbackup.targets.overview import HeldVm
from qmpbackup.targets.removal import Removed

DISK = StoredDisk(
    "hd0", Level.FULL, "hd0/FULL-1", None, 1024, 99, "blake3:" + "0" * 64, label="root"
)
POINT = Point(
    id="20261102T030405Z-ab12cd",
    sequence=1,
    time=datetime(2026, 11, 2, 3, 4, 5, 678, UTC),
    level=Level.FULL,
    parent=None,
    consistency=Consistency.CRASH,
    vm=VmConfig(VmIdentity("u", "web", "/run/qmp", "h"), "7.2.0", "pc", ("qemu",)),
    disks=(DISK,),
    skipped=(),
    merged=(Merged("hd1", "20261103T030405Z-ab12cd"),),
    pause=0.01,
    notes=(),
)


def test_a_point_of_a_list() -> None:
    found = json.loads(json.dumps(documents.listed(POINT, ["hd0"])))
    assert found == {
        "schema": 1,
        "type": "point",
        "id": POINT.id,
        "time": "2026-11-02T03:04:05.000678Z",
        "level": "full",
        "parent": None,
        "vm": "web",
        "uuid": "u",
        "host": "h",
        "disks": ["hd0"],
        "labels": {"hd0": "root"},
        "consistency": "crash",
        "size": 99,
        "merged": [{"id": "hd1", "into": "20261103T030405Z-ab12cd"}],
        "damaged": ["hd0"],
    }


def test_what_a_target_holds_of_a_vm() -> None:
    now = POINT.time + timedelta(hours=1)
    found = json.loads(
        json.dumps(fleet_documents.held(HeldVm(POINT.vm.identity, 3, POINT, 1, 0), now))
    )
    assert found == {
        "schema": 1,
        "type": "held",
        "vm": "web",
        "host": "h",
        "uuid": "u",
        "newest": POINT.id,
        "time": "2026-11-02T03:04:05.000678Z",
        "age": 3600.0,
        "consistency": "crash",
        "points": 3,
        "damaged": 1,
        "ahead": 0,
    }
    assert fleet_documents.held(HeldVm(POINT.vm.identity), now)["newest"] is None


def test_a_point_in_full_is_its_manifest_and_its_size() -> None:
    found = documents.shown(POINT)
    assert (found["schema"], found["type"], found["size"]) == (1, "point", 99)
    assert [disk["file"] for disk in found["disks"]] == ["hd0/FULL-1"]


def test_a_verdict_for_each_point_and_a_summary() -> None:
    outcome = Removed((Verdict(POINT, ("last",)),), freed=5)
    verdict, summary = documents.pruned(outcome, dry_run=True)
    assert (verdict["type"], verdict["keep"], verdict["reasons"]) == ("verdict", True, ["last"])
    assert summary == {
        "schema": 1,
        "type": "summary",
        "dry_run": True,
        "kept": 1,
        "removed": 0,
        "merged": outcome.merged,
        "freed": 5,
    }


def test_a_repository_that_was_made() -> None:
    found = documents.made(Made("ab" * 32, "/srv/repository"))
    assert found == {"schema": 1, "type": "init", "id": "ab" * 32, "location": "/srv/repository"}

# SPDX-License-Identifier: Apache-2.0
"""What may be left once a run after a broken one has succeeded, read without the product."""

import json
from typing import Any

from lab.backups import bitmaps, leftovers
from lab.machine import Machine
from lab.repositories import Repository, Target

PREFIX = "qmpbackup:"


def manifests(target: Target) -> list[dict[str, Any]]:
    """All points of a target in the order of their commits."""
    if isinstance(target, Repository):
        return target.manifests()
    points = [json.loads(path.read_text()) for path in target.glob("points/*.json")]
    return sorted(points, key=lambda point: int(point["sequence"]))


def assert_clean(vm: Machine, target: Target) -> None:
    """Nothing is left of any run but what the next one needs.

    The VM runs, its disks sit on their own nodes; there are the change bitmaps of each disk's last
    point and last full and no others of this target; the target holds exactly what its manifests
    name, and no scratch image lies beside the disks.
    """
    assert vm.qmp("query-status")["running"], "the VM does not run"
    assert leftovers(vm) == []
    assert_bitmaps(vm, target)
    assert_only_named(target)
    for folder in {disk.image.parent for disk in vm.disks}:
        assert not list(folder.glob(".qmpbackup-*")), "a scratch image is left"


def assert_bitmaps(vm: Machine, target: Target) -> None:
    """Of this target, QEMU holds the bitmaps that its last points need, and no others."""
    owner = owner_of(target)
    found = {name for _, name in bitmaps(vm) if name.startswith(f"{PREFIX}{owner}:")}
    needed: set[str] = set()
    for disk in {disk["id"] for point in manifests(target) for disk in point["disks"]}:
        chain = [
            each for point in manifests(target) for each in point["disks"] if each["id"] == disk
        ]
        chain = [each for each in chain if each["level"] != "copy"]
        full = [each for each in chain if each["level"] == "full"]
        for each in chain[-1:] + full[-1:]:
            needed |= {each.get("bitmap", ""), each.get("end_mark", "")}
    assert found == needed - {""}


def owner_of(target: Target) -> str:
    """What the bitmaps of a target are named after."""
    if isinstance(target, Repository):
        return target.id[:16]
    return str(json.loads((target / "vm.json").read_text())["id"])


def assert_only_named(target: Target) -> None:
    """The target holds the files that its manifests name, its own few, and no others.

    In a repository, what a dead run had stored may lie about until somebody prunes: restic finds
    nothing wrong there, and no lock.
    """
    if isinstance(target, Repository):
        target.assert_whole()
        return
    named = {disk["file"] for point in manifests(target) for disk in point["disks"]}
    named |= {f"points/{point['id']}.json" for point in manifests(target)}
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert found - {"vm.json", ".lock", ".lock-remove"} == named

# SPDX-License-Identifier: Apache-2.0
"""What most tests of backups do: make a point of a VM, restore points, compare."""

import json
from pathlib import Path
from typing import Any

from lab import cli
from lab.cli import Argument, Result
from lab.disks import first_difference
from lab.machine import Machine
from lab.repositories import Repository, Target, environment_of


def back_up(vm: Machine, target: Target, level: str = "auto", *more: Argument) -> dict[str, Any]:
    """Make a point; its JSON record. Anything but exit code 0 fails the test."""
    result = try_backup(vm, target, level, "--json", *more).check()
    point: dict[str, Any] = json.loads(result.out)["point"]
    return point


def try_backup(vm: Machine, target: Target, level: str = "auto", *more: Argument) -> Result:
    """Run a backup, however it ends."""
    arguments = ("backup", "--level", level, "--target", str(target), *more)
    return cli.run("--socket", vm.socket, *arguments, env=environment_of(target))


def levels(point: dict[str, Any]) -> dict[str, str]:
    """The level of each disk of a point."""
    return {disk["id"]: disk["level"] for disk in point["disks"]}


def restored(target: Target, point: str, folder: Path) -> dict[str, bytes]:
    """What a restore gives back, for each disk by its folder's name; of a repository, restic's."""
    if isinstance(target, Repository):
        return target.restored(point)
    return _restored_by_us(target, point, folder)


def _restored_by_us(target: Target, point: str, folder: Path) -> dict[str, bytes]:
    output = folder / f"restored-{point}"
    arguments = ["--point", point, "--output", str(output), "--format", "raw", "--force"]
    if isinstance(target, Repository):
        arguments += ["--vm", target.vm_of(point)]
    environment = environment_of(target)
    cli.run("restore", "--target", str(target), *arguments, env=environment).check()
    return {image.name.removesuffix(".raw"): image.read_bytes() for image in output.iterdir()}


def assert_restores(target: Target, point: str, expected: dict[str, bytes], folder: Path) -> None:
    """A point gives back just these disks and bytes; that of a repository by restic and by us."""
    by_us = _restored_by_us(target, point, folder)
    ways = [by_us, target.restored(point)] if isinstance(target, Repository) else [by_us]
    for found in ways:
        assert set(found) == set(expected)
        for disk, contents in expected.items():
            assert not first_difference(found[disk], contents), disk


def leftovers(vm: Machine) -> list[str]:
    """Whatever carries the prefix of a run of ours inside QEMU."""
    names = [node["node-name"] for node in vm.qmp("query-named-block-nodes", flat=True)]
    names += [job["id"] for job in vm.qmp("query-jobs")]
    names += [export["id"] for export in vm.qmp("query-block-exports")]
    names += [item["name"] for item in vm.qmp("qom-list", path="/objects")]
    names += [device["label"] for device in vm.qmp("query-chardev")]
    names += [bitmap for _, bitmap in bitmaps(vm)]
    if vm.qmp("query-status")["running"]:
        sets = vm.qmp("query-fdsets")
        names += [fd.get("opaque", "") for each in sets for fd in each["fds"]]
    return [name for name in names if name.startswith("qmpbackup-")]


def is_copying(vm: Machine) -> bool:
    """Whether a run is copying a view; small jobs that prepare one do not count."""
    jobs = vm.qmp("query-jobs")
    return any("-job" in job["id"] and job["status"] == "running" for job in jobs)


def bitmaps(vm: Machine) -> set[tuple[str, str]]:
    """All bitmaps of the VM, as (node, name)."""
    return {
        (node["node-name"], bitmap.get("name", ""))
        for node in vm.qmp("query-named-block-nodes", flat=True)
        for bitmap in node.get("dirty-bitmaps", [])
    }

# SPDX-License-Identifier: Apache-2.0
"""Backups of a running QEMU that go the same way whatever kind of target they go to.

By the command line, and judged by `qemu-img` and restic; what the interface promises is tested in
`contract/test_target.py`.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import cli
from lab.backups import assert_restores, back_up, levels
from lab.disks import MIB, Disk, create, pattern
from lab.qemu import Qemu, StartQemu
from lab.repositories import Repository, Target, environment_of
from stock.repositories import repository

SIZE = 16 * MIB


@pytest.fixture(params=["folder", "repository"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Target]:
    """A target with nothing in it; a repository is without fault at the end of every test."""
    made: Target = tmp_path / "target"
    if request.param == "repository":
        made = repository(tmp_path / "target")
    yield made
    if isinstance(made, Repository):
        made.assert_whole(read_data=True)


def vm_with_a_disk(folder: Path, start_qemu: StartQemu) -> Qemu:
    """A VM with one disk, which has contents."""
    image = create(folder / "vda.qcow2", SIZE, contents=pattern(SIZE, 1))
    return start_qemu([Disk("vda", image)])


def test_grown_disks_go_on_and_disks_that_were_shrunk_are_made_whole(
    tmp_path: Path, start_qemu: StartQemu, target: Target
) -> None:
    vm = vm_with_a_disk(tmp_path, start_qemu)

    def resized(*sizes: int) -> str:
        for size in sizes:
            vm.qmp("block_resize", **{"node-name": "node-vda", "size": size})
        point = back_up(vm, target)
        assert_restores(target, point["id"], {"vda": vm.contents("vda")}, tmp_path)
        return levels(point)["vda"]

    odd = SIZE + 3 * MIB + 512
    assert resized() == "full"
    assert resized(odd) == "inc"
    vm.write("vda", odd - 512, 512, 5)
    assert resized(odd + 512) == "inc"
    vm.write("vda", SIZE + MIB, MIB, 6)
    assert resized() == "inc"
    assert resized(SIZE, odd) == "full"
    assert resized(9 * MIB) == "full"
    assert resized(SIZE) == "inc"
    assert resized(9 * MIB, SIZE) == "full"


def test_incrementals_go_on_after_pruning(
    tmp_path: Path, start_qemu: StartQemu, target: Target
) -> None:
    vm = vm_with_a_disk(tmp_path, start_qemu)
    for value in range(1, 4):
        vm.write("vda", value * MIB, MIB, value)
        last = back_up(vm, target)["id"]
    expected = {last: vm.contents("vda")}
    arguments = ("prune", "--target", str(target), "--keep-last", 1)
    cli.run(*arguments, env=environment_of(target)).check()
    vm.write("vda", 5 * MIB, MIB, 5)
    point = back_up(vm, target)
    assert levels(point) == {"vda": "inc"}
    expected[point["id"]] = vm.contents("vda")
    for point_id, contents in expected.items():
        assert_restores(target, point_id, {"vda": contents}, tmp_path)

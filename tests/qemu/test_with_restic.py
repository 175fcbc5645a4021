# SPDX-License-Identifier: Apache-2.0
"""Backups of a running QEMU into a restic repository beside the real restic, which reads, holds and changes it.

What holds for folders as well is in `test_backup.py`.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.aftermath import assert_clean, manifests
from lab.backups import assert_restores, back_up, bitmaps, leftovers, levels, restored, try_backup
from lab.disks import MIB, Disk, create, filled
from lab.patience import wait_until
from lab.qemu import Qemu, StartQemu
from lab.repositories import Repository
from lab.restic import Backing, Restic
from stock.repositories import held_alone, made, repository

SIZE = 16 * MIB
USAGE, NO_INCREMENTAL, NONE, LOCKED, PASSWORD = 2, 4, 10, 11, 12


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Repository]:
    """A repository, which is without fault at the end of every test."""
    made = repository(tmp_path / "target")
    yield made
    made.assert_whole(read_data=True)


def reasons(point: dict[str, object]) -> dict[str, str]:
    """Why each disk of a point has its level."""
    found = point["disks"]
    assert isinstance(found, list)
    return {each["id"]: each["reason"] for each in found}


def test_snapshots_read_well(tmp_path: Path, start_qemu: StartQemu, target: Repository) -> None:
    vm = start_qemu([filled(tmp_path, "vda")], name="web server")
    points = [back_up(vm, target), back_up(vm, target)]
    first, second = target.snapshots()
    assert [first["paths"], second["paths"]] == [["/web%20server"]] * 2
    assert second["parent"] == first["id"]
    for point, snapshot in zip(points, (first, second), strict=True):
        assert snapshot["tags"] == ["qmpbackup", "vm=web%20server", f"point={point['id']}"]
        assert snapshot["hostname"] == os.uname().nodename
    listed = target.restic("ls", second["id"]).text.splitlines()
    assert {"/web%20server/vda.raw", "/web%20server/manifest.json"} <= set(listed)


def test_the_same_bytes_are_stored_once_and_looking_at_them_stores_none(
    tmp_path: Path, start_qemu: StartQemu, target: Repository
) -> None:
    vm = start_qemu([filled(tmp_path, "vda"), filled(tmp_path, "vdb", 1, "raw")])
    first = back_up(vm, target)
    assert first["disks"][1]["file_size"] == 0
    point = back_up(vm, target, "inc", "--audit", "0")
    assert [each["file_size"] for each in point["disks"]] == [0, 0]
    vm.write("vda", 5 * MIB + 7 * 512, 512, 1)
    point = back_up(vm, target, "inc", "--audit", "100%")
    assert 0 < point["disks"][0]["file_size"] < 2 * MIB
    assert point["disks"][1]["file_size"] == 0
    assert_restores(target, point["id"], vm.live(), tmp_path)


def test_what_makes_no_sense_is_refused(
    tmp_path: Path, start_qemu: StartQemu, target: Repository
) -> None:
    vm = start_qemu([filled(tmp_path, "vda")])
    back_up(vm, target)
    try_backup(vm, target, "diff").check(USAGE)
    try_backup(vm, target, "inc", "--monthly").check(USAGE)
    try_backup(vm, target, "inc", "--uuid", "mine").check(USAGE)
    assert len(target.snapshots()) == 1
    assert_clean(vm, target)


def test_disks_too_large_for_one_point_are_refused(
    tmp_path: Path, start_qemu: StartQemu, target: Repository
) -> None:
    disks = [Disk(name, create(tmp_path / name, 16 << 40)) for name in ("vda", "vdb")]
    vm = start_qemu(disks)
    assert "--include" in try_backup(vm, target).check(USAGE).err
    assert target.snapshots() == []
    assert_clean(vm, target)


def test_a_repository_that_is_not_there_or_not_ours(
    tmp_path: Path, start_qemu: StartQemu, target: Repository
) -> None:
    vm = start_qemu([filled(tmp_path, "vda")])
    missing = Repository(str(tmp_path / "missing"), tmp_path / "missing-caches")
    assert "init" in try_backup(vm, missing).check(NONE).err
    assert not Path(missing.location).exists()
    strange = Repository(target.location, target.folder, password="guessed")  # noqa: S106
    result = try_backup(vm, strange).check(PASSWORD)
    assert "guessed" not in result.out + result.err
    assert leftovers(vm) == []
    assert bitmaps(vm) == set()


def test_restic_beside_us_and_alone(
    tmp_path: Path, start_qemu: StartQemu, target: Repository
) -> None:
    vm = start_qemu([filled(tmp_path, "vda")])
    with Backing(target.restic):
        wait_for_locks(target, 1)
        back_up(vm, target)
    with held_alone(target):
        result = try_backup(vm, target, "inc").check(LOCKED)
        assert str(os.getpid()) in result.err
        assert leftovers(vm) == []
    back_up(vm, target, "inc")


def wait_for_locks(target: Repository, count: int) -> None:
    """Wait until so many locks are there."""
    wait_until(lambda: len(target.restic("list", "locks", "--no-lock").text.split()) >= count)


def test_disks_in_iothreads(tmp_path: Path, start_qemu: StartQemu, target: Repository) -> None:
    vm = start_qemu(
        [
            filled(tmp_path, "vda", 1, iothread="io"),
            filled(tmp_path, "vdb", 2, "raw", iothread="io"),
        ],
        iothreads=["io"],
        firmware="seabios",
    )
    back_up(vm, target)
    for block in range(3):
        vm.write("vda", block * 5 * MIB + 512, 70000 // 512 * 512, block + 1)
    vm.write("vdb", SIZE - 512, 512, 9)
    point = back_up(vm, target, "inc", "--audit", "10%")
    assert_restores(target, point["id"], vm.live(), tmp_path)
    assert_clean(vm, target)


def test_vms_share_a_repository_and_repositories_a_vm(
    tmp_path: Path, start_qemu: StartQemu, target: Repository
) -> None:
    other = repository(tmp_path / "other")
    one = start_qemu(
        [filled(tmp_path, "one")], name="one", uuid="00000000-0000-0000-0000-000000000001"
    )
    two = start_qemu([filled(tmp_path, "two", 2)], name="two")
    for vm in (one, two, one, two):
        back_up(vm, target)
    back_up(one, other)
    one.write("one", MIB, MIB, 7)
    for each in (target, other):
        point = back_up(one, each, "inc")
        assert_restores(each, point["id"], one.live(), tmp_path)
    assert_restores(target, back_up(two, target, "inc")["id"], two.live(), tmp_path)
    paths = [each["paths"] for each in target.snapshots()]
    assert paths.count(["/one"]) == paths.count(["/two"]) == 3
    namesake = start_qemu(
        [filled(tmp_path, "three", 3)], name="one", uuid="00000000-0000-0000-0000-000000000002"
    )
    assert levels(back_up(namesake, target)) == {"three": "full"}
    assert levels(back_up(namesake, target, "inc")) == {"three": "inc"}
    assert_restores(target, back_up(one, target, "inc")["id"], one.live(), tmp_path)
    other.assert_whole()


def test_written_data_can_be_opened_again(
    tmp_path: Path, start_qemu: StartQemu, target: Repository
) -> None:
    vm = start_qemu([filled(tmp_path, "vda")])
    point = back_up(vm, target, "full", "--check-written")
    assert_restores(target, point["id"], vm.live(), tmp_path)


class TestAfterRestic:
    """restic changes the repository between two runs: we go on, or make a full and say why."""

    @pytest.fixture
    def vm(self, tmp_path: Path, start_qemu: StartQemu) -> Qemu:
        return start_qemu(
            [filled(tmp_path, "vda"), filled(tmp_path, "vdb", 2, "raw")], name="tended"
        )

    def test_forget_and_prune_of_older_points(
        self, tmp_path: Path, vm: Qemu, target: Repository
    ) -> None:
        for byte in range(4):
            vm.write("vda", byte * MIB, MIB, byte + 1)
            back_up(vm, target)
        target.restic(
            "forget", "--keep-last", "1", "--prune", "--group-by", "tags", "--tag", "vm=tended"
        )
        target.restic("forget", "--keep-last", "1", "--prune")
        self.goes_on(tmp_path, vm, target)
        target.restic("forget", "--keep-last", "1", "--prune", "--max-unused", "0")
        assert len(target.snapshots()) == 1
        self.goes_on(tmp_path, vm, target)

    def goes_on(self, folder: Path, vm: Qemu, target: Repository) -> None:
        """An incremental works, and restores."""
        vm.write("vdb", 2 * MIB + 512, 512, len(manifests(target)))
        point = back_up(vm, target, "inc", "--audit", "100%")
        assert levels(point) == {"vda": "inc", "vdb": "inc"}
        assert_restores(target, point["id"], vm.live(), folder)
        assert_clean(vm, target)

    def test_the_newest_point_is_forgotten(
        self, tmp_path: Path, vm: Qemu, target: Repository
    ) -> None:
        back_up(vm, target)
        middle, newest = back_up(vm, target), back_up(vm, target)
        target.restic("forget", target.snapshot_of(newest["id"])["id"], "--prune")
        refused = try_backup(vm, target, "inc").check(NO_INCREMENTAL)
        assert "bitmap is gone" in refused.err
        point = back_up(vm, target)
        assert levels(point) == {"vda": "full", "vdb": "full"}
        assert "bitmap is gone" in reasons(point)["vda"]
        assert point["sequence"] > middle["sequence"]
        assert_restores(target, point["id"], vm.live(), tmp_path)
        self.goes_on(tmp_path, vm, target)

    def test_all_points_but_the_full_are_forgotten(
        self, tmp_path: Path, vm: Qemu, target: Repository
    ) -> None:
        back_up(vm, target)
        vm.write("vda", MIB, MIB, 3)
        lost = back_up(vm, target)
        vm.write("vda", 3 * MIB, MIB, 4)
        target.restic("forget", target.snapshot_of(lost["id"])["id"], "--prune")
        self.goes_on(tmp_path, vm, target)

    @pytest.mark.slow
    def test_everything_is_forgotten(self, tmp_path: Path, vm: Qemu, target: Repository) -> None:
        back_up(vm, target)
        target.restic("forget", target.snapshots()[0]["id"], "--prune")
        try_backup(vm, target, "inc").check(NO_INCREMENTAL)
        assert "no earlier point" in reasons(back_up(vm, target))["vda"]
        self.goes_on(tmp_path, vm, target)

    def test_chunks_of_the_parent_are_gone(
        self, tmp_path: Path, vm: Qemu, target: Repository
    ) -> None:
        back_up(vm, target)
        data = Path(target.location) / "data"
        packs = sorted(data.glob("*/*"), key=lambda path: path.stat().st_size)
        packs[-1].unlink()
        target.restic("rebuild-index")
        assert target.restic("check", check=False).code
        refused = try_backup(vm, target, "inc").check(NO_INCREMENTAL)
        assert "missing" in refused.err
        point = back_up(vm, target)
        assert "missing" in reasons(point)["vda"]
        assert_restores(target, point["id"], vm.live(), tmp_path)
        # What was in the pack and is not on the disks any more, such as its manifest, is lost.
        target.restic("forget", target.snapshots()[0]["id"], "--prune")
        target.assert_whole(read_data=True)
        self.goes_on(tmp_path, vm, target)

    def test_the_repository_is_replaced(self, tmp_path: Path, vm: Qemu, target: Repository) -> None:
        back_up(vm, target)
        shutil.rmtree(target.location)
        new = made(Repository(target.location, target.folder))
        refused = try_backup(vm, new, "inc").check(NO_INCREMENTAL)
        assert "no earlier point" in refused.err
        point = back_up(vm, new)
        assert levels(point) == {"vda": "full", "vdb": "full"}
        self.goes_on(tmp_path, vm, new)

    @pytest.mark.slow
    def test_an_older_state_of_the_repository_comes_back(
        self, tmp_path: Path, vm: Qemu, target: Repository
    ) -> None:
        back_up(vm, target)
        back_up(vm, target)
        shutil.copytree(target.location, tmp_path / "kept")
        vm.write("vda", MIB, MIB, 3)
        back_up(vm, target)
        shutil.rmtree(target.location)
        (tmp_path / "kept").rename(target.location)
        try_backup(vm, target, "inc").check(NO_INCREMENTAL)
        point = back_up(vm, target)
        assert_restores(target, point["id"], vm.live(), tmp_path)
        self.goes_on(tmp_path, vm, target)

    def test_indexes_are_rebuilt_and_points_tagged_and_rewritten(
        self, tmp_path: Path, vm: Qemu, target: Repository
    ) -> None:
        first = back_up(vm, target)
        target.restic("rebuild-index", "--read-all-packs")
        self.goes_on(tmp_path, vm, target)
        target.restic("tag", "--add", "precious", target.snapshots()[-1]["id"])
        self.goes_on(tmp_path, vm, target)
        target.restic("tag", "--add", "old", "--tag", f"point={first['id']}")
        target.restic("rewrite", "--exclude", "*.none", "--forget", check=False)
        self.goes_on(tmp_path, vm, target)

    def test_points_are_copied_to_another_repository(
        self, tmp_path: Path, vm: Qemu, target: Repository
    ) -> None:
        points = [back_up(vm, target), back_up(vm, target)]
        second = repository(tmp_path / "second")
        restic = Restic(
            second.location,
            tmp_path / "second-cache",
            second.password,
            environment={
                "RESTIC_FROM_PASSWORD": target.password,
            },
        )
        restic("copy", "--from-repo", target.location)
        for point in points:
            assert_restores(second, point["id"], restored(target, point["id"], tmp_path), tmp_path)
        second.assert_whole(read_data=True)
        self.goes_on(tmp_path, vm, target)
        assert "gone" in try_backup(vm, second, "inc").check(NO_INCREMENTAL).err
        point = back_up(vm, second)
        assert_restores(second, point["id"], vm.live(), tmp_path)
        self.goes_on(tmp_path, vm, second)
        self.goes_on(tmp_path, vm, target)

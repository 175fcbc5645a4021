# SPDX-License-Identifier: Apache-2.0
"""Restores from a repository's chunks: whichever there are, wherever restic has put them, whatever of its
files is damaged, and over a network that fails.

What holds for every kind of target is in `contract/test_restore.py`.
"""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from lab import cli
from lab.damage import flip
from lab.devices import loop_device
from lab.http_proxy import Fate, HttpProxy
from lab.http_proxy import Request as HttpRequest
from lab.patience import PATIENCE
from lab.repositories import Repository
from lab.rest_server import RestServer
from lab.small import needs_root
from qmpbackup.errors import (
    DamagedError,
    NoSuchTarget,
    UsageError,
    WrongPassword,
)
from qmpbackup.service.restore import Request, restore
from qmpbackup.targets.names import folder_name
from stock.stored import MIB, contents, run
from stock.stored_repository import VM, StoredRepository

WILD = "a/../b: c"


def bytes_of(seed: int, length: int) -> bytes:
    """Bytes that are always the same, and that nothing makes smaller."""
    return Random(seed).randbytes(length)  # noqa: S311 - no secret


FIRST = {
    # zeros, a chunk twice, zeros within a chunk, and an end that fills none
    "hd0": bytes_of(1, MIB)
    + bytes(3 * MIB)
    + bytes_of(1, MIB)
    + bytes_of(2, MIB // 2)
    + bytes(MIB // 2)
    + b"text " * 1000
    + bytes(MIB - 5000)
    + bytes_of(3, 512 * 7),
    WILD: bytes(2 * MIB + 512),
}
SECOND = {"hd0": bytes_of(4, MIB) + FIRST["hd0"][MIB:], WILD: bytes_of(5, MIB) + bytes(2 * MIB)}


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoredRepository:
    """Two points of two disks, one of them with a name that is no name of a file."""
    stored = StoredRepository(tmp_path)
    for name, value in stored.made.environment.items():
        monkeypatch.setenv(name, value)
    stored.add(FIRST)
    stored.add(SECOND)
    return stored


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def assert_restores(
    stored: StoredRepository, out: Path, number: int = -1, *, format_: str = "raw", vm: str = ""
) -> None:
    """A point gives back all its disks."""
    point = stored.points[number]
    outcome = restore(Request(stored.place, point.id, folder=out, format=format_, vm=vm))
    assert outcome.point == point
    assert {each.disk_id for each in outcome.disks} == {disk.id for disk in point.disks}
    for each in outcome.disks:
        assert contents(each.path, format_) == stored.expected[point.id, each.disk_id]


@pytest.mark.parametrize("format_", ["qcow2", "raw"])
@pytest.mark.parametrize("number", [0, 1])
def test_chunks_of_all_sorts_come_back(
    stored: StoredRepository, out: Path, format_: str, number: int
) -> None:
    assert_restores(stored, out, number, format_=format_)
    if format_ == "qcow2":
        for path in out.iterdir():
            run("qemu-img", "check", "-q", str(path))


def test_it_is_what_restic_gives_back(stored: StoredRepository, out: Path) -> None:
    restore(Request(stored.place, folder=out, format="raw"))
    found = {path.stem: path.read_bytes() for path in out.iterdir()}
    assert found == stored.made.restored(stored.points[-1].id)


@pytest.mark.parametrize("format_", ["qcow2", "raw"])
def test_files_are_sparse(stored: StoredRepository, out: Path, format_: str) -> None:
    file = out / "disk"
    restore(Request(stored.place, stored.points[0].id, ("hd0",), file=file, format=format_))
    data = 3 * MIB  # of 7 MiB; the rest is zeros
    assert file.stat().st_blocks * 512 < data + MIB // 4


def test_an_image_can_be_written_to_and_holds_more_afterwards(
    stored: StoredRepository, out: Path
) -> None:
    file = out / "disk.qcow2"
    restore(Request(stored.place, stored.points[0].id, ("hd0",), file=file))
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 7 {2 * MIB} {MIB}", str(file))
    run("qemu-img", "check", "-q", str(file))
    expected = FIRST["hd0"]
    found = contents(file, "qcow2")
    assert found == expected[: 2 * MIB] + b"\7" * MIB + expected[3 * MIB :]


def test_a_chunk_that_stands_everywhere(stored: StoredRepository, out: Path) -> None:
    chunk = bytes_of(8, MIB)
    stored.add({"hd0": chunk * 150})
    assert_restores(stored, out)


def test_what_restic_has_forgotten_pruned_and_rewritten(
    stored: StoredRepository, out: Path
) -> None:
    restic = stored.made.restic
    restic("forget", stored.made.snapshot_of(stored.points[0].id)["id"])
    restic("prune", "--max-unused", "0")
    restic("tag", "--add", "kept", "latest")
    assert_restores(stored, out)
    with pytest.raises(NoSuchTarget):
        restore(Request(stored.place, stored.points[0].id, folder=out / "first"))


def test_without_a_cache(stored: StoredRepository, out: Path) -> None:
    shutil.rmtree(stored.made.folder / "cache")
    assert_restores(stored, out)


def test_one_of_several_vms(stored: StoredRepository, out: Path) -> None:
    first = list(stored.points)
    stored.vm = replace(VM, name="other", uuid="")
    stored.points = []
    stored.add({"hd0": bytes_of(9, MIB)})
    with pytest.raises(UsageError, match="hv1/other, hv1/vm"):
        restore(Request(stored.place, folder=out))
    assert_restores(stored, out, vm="other")
    stored.points = first
    assert_restores(stored, out / "vm", vm="vm")
    with pytest.raises(NoSuchTarget):
        restore(Request(stored.place, folder=out / "none", vm="third"))


class TestRefused:
    """What is asked for is not there, or something is in the way."""

    def test_a_place_in_the_repository(self, stored: StoredRepository) -> None:
        for folder in (stored.path, stored.path / "data" / "more"):
            with pytest.raises(UsageError, match="lies in a restic repository"):
                restore(Request(stored.place, folder=folder, force=True))
        assert not (stored.path / "data" / "more").exists()

    def test_another_password(
        self, stored: StoredRepository, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RESTIC_PASSWORD", "another")
        with pytest.raises(WrongPassword):
            restore(Request(stored.place, folder=out))
        assert not out.exists()


class TestDamage:
    """Any damage to what a point needs is named, and no output is left."""

    def refused(
        self, stored: StoredRepository, out: Path, *matches: str, point: str = "latest"
    ) -> None:
        for format_ in ("raw", "qcow2"):
            with pytest.raises(DamagedError) as caught:
                restore(Request(stored.place, point, folder=out, format=format_))
            for match in matches:
                assert match in str(caught.value)
            assert not out.exists()

    def test_a_changed_byte_in_a_chunk_names_disk_and_pack(
        self, stored: StoredRepository, out: Path
    ) -> None:
        pack = first_pack(stored)
        flip(pack, 1000)
        self.refused(stored, out, "Disk hd0", pack.name, point=stored.points[0].id)

    def test_points_that_do_not_need_it_are_still_restored(
        self, stored: StoredRepository, out: Path
    ) -> None:
        # The first chunk of the second point's disk lies in a pack of its own run.
        newest = [each for each in stored.files("data") if each.stat().st_size > MIB][-1]
        flip(newest, 1000)
        self.refused(stored, out, newest.name)
        assert_restores(stored, out, 0)

    def test_a_missing_pack(self, stored: StoredRepository, out: Path) -> None:
        pack = first_pack(stored)
        pack.unlink()
        self.refused(stored, out, pack.name, point=stored.points[0].id)

    def test_a_cut_pack(self, stored: StoredRepository, out: Path) -> None:
        pack = first_pack(stored)
        os.truncate(pack, MIB // 2)
        self.refused(stored, out, pack.name, point=stored.points[0].id)

    def test_a_lost_index(self, stored: StoredRepository, out: Path) -> None:
        for each in stored.files("index"):
            each.unlink()
        self.refused(stored, out)

    def test_a_damaged_index_costs_only_what_it_names(
        self, stored: StoredRepository, out: Path
    ) -> None:
        flip(stored.files("index")[-1], 100)
        shutil.rmtree(stored.made.folder / "cache")
        self.refused(stored, out, "index")
        assert_restores(stored, out, 0)

    def test_a_damaged_snapshot(self, stored: StoredRepository, out: Path) -> None:
        name = stored.made.snapshot_of(stored.points[1].id)["id"]
        flip(stored.path / "snapshots" / name, 50)
        shutil.rmtree(stored.made.folder / "cache")
        self.refused(stored, out, "latest", name)
        assert_restores(stored, out, 0)

    def test_damaged_trees(self, stored: StoredRepository, out: Path) -> None:
        trees = tree_packs(stored)
        assert trees
        for pack in trees:
            flip(pack, 20)
        shutil.rmtree(stored.made.folder / "cache")
        self.refused(stored, out)

    def test_what_lies_in_two_packs_is_read_from_the_whole_one(
        self, stored: StoredRepository, out: Path
    ) -> None:
        before = set(stored.files("data"))
        indexes = stored.path / "index"
        indexes.rename(stored.path / "kept")
        indexes.mkdir()
        stored.add(FIRST)  # which finds no chunk, and stores all of them again
        for each in (stored.path / "kept").iterdir():
            each.rename(indexes / each.name)
        (stored.path / "kept").rmdir()
        for pack in before:
            if pack not in tree_packs(stored):
                flip(pack, 20)
        assert_restores(stored, out)


@needs_root
def test_a_missing_pack_is_found_before_a_device_is_touched(
    stored: StoredRepository, tmp_path: Path
) -> None:
    file = tmp_path / "device"
    file.write_bytes(b"\xff" * 10 * MIB)
    first_pack(stored).unlink()
    request = Request(stored.place, stored.points[0].id, disks=("hd0",))
    with loop_device(file) as device, pytest.raises(DamagedError, match="Disk hd0"):
        restore(replace(request, file=device))
    assert file.read_bytes() == b"\xff" * 10 * MIB


class TestServer:
    """The repository lies behind a REST server."""

    @pytest.fixture
    def served(self, stored: StoredRepository) -> Iterator[tuple[Repository, HttpProxy]]:
        with RestServer(stored.path) as server, HttpProxy(server.url) as proxy:
            yield Repository(f"rest:{proxy.url}/", stored.made.folder / "caches"), proxy

    def start(self, repository: Repository, out: Path) -> cli.Running:
        arguments = ("--target", str(repository), "--output", out, "-f", "raw")
        return cli.start("restore", *arguments, env=repository.environment)

    def test_whose_requests_each_fail_once(
        self, served: tuple[Repository, HttpProxy], out: Path
    ) -> None:
        repository, proxy = served
        seen: set[str] = set()

        def hook(request: HttpRequest) -> Fate:
            if request.when == "after" or request.path in seen:
                return "pass"
            seen.add(request.path)
            return "503" if request.number % 2 else "cut"

        proxy.hook = hook
        with self.start(repository, out) as running:
            running.wait().check()
        assert len(seen) > 5
        found = {path.stem: path.read_bytes() for path in out.iterdir()}
        assert found == {"hd0": SECOND["hd0"], folder_name(WILD): SECOND[WILD]}

    def test_that_never_answers_holds_up_nobody(
        self, served: tuple[Repository, HttpProxy], out: Path
    ) -> None:
        repository, proxy = served
        asked = threading.Event()

        def hook(request: HttpRequest) -> Fate:
            if "/data/" in request.path and (out / "hd0.raw.partial").exists():
                asked.set()
                return "stall"
            return "pass"

        proxy.hook = hook
        with self.start(repository, out) as running:
            assert asked.wait(PATIENCE)
            running.signal(signal.SIGTERM)
            running.wait(45).check(143)
        assert not out.exists()


def first_pack(stored: StoredRepository) -> Path:
    """The pack with the first point's chunks."""
    return next(each for each in stored.files("data") if each.stat().st_size > MIB)


def tree_packs(stored: StoredRepository) -> list[Path]:
    """The packs with trees."""
    names = {blob["pack"] for blob in stored.index_entries() if blob["type"] == "tree"}
    return [each for each in stored.files("data") if each.name in names]

# SPDX-License-Identifier: Apache-2.0
"""Restores from a folder's files, each of which builds on the one before: any length of chain, any damage
to it, and nothing of what somebody has planted there.

What holds for every kind of target is in `contract/test_restore.py`.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lab.damage import flip
from lab.devices import loop_device
from lab.small import needs_root
from qmpbackup.errors import (
    DamagedError,
    NoSuchTarget,
)
from qmpbackup.images.digest import digest
from qmpbackup.model import Level
from qmpbackup.service.restore import Request, restore
from stock.stored import MIB, Stored, Write, run

WILD = "a/../b: c"


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """A full, two incrementals, and a second disk whose name is no name of a file."""
    stored = Stored(tmp_path / "target")
    stored.add(Level.FULL, {"hd0": [Write(1, 0, 2 * MIB)], WILD: [Write(9, MIB, 4096)]})
    stored.add(Level.INC, {"hd0": [Write(2, 65536, 65536), Write(0, MIB, 512)], WILD: []})
    stored.add(Level.INC, {"hd0": [Write(3, 100 * 512, 512)], WILD: [Write(8, 0, MIB)]})
    return stored


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_a_disk_that_grew_comes_back_large(tmp_path: Path, out: Path) -> None:
    stored = Stored(tmp_path / "target", size=MIB)
    stored.add(Level.FULL, {"hd0": [Write(1, 0, MIB)]})
    before = stored.expected[stored.points[0].id, "hd0"]
    stored.size = 3 * MIB
    stored.expected[stored.points[0].id, "hd0"] = before + bytes(2 * MIB)
    stored.add(Level.INC, {"hd0": [Write(5, 2 * MIB, 512)]})
    restore(Request(stored.path, folder=out, format="raw"))
    assert (out / "hd0.raw").read_bytes() == stored.expected[stored.points[1].id, "hd0"]


def test_a_long_chain_is_restored(tmp_path: Path, out: Path) -> None:
    stored = Stored(tmp_path / "target", size=MIB)
    stored.add(Level.FULL, {"hd0": [Write(255, 0, MIB)]})
    for number in range(80):
        stored.add(Level.INC, {"hd0": [Write(number + 1, number * 512, 512)]})
    restore(Request(stored.path, folder=out, format="raw"))
    assert (out / "hd0.raw").read_bytes() == stored.expected[stored.points[-1].id, "hd0"]


def test_a_state_kept_as_an_internal_snapshot_is_restored(tmp_path: Path, out: Path) -> None:
    stored = Stored(tmp_path / "target", size=MIB)
    old = stored.add(Level.FULL, {"hd0": [Write(1, 0, MIB)]})
    file = stored.file(old, "hd0")
    run("qemu-img", "snapshot", "-c", "FULL, and more", str(file))
    run("qemu-io", "-f", "qcow2", "-c", "write -P 2 0 4096", str(file))
    fd = os.open(file, os.O_RDONLY)
    disk = replace(
        old.disks[0],
        file_size=file.stat().st_size,
        digest=digest(fd),
        snapshot="FULL, and more",
    )
    os.close(fd)
    stored.target.replace_manifest(replace(old, disks=(disk,)))
    restore(Request(stored.path, folder=out, format="raw"))
    assert (out / "hd0.raw").read_bytes() == stored.expected[old.id, "hd0"]


def test_a_month_is_named_where_the_target_is_its_parent(
    stored: Stored, out: Path, tmp_path: Path
) -> None:
    root = Stored(tmp_path / "monthly").path
    stored.path.rename(root / "2026-11")
    with pytest.raises(NoSuchTarget) as caught:
        restore(Request(root, folder=out))
    assert "2026-11" in caught.value.hint


class TestDamage:
    """Any damage to what a point needs is named, and no output is left."""

    def refused(self, stored: Stored, out: Path, match: str, point: str = "latest") -> None:
        with pytest.raises(DamagedError, match=match):
            restore(Request(stored.path, point, folder=out, format="raw"))
        assert not out.exists()

    @pytest.mark.parametrize("number", [0, 1, 2])
    def test_a_changed_byte_in_any_file_of_the_chain(
        self, stored: Stored, out: Path, number: int
    ) -> None:
        path = stored.file(stored.points[number], "hd0")
        flip(path, -10)
        self.refused(stored, out, rf"{path.name} are not those that were written")

    def test_points_that_do_not_need_it_are_still_restored(self, stored: Stored, out: Path) -> None:
        path = stored.file(stored.points[2], "hd0")
        flip(path, -10)
        restore(Request(stored.path, stored.points[1].id, folder=out, format="raw"))
        assert (out / "hd0.raw").read_bytes() == stored.expected[stored.points[1].id, "hd0"]

    def test_a_cut_file(self, stored: Stored, out: Path) -> None:
        path = stored.file(stored.points[0], "hd0")
        os.truncate(path, path.stat().st_size - 65536)
        self.refused(stored, out, "bytes instead of")

    def test_a_missing_file(self, stored: Stored, out: Path) -> None:
        stored.file(stored.points[1], "hd0").unlink()
        self.refused(stored, out, "is missing")

    def test_a_missing_manifest_in_the_chain(self, stored: Stored, out: Path) -> None:
        stored.manifest(stored.points[1]).unlink()
        self.refused(stored, out, rf"builds on point {stored.points[1].id}")

    def test_the_newest_point_is_not_guessed_where_a_manifest_is_damaged(
        self, stored: Stored, out: Path
    ) -> None:
        stored.manifest(stored.points[2]).write_text("{}")
        self.refused(stored, out, "latest")
        self.refused(stored, out, "2026-11-02", point="2026-11-02")
        restore(Request(stored.path, stored.points[1].id, disks=("hd0",), folder=out, format="raw"))
        assert (out / "hd0.raw").read_bytes() == stored.expected[stored.points[1].id, "hd0"]

    def test_files_that_were_exchanged(self, stored: Stored, out: Path) -> None:
        one, other = (stored.file(stored.points[n], "hd0") for n in (1, 2))
        one.rename(one.with_name("x"))
        other.rename(one)
        one.with_name("x").rename(other)
        self.refused(stored, out, ".")

    def test_rubbish_in_the_place_of_an_image(self, stored: Stored, out: Path) -> None:
        path = stored.file(stored.points[0], "hd0")
        path.write_bytes(b"x" * path.stat().st_size)
        self.refused(stored, out, "not a qcow2 image")


class TestHostile:
    """A target written by somebody else, whose manifests are in order, gives away nothing."""

    def plant(self, stored: Stored, out: Path, match: str) -> None:
        """The manifest of the first point is made to fit whatever its file is now."""
        point = stored.points[0]
        path = stored.file(point, "hd0")
        fd = os.open(path, os.O_RDONLY)
        disk = replace(point.disks[0], file_size=path.stat().st_size, digest=digest(fd))
        os.close(fd)
        stored.target.replace_manifest(replace(point, disks=(disk,)))
        with pytest.raises(DamagedError, match=match):
            restore(Request(stored.path, point.id, folder=out, format="raw"))
        assert not out.exists()

    @pytest.fixture
    def secret(self, tmp_path: Path) -> Path:
        secret = tmp_path / "secret"
        secret.write_bytes(b"secret" * 100_000)
        return secret

    def test_a_full_that_builds_on_some_file(self, stored: Stored, out: Path, secret: Path) -> None:
        path = stored.file(stored.points[0], "hd0")
        run("qemu-img", "create", "-f", "qcow2", "-b", str(secret), "-F", "raw", str(path), "4M")
        self.plant(stored, out, "should stand alone")

    def test_data_outside_the_image(self, stored: Stored, out: Path, secret: Path) -> None:
        path = stored.file(stored.points[0], "hd0")
        data = stored.path / "data.raw"
        options = f"data_file={data},data_file_raw=on"
        run("qemu-img", "create", "-f", "qcow2", "-o", options, str(path), str(stored.size))
        data.unlink()
        data.symlink_to(secret)
        self.plant(stored, out, "another file")

    def test_an_incremental_that_takes_its_parent_for_raw(self, stored: Stored, out: Path) -> None:
        path = stored.file(stored.points[1], "hd0")
        full = stored.file(stored.points[0], "hd0").name
        run("qemu-img", "rebase", "-u", "-b", full, "-F", "raw", str(path))
        with pytest.raises(DamagedError, match="takes"):
            restore(Request(stored.path, folder=out))


def test_too_few_descriptors_for_a_chain_are_said(stored: Stored, tmp_path: Path) -> None:
    for number in range(20):
        stored.add(Level.INC, {"hd0": [Write(number, 0, 512)], WILD: []})
    out = tmp_path / "out"
    command = f"ulimit -n 40; exec {Path(sys.executable).with_name('qmpbackup')} restore --disk hd0"
    shell = ["sh", "-c", f"{command} --target {stored.path} --output {out}"]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Too many open files" in done.stderr
    assert "LimitNOFILE" in done.stderr
    assert not out.exists()


@needs_root
def test_a_device_is_not_touched_before_all_files_were_proved(
    stored: Stored, tmp_path: Path
) -> None:
    file = tmp_path / "device"
    file.write_bytes(b"\xff" * 4 * MIB)
    flip(stored.file(stored.points[0], "hd0"), -10)
    with loop_device(file) as device, pytest.raises(DamagedError):
        restore(Request(stored.path, disks=("hd0",), file=device))
    assert file.read_bytes() == b"\xff" * 4 * MIB

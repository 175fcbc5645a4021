# SPDX-License-Identifier: Apache-2.0
"""Restores give back the bytes of the instant, or fail, say what is damaged, and leave nothing."""

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lab.patience import PATIENCE
from qmpbackup.errors import (
    DamagedError,
    Locked,
    NoSuchTarget,
    QmpBackupError,
    StorageError,
    UsageError,
)
from qmpbackup.images.digest import digest
from qmpbackup.model import Level
from qmpbackup.service.restore import Request, restore
from stock.stored import MIB, Stored, Write, contents, run

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """A full, two incrementals, and a second disk whose name is no name of a file."""
    stored = Stored(tmp_path / "target")
    wild = "a/../b: c"
    stored.add(Level.FULL, {"hd0": [Write(1, 0, 2 * MIB)], wild: [Write(9, MIB, 4096)]})
    stored.add(Level.INC, {"hd0": [Write(2, 65536, 65536), Write(0, MIB, 512)], wild: []})
    stored.add(Level.INC, {"hd0": [Write(3, 100 * 512, 512)], wild: [Write(8, 0, MIB)]})
    return stored


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.parametrize("format_", ["qcow2", "raw"])
def test_every_point_gives_back_every_byte(stored: Stored, out: Path, format_: str) -> None:
    for point in stored.points:
        folder = out / point.id
        outcome = restore(Request(stored.path, point.id, folder=folder, format=format_))
        assert outcome.point == point
        assert {each.disk_id for each in outcome.disks} == {"hd0", "a/../b: c"}
        for each in outcome.disks:
            assert each.path.parent == folder
            assert contents(each.path, format_) == stored.expected[point.id, each.disk_id]
            assert stat.S_IMODE(each.path.stat().st_mode) == 0o600


def test_the_newest_point_and_qcow2_are_what_one_gets_without_asking(
    stored: Stored, out: Path
) -> None:
    outcome = restore(Request(stored.path, disks=("hd0",), folder=out))
    assert [path.name for path in out.iterdir()] == ["hd0.qcow2"]
    assert outcome.point.id == stored.points[-1].id
    info = json.loads(run("qemu-img", "info", "--output=json", str(out / "hd0.qcow2")))
    assert (info["format"], info["virtual-size"]) == ("qcow2", stored.size)
    assert "backing-filename" not in info


def test_a_raw_file_is_sparse(stored: Stored, out: Path) -> None:
    restore(Request(stored.path, disks=("hd0",), folder=out, format="raw"))
    state = (out / "hd0.raw").stat()
    assert state.st_size == stored.size
    assert state.st_blocks * 512 < stored.size


def test_one_disk_goes_into_a_file_of_any_name(stored: Stored, out: Path) -> None:
    file = out / "disk.img"
    restore(Request(stored.path, disks=("hd0",), file=file, format="raw"))
    assert file.read_bytes() == stored.expected[stored.points[-1].id, "hd0"]
    with pytest.raises(UsageError, match="several disks"):
        restore(Request(stored.path, file=out / "other"))


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


class TestRefused:
    """What is asked for is not there, or something is in the way."""

    def test_existing_files_stay(self, stored: Stored, out: Path) -> None:
        out.mkdir()
        (out / "hd0.qcow2").write_text("mine")
        with pytest.raises(UsageError, match="exists already"):
            restore(Request(stored.path, folder=out))
        assert [path.name for path in out.iterdir()] == ["hd0.qcow2"]
        assert (out / "hd0.qcow2").read_text() == "mine"

    def test_unless_told_otherwise(self, stored: Stored, out: Path) -> None:
        out.mkdir()
        (out / "hd0.raw").write_text("old")
        restore(Request(stored.path, disks=("hd0",), folder=out, format="raw", force=True))
        assert (out / "hd0.raw").read_bytes() == stored.expected[stored.points[-1].id, "hd0"]

    def test_no_such_point_disk_or_target(self, stored: Stored, out: Path, tmp_path: Path) -> None:
        with pytest.raises(NoSuchTarget):
            restore(Request(stored.path, "2020-01-01", folder=out))
        with pytest.raises(UsageError, match="does not hold disk sda") as caught:
            restore(Request(stored.path, disks=("sda",), folder=out))
        assert "hd0" in caught.value.hint
        with pytest.raises(NoSuchTarget):
            restore(Request(tmp_path / "nowhere", folder=out))
        assert not out.exists()

    def test_while_points_are_being_removed(self, stored: Stored, out: Path) -> None:
        with stored.target.lock(remove=True), pytest.raises(Locked):
            restore(Request(stored.path, folder=out))

    def test_a_month_is_named_where_the_target_is_its_parent(
        self, stored: Stored, out: Path, tmp_path: Path
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
        flip(path, path.stat().st_size - 10)
        self.refused(stored, out, rf"{path.name} are not those that were written")

    def test_points_that_do_not_need_it_are_still_restored(self, stored: Stored, out: Path) -> None:
        path = stored.file(stored.points[2], "hd0")
        flip(path, path.stat().st_size - 10)
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

    def test_a_planted_partial_file_is_not_followed(
        self, stored: Stored, out: Path, secret: Path
    ) -> None:
        out.mkdir()
        (out / "hd0.raw.partial").symlink_to(secret)
        with pytest.raises(QmpBackupError):
            restore(Request(stored.path, disks=("hd0",), folder=out, format="raw"))
        assert secret.read_bytes() == b"secret" * 100_000


def test_too_few_descriptors_for_a_chain_are_said(stored: Stored, tmp_path: Path) -> None:
    for number in range(20):
        stored.add(Level.INC, {"hd0": [Write(number, 0, 512)], "a/../b: c": []})
    out = tmp_path / "out"
    command = f"ulimit -n 40; exec {Path(sys.executable).with_name('qmpbackup')} restore --disk hd0"
    shell = ["sh", "-c", f"{command} --target {stored.path} --output {out}"]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Too many open files" in done.stderr
    assert "LimitNOFILE" in done.stderr
    assert not out.exists()


@needs_root
class TestFull:
    """The file system that is restored to has no room."""

    @pytest.fixture
    def small(self, tmp_path: Path) -> Iterator[Path]:
        folder = tmp_path / "small"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
        if subprocess.run(mount, check=False, capture_output=True).returncode:
            pytest.skip("cannot mount here")
        yield folder
        run("umount", str(folder))

    @pytest.mark.parametrize("format_", ["qcow2", "raw"])
    def test_no_room_is_said_and_nothing_is_left(
        self, stored: Stored, small: Path, format_: str
    ) -> None:
        with pytest.raises(StorageError, match="too little room") as refused:
            restore(Request(stored.path, folder=small, format=format_))
        assert refused.value.exit_code == 7
        assert list(small.iterdir()) == []
        with pytest.raises(StorageError, match="No space left") as caught:
            restore(Request(stored.path, folder=small, format=format_, reserve=0))
        assert caught.value.exit_code == 7
        assert list(small.iterdir()) == []


@needs_root
class TestDevice:
    """Onto a block device: after all digests, zeros too, and never onto one that is in use."""

    @pytest.fixture
    def device(self, tmp_path: Path) -> Iterator[Path]:
        yield from loop_device(tmp_path / "device", 4 * MIB)

    def test_all_bytes_are_written(self, stored: Stored, device: Path) -> None:
        restore(Request(stored.path, disks=("hd0",), file=device))
        assert device.read_bytes() == stored.expected[stored.points[-1].id, "hd0"]

    def test_damage_is_found_before_the_first_byte(self, stored: Stored, device: Path) -> None:
        path = stored.file(stored.points[0], "hd0")
        flip(path, path.stat().st_size - 10)
        with pytest.raises(DamagedError):
            restore(Request(stored.path, disks=("hd0",), file=device))
        assert device.read_bytes() == b"\xff" * 4 * MIB

    def test_a_device_that_is_too_small(self, stored: Stored, tmp_path: Path) -> None:
        for device in loop_device(tmp_path / "little", 2 * MIB):
            with pytest.raises(UsageError, match="needs"):
                restore(Request(stored.path, disks=("hd0",), file=device))
            assert device.read_bytes() == b"\xff" * 2 * MIB

    def test_a_device_that_is_in_use(self, stored: Stored, device: Path) -> None:
        fd = os.open(device, os.O_RDONLY | os.O_EXCL)
        try:
            with pytest.raises(UsageError, match="in use"):
                restore(Request(stored.path, disks=("hd0",), file=device))
        finally:
            os.close(fd)
        assert device.read_bytes() == b"\xff" * 4 * MIB

    def test_the_rest_of_a_larger_device_stays(self, stored: Stored, tmp_path: Path) -> None:
        for device in loop_device(tmp_path / "large", 5 * MIB):
            restore(Request(stored.path, disks=("hd0",), file=device))
            expected = stored.expected[stored.points[-1].id, "hd0"]
            assert device.read_bytes() == expected + b"\xff" * MIB


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """A point that takes long enough to be interrupted."""
    stored = Stored(tmp_path_factory.mktemp("large") / "target", size=512 * MIB)
    stored.add(Level.FULL, {"hd0": [Write(1, 0, 512 * MIB)]})
    return stored


class TestInterrupted:
    """A restore that is ended by a signal leaves nothing; one that is killed is in nobody's way."""

    def start(self, stored: Stored, out: Path) -> subprocess.Popen[bytes]:
        import qmpbackup

        code = (
            "import sys\nfrom pathlib import Path\nfrom qmpbackup.errors import Interrupted\n"
            "from qmpbackup.service.restore import Request, restore\n"
            "try:\n    restore(Request(Path(sys.argv[1]), folder=Path(sys.argv[2])))\n"
            "except Interrupted as error:\n    sys.exit(error.exit_status)\n"
        )
        environment = {**os.environ, "PYTHONPATH": str(Path(qmpbackup.__file__).parents[1])}
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(stored.path), str(out)], env=environment
        )
        partial = out / "hd0.qcow2.partial"
        while process.poll() is None and not (partial.exists() and partial.stat().st_size):
            pass
        return process

    def test_terminated(self, large: Stored, out: Path) -> None:
        process = self.start(large, out)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 143
        assert not out.exists()

    def test_killed_and_run_again(self, large: Stored, out: Path) -> None:
        process = self.start(large, out)
        process.kill()
        process.wait(PATIENCE)
        assert [path.name for path in out.iterdir()] == ["hd0.qcow2.partial"]
        outcome = restore(Request(large.path, folder=out, lock_wait=20))
        assert [path.name for path in out.iterdir()] == ["hd0.qcow2"]
        assert outcome.disks[0].path == out / "hd0.qcow2"
        run("qemu-img", "check", "-q", str(out / "hd0.qcow2"))


def flip(path: Path, offset: int) -> None:
    """Change one byte of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([old ^ 1]))


def loop_device(file: Path, size: int) -> Iterator[Path]:
    """A block device full of ones."""
    file.write_bytes(b"\xff" * size)
    attach = ["losetup", "--find", "--show", str(file)]
    result = subprocess.run(attach, check=False, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("no loop devices here")
    try:
        yield Path(result.stdout.strip())
    finally:
        run("losetup", "--detach", result.stdout.strip())

# SPDX-License-Identifier: Apache-2.0
"""Restores from every kind of target give back the bytes of the instant, or fail, say what is damaged,
and leave nothing.

What can be wrong with one kind alone is tested beside its points: `images/test_chains_of_files.py`,
`images/test_chunks_in_packs.py`.
"""

import json
import os
import shutil
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import cli
from lab.devices import loop_device
from lab.disks import first_difference
from lab.small import needs_root, small_folder
from qmpbackup.errors import (
    DamagedError,
    Locked,
    NoSuchTarget,
    QmpBackupError,
    StorageError,
    UsageError,
)
from qmpbackup.model import Point
from qmpbackup.service.restore import Outcome, Request, restore
from qmpbackup.targets import opening
from stock.any_target import SIZES, WILD, Place, folder, repository
from stock.stored import MIB, Write, contents, run

FORMATS = pytest.mark.parametrize("format_", ["qcow2", "raw"])
ONES = b"\xff"


def assert_restored(place: Place, outcome: Outcome, point: Point, format_: str) -> None:
    """All disks of a point came back, byte for byte, as images that nobody else may read."""
    assert outcome.point == point
    assert {each.disk_id for each in outcome.disks} == {disk.id for disk in point.disks}
    for each in outcome.disks:
        assert stat.S_IMODE(each.path.stat().st_mode) == 0o600
        if format_ == "qcow2":
            run("qemu-img", "check", "-q", str(each.path))
        found = contents(each.path, format_)
        assert not first_difference(found, place.expected[point.id, each.disk_id]), each


@FORMATS
def test_every_point_gives_back_every_byte(
    place: Place, points: list[Point], out: Path, format_: str
) -> None:
    for point in points:
        at = out / point.id
        outcome = restore(Request(place.address, point.id, folder=at, format=format_))
        assert_restored(place, outcome, point, format_)
        assert {each.path.parent for each in outcome.disks} == {at}
        assert len(list(at.iterdir())) == len(SIZES)


def test_the_newest_point_and_qcow2_are_what_one_gets_without_asking(
    place: Place, points: list[Point], out: Path
) -> None:
    outcome = restore(Request(place.address, disks=("hd0",), folder=out))
    assert [path.name for path in out.iterdir()] == ["hd0.qcow2"]
    assert outcome.point == points[-1]
    info = json.loads(run("qemu-img", "info", "--output=json", str(out / "hd0.qcow2")))
    assert (info["format"], info["virtual-size"]) == ("qcow2", SIZES["hd0"])
    assert "backing-filename" not in info


@FORMATS
def test_files_are_sparse(place: Place, points: list[Point], out: Path, format_: str) -> None:
    file = out / "disk"
    restore(Request(place.address, points[0].id, ("hd0",), file=file, format=format_))
    expected = place.expected[points[0].id, "hd0"]
    clusters = (expected[at : at + 65536] for at in range(0, len(expected), 65536))
    data = sum(len(each) for each in clusters if any(each))
    state = file.stat()
    assert format_ == "qcow2" or state.st_size == SIZES["hd0"]
    assert state.st_blocks * 512 < data + MIB // 2


def test_one_disk_goes_into_a_file_of_any_name(
    place: Place, points: list[Point], out: Path
) -> None:
    file = out / "disk.img"
    restore(Request(place.address, disks=(WILD,), file=file, format="raw"))
    assert file.read_bytes() == place.expected[points[-1].id, WILD]
    with pytest.raises(UsageError, match="several disks"):
        restore(Request(place.address, file=out / "other"))
    assert [path.name for path in out.iterdir()] == ["disk.img"]


@pytest.mark.parametrize("place", [folder, repository], indirect=True)
def test_the_command_line(place: Place, points: list[Point], out: Path) -> None:
    arguments = ("--target", spelled(place), "--output", out, "--format", "raw", "--json")
    (result,) = cli.run("restore", *arguments).check().objects
    assert result["type"] == "restore"
    assert result["point"] == points[-1].id
    assert {each["id"] for each in result["disks"]} == set(SIZES)
    for each in result["disks"]:
        assert Path(each["file"]).read_bytes() == place.expected[points[-1].id, each["id"]]


class TestRefused:
    """What is asked for is not there, or something is in the way."""

    @FORMATS
    def test_existing_files_stay_unless_told_otherwise(
        self, place: Place, points: list[Point], out: Path, format_: str
    ) -> None:
        out.mkdir()
        mine = out / f"hd0.{format_}"
        mine.write_text("mine")
        with pytest.raises(UsageError, match="exists already"):
            restore(Request(place.address, folder=out, format=format_))
        assert [path.name for path in out.iterdir()] == [mine.name]
        assert mine.read_text() == "mine"
        outcome = restore(Request(place.address, folder=out, format=format_, force=True))
        assert_restored(place, outcome, points[-1], format_)

    def test_no_such_target(self, place: Place, out: Path) -> None:
        with pytest.raises(NoSuchTarget):
            restore(Request(place.address, folder=out))
        assert not out.exists()

    @pytest.mark.usefixtures("points")
    def test_no_such_point_or_disk(self, place: Place, out: Path) -> None:
        with pytest.raises(NoSuchTarget):
            restore(Request(place.address, "2020-01-01", folder=out))
        with pytest.raises(UsageError, match="does not hold disk sda") as caught:
            restore(Request(place.address, disks=("sda",), folder=out))
        assert "hd0" in caught.value.hint
        assert not out.exists()

    @pytest.mark.usefixtures("points")
    def test_while_points_are_being_removed(self, place: Place, out: Path) -> None:
        with place.alone(), pytest.raises(Locked):
            restore(Request(place.address, folder=out))
        assert not out.exists()

    @pytest.mark.usefixtures("points")
    def test_a_planted_partial_file_is_not_followed(
        self, place: Place, out: Path, tmp_path: Path
    ) -> None:
        secret = tmp_path / "secret"
        secret.write_bytes(b"secret")
        out.mkdir()
        (out / "hd0.raw.partial").symlink_to(secret)
        with pytest.raises(QmpBackupError):
            restore(Request(place.address, disks=("hd0",), folder=out, format="raw"))
        assert secret.read_bytes() == b"secret"


@pytest.mark.parametrize("number", range(3))
def test_damage_is_named_and_leaves_no_output_and_earlier_points_are_still_restored(
    place: Place, points: list[Point], out: Path, number: int
) -> None:
    name = place.spoil(points[number], "hd0")
    for format_ in ("raw", "qcow2"):
        with pytest.raises(DamagedError) as caught:
            restore(Request(place.address, points[number].id, folder=out, format=format_))
        assert name in caught.value.message
        assert not out.exists()
    for point in points[:number]:
        outcome = restore(Request(place.address, point.id, folder=out, format="raw", force=True))
        assert_restored(place, outcome, point, "raw")
    restore(Request(place.address, points[number].id, (WILD,), out, format="raw", force=True))


@needs_root
@FORMATS
@pytest.mark.usefixtures("points")
def test_no_room_is_said_and_nothing_is_left(place: Place, tmp_path: Path, format_: str) -> None:
    with small_folder(tmp_path / "small", MIB) as small:
        with pytest.raises(StorageError, match="too little room") as refused:
            restore(Request(place.address, folder=small, format=format_))
        assert refused.value.exit_code == 7
        assert list(small.iterdir()) == []
        with pytest.raises(StorageError, match="No space left") as caught:
            restore(Request(place.address, folder=small, format=format_, reserve=0))
        assert caught.value.exit_code == 7
        assert list(small.iterdir()) == []


@needs_root
class TestDevice:
    """Onto a block device: zeros too, and never onto one that is in use."""

    @pytest.fixture
    def device(self, tmp_path: Path) -> Iterator[Path]:
        """One that is full of ones, and larger than the disks."""
        file = tmp_path / "device"
        file.write_bytes(ONES * 5 * MIB)
        with loop_device(file) as device:
            yield device

    def test_all_bytes_are_written_and_the_rest_stays(
        self, place: Place, points: list[Point], device: Path
    ) -> None:
        rest = ONES * 5 * MIB
        for point in points:
            for disk, size in SIZES.items():
                restore(Request(place.address, point.id, (disk,), file=device))
                rest = place.expected[point.id, disk] + rest[size:]
                assert not first_difference(device.read_bytes(), rest), (point.id, disk)

    def test_nothing_wrong_is_ever_written(
        self, place: Place, points: list[Point], device: Path
    ) -> None:
        name = place.spoil(points[-1], "hd0")
        with pytest.raises(DamagedError) as caught:
            restore(Request(place.address, disks=("hd0",), file=device))
        assert name in caught.value.message
        found, expected = device.read_bytes(), place.expected[points[-1].id, "hd0"]
        for at in range(0, len(expected), 512):
            assert found[at : at + 512] in {expected[at : at + 512], ONES * 512}
        assert found[len(expected) :] == ONES * MIB

    @pytest.mark.usefixtures("points")
    def test_images_and_devices_that_are_too_small_or_in_use_are_refused(
        self, place: Place, device: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(UsageError, match="raw"):
            restore(Request(place.address, disks=("hd0",), file=device, format="qcow2"))
        used = os.open(device, os.O_RDONLY | os.O_EXCL)
        try:
            with pytest.raises(UsageError, match="in use"):
                restore(Request(place.address, disks=("hd0",), file=device))
        finally:
            os.close(used)
        assert device.read_bytes() == ONES * 5 * MIB
        little = tmp_path / "little"
        little.write_bytes(ONES * 2 * MIB)
        with loop_device(little) as small, pytest.raises(UsageError, match="needs"):
            restore(Request(place.address, disks=("hd0",), file=small))
        assert little.read_bytes() == ONES * 2 * MIB


@pytest.fixture(scope="module", params=(folder, repository), ids=lambda each: each.__name__)
def large(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """A point that takes long enough to be interrupted."""
    size = 320 * MIB
    with pytest.MonkeyPatch.context() as patch:
        made: Place = request.param(tmp_path_factory.mktemp("large"), patch)
        made.sizes = {"hd0": size}
        made.add({"hd0": [Write(1, 0, size), Write(2, MIB, MIB)]})
        yield made


class TestInterrupted:
    """A restore that is ended by a signal leaves nothing; one that is killed is in nobody's way."""

    def caught(self, large: Place, out: Path, format_: str) -> cli.Running:
        """A restore that stands still while it writes. One that was too fast for that is run again."""
        partial = out / f"hd0.{format_}.partial"
        arguments = ("--target", spelled(large), "--output", out, "-f", format_)
        while True:
            running = cli.start("restore", *arguments)
            while running.process.poll() is None and not has_begun(partial):
                time.sleep(0.001)
            running.signal(signal.SIGSTOP)
            state = os.waitid(os.P_PID, running.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if state and state.si_code == os.CLD_STOPPED and partial.exists():
                return running
            running.signal(signal.SIGCONT)
            running.wait().check()
            shutil.rmtree(out)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_ended(self, large: Place, out: Path, number: signal.Signals) -> None:
        with self.caught(large, out, "raw") as running:
            running.signal(number)
            running.signal(signal.SIGCONT)
            running.wait().check(128 + number)
        assert not out.exists()

    def test_killed_and_run_again(self, large: Place, out: Path) -> None:
        with self.caught(large, out, "qcow2") as running:
            running.signal(signal.SIGKILL)
            running.wait()
        assert [path.name for path in out.iterdir()] == ["hd0.qcow2.partial"]
        restore(Request(large.address, folder=out, lock_wait=20))
        assert [path.name for path in out.iterdir()] == ["hd0.qcow2"]
        ((_, expected),) = large.expected.items()
        assert not first_difference(contents(out / "hd0.qcow2", "qcow2"), expected)


def has_begun(partial: Path) -> bool:
    """Whether something was written."""
    try:
        return partial.stat().st_blocks > 0
    except FileNotFoundError:
        return False


def spelled(place: Place) -> str:
    """What `--target` takes."""
    return opening.entrance(place.address).spelled

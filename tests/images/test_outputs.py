# SPDX-License-Identifier: Apache-2.0
"""Where a restore may write: each place is looked at before anything is written, links and special
files are neither followed nor replaced, and what is reported as restored is there."""

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab import cli
from lab.devices import loop_device
from lab.small import needs_root, small_folder
from qmpbackup.model import Level
from stock.stored import MIB, Stored, Write, run
from stock.stored_repository import StoredRepository

USAGE, STORAGE = 2, 7
DISKS = ("d1", "d2", "d3")


@dataclass(frozen=True)
class Backup:
    """A point of three disks of 4 MiB, in either kind of target."""

    target: str
    environment: Mapping[str, str]

    def restore(self, *arguments: cli.Argument) -> cli.Result:
        return cli.run("restore", "--target", self.target, *arguments, env=self.environment)


@pytest.fixture(scope="module", params=["folder", "repository"])
def backup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backup:
    path = tmp_path_factory.mktemp("backup")
    if request.param == "folder":
        stored = Stored(path / "target")
        stored.add(Level.FULL, {disk: [Write(7, 0, MIB)] for disk in DISKS})
        return Backup(str(stored.path), {})
    repository = StoredRepository(path)
    repository.add({disk: b"\7" * MIB + bytes(3 * MIB) for disk in DISKS})
    return Backup(f"restic:{repository.made.location}", repository.made.environment)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A block device full of ones."""
    file = tmp_path / "behind"
    file.write_bytes(b"\xff" * 4 * MIB)
    with loop_device(file) as device:
        yield device


def identity(path: Path) -> tuple[int, int, int]:
    """Which file has a name, and whether anything of it has changed but when it was looked at."""
    state = path.lstat()
    return state.st_ino, state.st_mode, state.st_mtime_ns


def link_to_file(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def link_to_nowhere(path: Path, victim: Path) -> None:
    path.symlink_to(victim.with_name("nowhere"))


def fifo(path: Path, _: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path, _: Path) -> None:
    os.mknod(path, 0o600 | stat.S_IFSOCK)  # bind(2) takes no path as long as this may be


def folder(path: Path, _: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("plant", [link_to_file, link_to_nowhere, fifo, unix_socket, folder])
def test_what_stands_in_the_way_of_any_disk_is_refused_before_anything_is_written(
    backup: Backup,
    tmp_path: Path,
    plant: Callable[[Path, Path], None],
    number: int,
    force: tuple[str, ...],
) -> None:
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_bytes(b"precious")
    out.mkdir()
    planted = out / f"{DISKS[number]}.qcow2"
    plant(planted, victim)
    before = identity(planted)
    refused = backup.restore("--output", out, *force).check(USAGE)
    assert str(planted) in refused.err
    assert [each.name for each in out.iterdir()] == [planted.name]
    assert identity(planted) == before
    assert victim.read_bytes() == b"precious"
    assert not victim.with_name("nowhere").exists()


@needs_root
@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("direct", [False, True])
def test_a_block_device_is_written_to_by_output_file_only(
    backup: Backup,
    tmp_path: Path,
    device: Path,
    number: int,
    force: tuple[str, ...],
    direct: bool,
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    planted = out / f"{DISKS[number]}.qcow2"
    if direct:
        os.mknod(planted, device.stat().st_mode, device.stat().st_rdev)
    else:
        planted.symlink_to(device)
    backup.restore("--output", out, *force).check(USAGE)
    assert device.read_bytes() == b"\xff" * 4 * MIB
    assert [each.name for each in out.iterdir()] == [planted.name]


@needs_root
def test_a_volume_goes_by_its_link(backup: Backup, tmp_path: Path, device: Path) -> None:
    """As `/dev/vg/lv` is one."""
    link = tmp_path / "vg"
    link.symlink_to(device)
    done = backup.restore("--disk", "d1", "--output-file", link).check()
    assert str(link) in done.out
    assert device.read_bytes() == b"\7" * MIB + bytes(3 * MIB)
    assert link.is_symlink()


@needs_root
def test_a_link_to_a_device_that_somebody_else_made_is_not_followed(
    backup: Backup, tmp_path: Path, device: Path
) -> None:
    link = tmp_path / "theirs"
    link.symlink_to(device)
    os.chown(link, 65534, 65534, follow_symlinks=False)
    backup.restore("--disk", "d1", "--output-file", link, "--force").check(USAGE)
    assert device.read_bytes() == b"\xff" * 4 * MIB


@needs_root
@pytest.mark.parametrize("deep", ["", "deeper"])
def test_a_folder_that_somebody_else_has_linked_to_is_not_written_into(
    backup: Backup, tmp_path: Path, deep: str
) -> None:
    """As the kernel itself says where `fs.protected_symlinks` is set."""
    everybodys, elsewhere = tmp_path / "everybodys", tmp_path / "elsewhere"
    everybodys.mkdir()
    everybodys.chmod(0o1777)
    elsewhere.mkdir()
    link = everybodys / "out"
    link.symlink_to(elsewhere)
    backup.restore("--disk", "d1", "--output", link / deep).check()
    os.chown(link, 65534, 65534, follow_symlinks=False)
    place = link / deep
    before = sorted(elsewhere.rglob("*"))
    for arguments in (("--output", place, "--force"), ("--output-file", place / "new")):
        backup.restore("--disk", "d1", *arguments).check(USAGE)
    assert sorted(elsewhere.rglob("*")) == before


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("plant", [link_to_file, link_to_nowhere, fifo, unix_socket, folder])
def test_one_file_takes_the_place_of_nothing_special_either(
    backup: Backup, tmp_path: Path, plant: Callable[[Path, Path], None], force: tuple[str, ...]
) -> None:
    victim, planted = tmp_path / "victim", tmp_path / "planted"
    victim.write_bytes(b"precious")
    plant(planted, victim)
    before = identity(planted)
    backup.restore("--disk", "d1", "--output-file", planted, *force).check(USAGE)
    assert identity(planted) == before
    assert victim.read_bytes() == b"precious"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["planted", "victim"]


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/dev/null", "/dev/full"])
def test_nor_do_the_devices_of_the_machine(backup: Backup, name: str) -> None:
    path = Path(name)
    before = identity(path)
    backup.restore("--disk", "d1", "--output-file", path, "--force").check(USAGE)
    assert name == "/dev/fd/1" or identity(path) == before
    assert not path.with_name(f"{path.name}.partial").exists()


def test_files_of_before_are_replaced_with_force(backup: Backup, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "d2.qcow2").write_bytes(b"old")
    refused = backup.restore("--output", out).check(USAGE)
    assert "exists already" in refused.err
    assert [each.name for each in out.iterdir()] == ["d2.qcow2"]
    backup.restore("--output", out, "--force").check()
    for disk in DISKS:
        run("qemu-img", "check", "-q", str(out / f"{disk}.qcow2"))


@needs_root
@pytest.mark.parametrize("deep", [False, True])
def test_a_read_only_place_is_refused_before_anything_is_read(
    backup: Backup, tmp_path: Path, deep: bool
) -> None:
    with ExitStack() as stack:
        small = stack.enter_context(small_folder(tmp_path / "small", 32 * MIB))
        run("mount", "-o", "remount,ro", str(small))
        place = small / "a" / "b" if deep else small
        for arguments in (("--output", place), ("--disk", "d1", "--output-file", place / "d1")):
            refused = backup.restore(*arguments).check(STORAGE)
            assert f"Cannot write to {small}: Read-only file system" in refused.err
            assert "Restoring" not in refused.err
        assert list(small.iterdir()) == []


@needs_root
def test_a_read_only_device_is_refused_before_anything_is_read(
    backup: Backup, device: Path
) -> None:
    run("blockdev", "--setro", str(device))
    try:
        refused = backup.restore("--disk", "d1", "--output-file", device).check(STORAGE)
    finally:
        run("blockdev", "--setrw", str(device))  # the next loop device would be so, too
    assert f"{device} is read-only" in refused.err
    assert "Restoring" not in refused.err
    assert device.read_bytes() == b"\xff" * 4 * MIB

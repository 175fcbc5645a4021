# SPDX-License-Identifier: Apache-2.0
"""The disks of a point as files in a folder, by nbdfuse; nothing stays mounted."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab import cli
from lab.disks import MIB, first_difference
from lab.patience import wait_until
from qmpbackup.model import Level
from stock.stored import Stored, Write

needs_fuse = pytest.mark.skipif(
    not os.access("/dev/fuse", os.R_OK | os.W_OK) or not shutil.which("nbdfuse"),
    reason="there is no FUSE here",
)


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """Two points of two disks."""
    made = Stored(tmp_path / "target", size=4 * MIB)
    made.add(Level.FULL, {"vda": [Write(1, 0, MIB)], "vdb": [Write(5, MIB, MIB)]})
    made.add(Level.INC, {"vda": [Write(2, 2 * MIB, 4096)], "vdb": [Write(6, 0, 512)]})
    return made


@contextmanager
def mounted(stored: Stored, folder: Path) -> Iterator[cli.Running]:
    """Show the newest point; the command, once all is there."""
    with cli.start("mount", "--target", stored.path, folder) as running:
        assert running.process.stdout is not None
        assert running.process.stdout.readline(), running.wait().err
        yield running


def mounts(folder: Path) -> list[str]:
    """What is mounted below a folder."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line for line in lines if str(folder) in line]


@needs_fuse
def test_disks_are_files_until_a_signal_comes(stored: Stored, tmp_path: Path) -> None:
    folder = tmp_path / "shown"
    with mounted(stored, folder) as running:
        assert sorted(each.name for each in folder.iterdir()) == ["vda.raw", "vdb.raw"]
        for disk in ("vda", "vdb"):
            found = (folder / f"{disk}.raw").read_bytes()
            assert not first_difference(found, stored.expected[stored.points[-1].id, disk])
        with pytest.raises(OSError, match=r"Read-only|Permission"):
            (folder / "vda.raw").write_bytes(b"x")
        running.signal(signal.SIGTERM)
        running.wait().check()
    assert not mounts(folder)
    assert not folder.exists()


@needs_fuse
def test_unmounted_or_killed_it_leaves_nothing_mounted(stored: Stored, tmp_path: Path) -> None:
    folder = tmp_path / "shown"
    folder.mkdir()
    with mounted(stored, folder) as running:
        for disk in ("vda", "vdb"):
            subprocess.run(["fusermount3", "-u", folder / f"{disk}.raw"], check=True)
        running.wait().check()
    assert list(folder.iterdir()) == []
    with mounted(stored, folder) as running:
        running.process.kill()
        running.wait()
    wait_until(lambda: not mounts(folder), "the unmounting")
    with mounted(stored, folder) as running:  # over the empty files that the killed one left
        running.signal(signal.SIGINT)
        running.wait().check()
    assert list(folder.iterdir()) == []


@needs_fuse
def test_what_shows_a_disk_is_killed_below_a_link_and_a_strange_name(
    stored: Stored, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    folder = tmp_path / "link" / "a \\b"
    with mounted(stored, folder) as running:
        for number in children_of(running.process.pid, b"nbdfuse"):
            os.kill(number, signal.SIGKILL)
        running.wait().check(7)
    assert not mounts(tmp_path)
    assert not folder.exists()


def children_of(parent: int, program: bytes) -> list[int]:
    """Children of a process that run a program."""
    children = Path(f"/proc/{parent}/task").glob("*/children")
    numbers = [int(word) for each in children for word in each.read_text().split()]
    return [each for each in numbers if program in Path(f"/proc/{each}/cmdline").read_bytes()]


def test_what_is_there_is_left_alone(stored: Stored, tmp_path: Path) -> None:
    (tmp_path / "vda.raw").write_text("mine")
    assert "is there" in cli.run("mount", "--target", stored.path, tmp_path).check(2).err
    assert (tmp_path / "vda.raw").read_text() == "mine"
    assert not (tmp_path / "vdb.raw").exists()


def test_what_is_recorded_of_the_vm(stored: Stored) -> None:
    shown = cli.run("restore", "--target", stored.path, "--vm-config").check().out
    found = json.loads(shown)
    assert found["vm"]["command_line"] == ["qemu-system-x86_64", "-name", "vm"]
    assert [disk["id"] for disk in found["disks"]] == ["vda", "vdb"]
    assert (found["needs"], found["masked"]) == ([], [])

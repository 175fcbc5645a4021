# SPDX-License-Identifier: Apache-2.0
"""Folders that are file systems of their own: with little room, or with few abilities."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.patience import wait_until

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")


@contextmanager
def small_folder(path: Path, size: int) -> Iterator[Path]:
    """A folder with room for so many bytes."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    subprocess.run(mount, check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def require_fuse() -> None:
    """Skip the test where this machine has no FUSE."""
    if not os.access("/dev/fuse", os.W_OK) or not shutil.which("fusermount3"):
        pytest.skip("no FUSE")


@contextmanager
def fuse_folder(path: Path) -> Iterator[Path]:
    """A folder over FUSE, which knows no files without a name."""
    require_fuse()
    behind = path.with_name(f"{path.name}-behind")
    behind.mkdir()
    path.mkdir()
    cache = path.with_name(f"{path.name}-cache")
    command = ["rclone", "mount", str(behind), str(path), "--vfs-cache-mode", "writes"]
    command += ["--config", "/dev/null", "--cache-dir", str(cache), "--allow-non-empty"]
    mounted = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: path.is_mount() or mounted.poll() is not None)
        assert path.is_mount(), "rclone mounted nothing"
        yield path
    finally:
        mounted.terminate()
        mounted.wait()


def fill(folder: Path) -> Path:
    """Take all room of a small folder but 128 KiB; the file that took it."""
    state = os.statvfs(folder)
    filler = folder / "filler"
    with filler.open("wb") as file:
        file.write(bytes(max(0, state.f_bavail * state.f_frsize - 128 * 1024)))
    return filler

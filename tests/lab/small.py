# SPDX-License-Identifier: Apache-2.0
"""Folders that are file systems of their own: with little room, or with few abilities."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import pytest

from lab.patience import wait_until

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")


@contextmanager
def small_folder(path: Path, size: int) -> Iterator[Path]:
    """A folder with room for so many bytes."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        try:
            _run("umount", str(path))
        except subprocess.CalledProcessError:  # somebody still has it, which fails the test
            _run("umount", "--lazy", str(path))
            raise


class FileSystem:
    """A file system of its own at `path`, which can fill up, and go away while it is in use.

    A context manager. Where this is not root's process, a plain folder to which nothing happens.
    """

    def __init__(self, path: Path, size: int = 2 << 30) -> None:
        self.path = path
        self._size = size
        self._below = path.with_name(f"{path.name}-below")
        self._filler = self._below / "filler"
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.path.mkdir()
        if os.geteuid() == 0:
            with self._stack:
                self._make()
                self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    def _make(self) -> None:
        self._below.mkdir()
        device = self._below.with_suffix(".ext4")
        with device.open("wb") as file:
            file.truncate(self._size)
        _run("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(device))
        _run("mount", "-o", "loop", str(device), str(self._below))
        self._stack.callback(device.unlink)
        self._stack.callback(_run, "umount", str(self._below))
        (self._below / "store").mkdir()
        self._stack.callback(self.take_away)
        self._appear()

    def fill(self) -> None:
        """Take all room but 256 KiB."""
        if self._below.is_mount():
            state = os.statvfs(self._below)
            with self._filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - (256 << 10))

    def clear(self) -> None:
        """Give the room back."""
        self._filler.unlink(missing_ok=True)

    def take_away(self) -> None:
        """Unmount it, whoever uses it: that goes on with what it has open."""
        if self.path.is_mount():
            _run("umount", "--lazy", str(self.path))

    def bring_back(self) -> None:
        """Mount it again. Nobody has written into the folder below."""
        if self._below.is_mount() and not self.path.is_mount():
            left = list(self.path.iterdir())
            assert not left, f"written below the mount point: {left}"
            self._appear()

    def _appear(self) -> None:
        _run("mount", "--bind", str(self._below / "store"), str(self.path))


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[Path]:
    """A folder that is an ext4 file system of so many bytes, on a loop device."""
    image = path.with_name(f"{path.name}.ext4")
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    path.mkdir()
    mount = ["mount", "-o", "loop", str(image), str(path)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop device can be had here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        # Lazily: a QEMU that a failed test has left may hold files for a moment longer.
        subprocess.run(["umount", "--lazy", str(path)], check=True)
        image.unlink()


def free(folder: Path) -> int:
    """Bytes that everybody may still take there."""
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize


def fill_up_to(folder: Path, left: int) -> Path:
    """Take room until so many bytes are left; the file that took it."""
    filler = folder / "filler"
    with filler.open("ab") as file:
        os.posix_fallocate(file.fileno(), filler.stat().st_size, max(1, free(folder) - left))
    return filler


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
        # rclone leaves a folder mounted that somebody still has open, and nobody behind it.
        subprocess.run(["fusermount3", "-u", "-z", path], stderr=subprocess.DEVNULL, check=False)


def fill(folder: Path) -> Path:
    """Take all room of a small folder but 128 KiB; the file that took it."""
    state = os.statvfs(folder)
    filler = folder / "filler"
    with filler.open("wb") as file:
        file.write(bytes(max(0, state.f_bavail * state.f_frsize - 128 * 1024)))
    return filler

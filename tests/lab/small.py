# SPDX-License-Identifier: Apache-2.0
"""Folders in which there is little room."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

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


def fill(folder: Path) -> Path:
    """Take all room of a small folder but 128 KiB; the file that took it."""
    state = os.statvfs(folder)
    filler = folder / "filler"
    with filler.open("wb") as file:
        file.write(bytes(max(0, state.f_bavail * state.f_frsize - 128 * 1024)))
    return filler

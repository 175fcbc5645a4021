# SPDX-License-Identifier: Apache-2.0
"""Memory stays within its bound also for many disks, and for one of a terabyte that is full."""

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.disks import MIB, create
from qmpbackup.images import qemu_nbd
from qmpbackup.images.layers import Layer
from qmpbackup.nbd import client
from qmpbackup.nbd.reader import Flow, Reader
from stock import repositories

PROGRAM = Path(__file__).with_name("large_disk.py")
MOST_MIB = 200


def test_the_list_of_a_full_terabyte_is_stored_and_read_in_little_memory(
    tmp_path: Path,
) -> None:
    made = repositories.repository(tmp_path)
    for what in ("write", "read"):
        command = [sys.executable, str(PROGRAM), what, made.location]
        environment = {**os.environ, **made.environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < MOST_MIB, what
    made.assert_whole()


@contextmanager
def served(folder: Path, size: int) -> Iterator[str]:
    """An export of zeroes; gives its socket."""
    with (
        create(folder / "image", size).open("rb") as image,
        qemu_nbd.serving(
            [Layer.of(image.fileno(), "image")], ["--export-name=disk"], "open it"
        ) as socket,
    ):
        yield socket


def test_reading_disks_leaves_no_memory_taken(tmp_path: Path) -> None:
    chunks = 1000

    def read() -> None:
        with client.connect(socket, "disk") as connection:
            every = bytearray(b"\1") * chunks
            for chunk in Reader([connection], MIB, every, every, Flow()).chunks():
                chunk.release()

    with served(tmp_path, chunks * MIB - 512) as socket:
        read()
        tracemalloc.start()
        try:
            for _ in range(3):
                read()
            left, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert left < MIB // 10

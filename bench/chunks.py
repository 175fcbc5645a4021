# SPDX-License-Identifier: Apache-2.0
"""What the size of chunks costs and brings, in one run; docs/explanation/restic.md draws on it.

    python -m bench.chunks [--megabytes 2048] [--writes 1000] [--folder DIR]

A disk full of this machine's own files is backed up into repositories with chunks of several sizes,
and again after writes of 4 KiB at random places, which is the worst case for large chunks: time and
CPU of the first backup, what the repository then takes, and what the second one adds. For a full disk of
1 TiB: what its list of chunks takes in each point, and its share of the indexes.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import zstandard
from bench.index import packs
from bench.machine import make_repository, measure, real_files, size_of, vm, write

from qmpbackup.restic.index import index_file
from qmpbackup.restic.tree import Node
from qmpbackup.restic.tree import encode as encode_tree

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40
SIZES = (256 * KIB, 512 * KIB, MIB, 2 * MIB, 4 * MIB)

# The size is a constant of the product, whose other modules take it from there.
_PROGRAM = """
import sys
from qmpbackup.targets.repository import target
target.CHUNK = int(sys.argv.pop(1))
from qmpbackup.cli.main import qmpbackup
qmpbackup()
"""


def main() -> None:
    """Measure all sizes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=2048, help="real files on the disk")
    parser.add_argument(
        "--writes", type=int, default=1000, help="writes of 4 KiB before the second"
    )
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where to work")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        image = Path(folder) / "vda.qcow2"
        real_files(image, options.megabytes)
        print(f"{'chunk':>8} {'time':>8} {'CPU':>8} {'QEMU':>7} {'stored':>10} {'second':>8} added")
        for size in SIZES:
            _measure(Path(folder), image, size, options.writes)


def _measure(folder: Path, image: Path, size: int, writes: int) -> None:
    disk, repository = folder / "disk" / "vda.qcow2", folder / "repository"
    disk.parent.mkdir()
    shutil.copyfile(image, disk)
    make_repository(repository)
    with vm(disk.parent, [disk]) as qmp:
        command = [sys.executable, "-c", _PROGRAM, str(size), "--socket", str(qmp), "backup"]
        command += ["--target", f"restic:{repository}", "--level"]
        first = measure([*command, "full"])
        stored = size_of(repository)
        chance = random.Random(size)
        pages = disk.stat().st_size // 4096
        write(
            qmp,
            "vda",
            [f"write -P 7 {at * 4096} 4096" for at in chance.sample(range(pages), writes)],
        )
        second = measure([*command, "inc"])
    added = size_of(repository) - stored
    list_, indexes = _metadata(TIB // size)
    print(
        f"{size // KIB:>4} KiB {first.time:>7.2f}s {first.cpu:>7.2f}s {first.qemu:>6.2f}s "
        f"{stored / MIB:>6.1f} MiB {second.time:>7.2f}s {added / MIB:.1f} MiB, "
        f"{added / writes / KIB:.0f} KiB a write; "
        f"1 TiB: list {list_ / MIB:.0f} MiB, indexes {indexes / MIB:.0f} MiB",
        flush=True,
    )
    shutil.rmtree(disk.parent)
    shutil.rmtree(repository)


def _metadata(chunks: int) -> tuple[int, int]:
    """Bytes of a disk's list, and of indexes, for so many chunks of which none is like another."""
    now = datetime.now(UTC)
    ids = os.urandom(32 * chunks)
    disk = Node("vda.raw", "file", 0o600, now, now, now, size=TIB, content=ids)
    frame = zstandard.ZstdCompressor(level=1).compressobj()
    list_ = sum(len(frame.compress(block)) for block in encode_tree([disk])) + len(frame.flush())
    some = 50_000
    documents = index_file.encode(packs(1, some))
    indexes = sum(len(zstandard.ZstdCompressor(level=1).compress(each)) for each in documents)
    return list_, indexes * chunks // some


if __name__ == "__main__":
    main()

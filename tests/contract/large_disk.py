# SPDX-License-Identifier: Apache-2.0
"""Stores, or reads, the tree of a disk of a terabyte in which no chunk is like another.

python large_disk.py write|read REPOSITORY — with the password in the environment, as restic takes it.
Prints the most memory that this process took, in MiB.
"""

import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from qmpbackup.restic.pack import BlobType
from qmpbackup.restic.repository import Repository
from qmpbackup.restic.storage.local import LocalStorage
from qmpbackup.restic.tree import Node
from qmpbackup.restic.tree import encode as encode_tree
from qmpbackup.restic.writer import Writer

CHUNKS = 1 << 20
TIME = datetime(2026, 3, 1, tzinfo=UTC)


def main() -> None:
    """See the module."""
    what, place = sys.argv[1], Path(sys.argv[2])
    note = place.with_name("tree")
    with Repository.open(LocalStorage(place), os.environ["RESTIC_PASSWORD"]) as repository:
        if what == "write":
            writer = Writer(repository)
            chunks = os.urandom(32 * CHUNKS)
            disk = Node("a.raw", "file", 0o600, TIME, TIME, TIME, size=CHUNKS << 20, content=chunks)
            note.write_bytes(writer.add_large(BlobType.TREE, lambda: encode_tree([disk])))
            writer.flush()
            writer.stop()
        else:
            repository.load_index()
            (disk,) = repository.load_tree(note.read_bytes())
            if len(disk.content) != 32 * CHUNKS:
                raise SystemExit("not all was read")
    print(peak_mib())


def peak_mib() -> int:
    """Most memory this process took, by proc(5).

    ru_maxrss is no answer: it counts what the process that started this one had taken till then.
    """
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    )
    return int(line.split()[1]) // 1024


if __name__ == "__main__":
    main()

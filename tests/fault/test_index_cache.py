# SPDX-License-Identifier: Apache-2.0
"""The cache of a repository's index may run full or be left by a dead run: the index stays right."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lab.small import needs_root, small_folder
from qmpbackup.restic.index.lookup import BlobIndex
from stock.indexes import ID, Indexes, agree

TESTS = str(Path(__file__).parents[1])

PROCESS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from stock.indexes import ID, Indexes
from qmpbackup.restic.index.lookup import BlobIndex
indexes = Indexes()
while True:
    with BlobIndex.open(Path(sys.argv[2]), ID) as blobs:
        indexes.make(2, 30)
        blobs.sync(indexes)
        name = indexes.make(2, 30)
        blobs.indexed(name, indexes.documents[name])
        print(len(indexes.documents), flush=True)
"""


@needs_root
def test_a_full_disk_under_the_cache_is_no_harm(tmp_path: Path) -> None:
    indexes = Indexes()
    with small_folder(tmp_path / "small", 64 * 1024) as cache:
        for _ in range(8):
            with BlobIndex.open(cache, ID) as blobs:
                indexes.make(10, 40)
                blobs.sync(indexes)
                agree(blobs, indexes)
                name = indexes.make(10, 40)
                blobs.indexed(name, indexes.documents[name])
                agree(blobs, indexes)
        assert not list(cache.rglob("*.tmp"))


@pytest.mark.parametrize("syncs", [1, 2, 3, 5, 8])
def test_a_run_that_is_killed_leaves_a_cache_that_others_can_use(
    tmp_path: Path, syncs: int
) -> None:
    command = [sys.executable, "-c", PROCESS, TESTS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(syncs):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    indexes = Indexes()
    for _ in range(2 * syncs + 1):
        indexes.make(2, 30)
    for _ in range(2):
        with BlobIndex.open(tmp_path, ID) as blobs:
            blobs.sync(indexes)
            agree(blobs, indexes)
    assert len(indexes.read) <= 3, "what the dead run had cached is of use"
    assert not list(tmp_path.rglob("*.tmp"))

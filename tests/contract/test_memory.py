# SPDX-License-Identifier: Apache-2.0
"""Memory stays within its bound also for a disk of a terabyte that is full."""

import os
import subprocess
import sys
from pathlib import Path

from lab import repositories

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

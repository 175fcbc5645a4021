# SPDX-License-Identifier: Apache-2.0
"""What tests of files share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.disks import MIB
from lab.small import small_folder


@pytest.fixture
def little_room(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with small_folder(tmp_path / "little", 24 * MIB) as place:
        yield place

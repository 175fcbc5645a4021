# SPDX-License-Identifier: Apache-2.0
"""A folder in which there is no target yet: what can be planned before one is made."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from qmpbackup.model import Point
from qmpbackup.targets.inventory import Inventory


class Vacant:
    """See `Ground`. `id` is the one that a target there will have."""

    chunk = 0
    stores_plain = True

    def __init__(self, path: Path, new_id: str = "") -> None:
        self.id = new_id
        self.name = str(path)
        self.folder = path

    @staticmethod
    def load() -> Inventory:
        """Nothing."""
        return Inventory()

    @staticmethod
    def obstacle(points: Sequence[Point], point: Point, disk_id: str, *, thorough: bool) -> str:
        """There is nothing to build upon."""
        del points, point, disk_id, thorough
        return ""


def tag_of(folder: Path) -> str:
    """What all ids of targets at a place begin with."""
    return f"{hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=4).hexdigest()}-"

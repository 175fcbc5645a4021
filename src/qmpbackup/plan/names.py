# SPDX-License-Identifier: Apache-2.0
"""Names of what we create inside QEMU, and how to tell them from everybody else's.

Change bitmaps live for as long as their point is the last one: `qmpbackup:<target>:<point>-<disk>`,
with a checksum of the disk's id. Node names and job ids must be well-formed QEMU identifiers of at
most 31 bytes, and live for one run: `qmpbackup-<run>-<what><number>`.
"""

import re
from dataclasses import dataclass

BITMAP_PREFIX = "qmpbackup:"
RUN_PREFIX = "qmpbackup-"
END = "end"
"""What a run calls the bitmap on a ledger in which the end of the disk is marked."""

LEDGER = "ledger"
"""What a run calls a node as long as a disk that holds bitmaps and no data."""

SAMPLES = "samples"
"""What a run calls the bitmap on a ledger in which it marks unchanged chunks that it reads as well."""

SERVING = "serving"
"""What a run calls the object that tells a later run that QEMU's NBD server is ours."""

LIVING = "living"
"""What a run calls the device in QEMU by which other runs see that it lives."""

GUARD = "guard"
"""What a run calls the node that keeps the VM from being migrated or saved while jobs copy."""

BYSTANDER = "aside"
"""What a run calls the export of a disk that somebody listens at while the VM is stopped."""

STOPPED_MARKER = "qmpbackup-stopped"
FROZEN_MARKER = "qmpbackup-frozen"

_BITMAP = re.compile(r"qmpbackup:(?P<target>[A-Za-z0-9._-]{1,64}):(?P<point>[A-Za-z0-9-]{1,64})")
TARGET_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class BitmapName:
    """The parts of a change bitmap's name."""

    target: str
    point: str

    def __str__(self) -> str:
        return f"{BITMAP_PREFIX}{self.target}:{self.point}"


def parse_bitmap(name: str) -> BitmapName | None:
    """The parts of a name of ours, or `None` for a bitmap of anybody else's."""
    match = _BITMAP.fullmatch(name)
    return BitmapName(match["target"], match["point"]) if match else None


@dataclass(frozen=True, slots=True)
class RunNames:
    """The names of one run; `run` is six hexadecimal digits."""

    run: str

    def of(self, what: str, number: int) -> str:
        """The name of the run's item of a kind (`cbw`, `snap`, `scratch`, …) for a disk."""
        return f"{RUN_PREFIX}{self.run}-{what}{number}"

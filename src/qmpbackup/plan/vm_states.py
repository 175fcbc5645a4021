# SPDX-License-Identifier: Apache-2.0
"""What the states of a VM mean for a backup (QEMU qapi/run-state.json, RunState).

A VM that runs, or stands still with its disks in its own hands (`paused`, `prelaunch`, `shutdown`,
`suspended`, `guest-panicked`, `io-error`, `internal-error`, `watchdog`, `debug`), is backed up. In the
others its disks are somebody else's, or about to change as a whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a VM in some state is not backed up, and what to do."""

    reason: str
    todo: str


GONE = frozenset({"postmigrate", "finish-migrate"})
"""States of a VM whose disks belong to another QEMU, or are about to: it must never run here again."""

OBSTACLES: Mapping[str, Obstacle] = {
    "inmigrate": Obstacle(
        "The VM waits for a migration to come in, or for its saved state (-incoming); its disks are "
        "not open for writing here yet.",
        "Until it runs here, back it up where it comes from.",
    ),
    "finish-migrate": Obstacle(
        "The VM is being migrated away, or its state saved to a file, right now.",
        "Run again when that has ended, where the VM then runs.",
    ),
    "postmigrate": Obstacle(
        "The VM has been migrated away, or its state was saved to a file; QEMU has let go of the disks.",
        "If it runs elsewhere, back it up there. If it was saved to a file, back it up once it was "
        "started from that file, or was told to go on here (`cont`), never both.",
    ),
    "save-vm": Obstacle(
        "A snapshot of the VM is being saved right now (savevm, snapshot-save).",
        "Run again when that has ended.",
    ),
    "restore-vm": Obstacle(
        "A snapshot is being loaded into the VM (loadvm, snapshot-load), or loading one has failed.",
        "If it has failed, some disks may be those of the snapshot already: look at the reason. QEMU "
        "loads none while there are change bitmaps (`qmpbackup … cleanup --remove-bitmaps`). When "
        "the disks are as they should be, let the VM go on (`cont`) and run again.",
    ),
    "colo": Obstacle(
        "The VM is kept in step with a second one (COLO), which reads and writes its disks its own way.",
        "Back it up once COLO has ended.",
    ),
}

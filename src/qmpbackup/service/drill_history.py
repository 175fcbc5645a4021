# SPDX-License-Identifier: Apache-2.0
"""What drills have found: a line of JSON each, and pictures of their screens beside them."""

import json
import os
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from qmpbackup.durable import make_folders, storage_errors
from qmpbackup.plan.verdict import BootVerdict
from qmpbackup.state import state_folder

_PICTURES = 100
"""So many pictures are kept."""


@dataclass(frozen=True, slots=True)
class Drilled:
    """How a drill ended; a line of the history. `screenshot` is the file with what its screen showed at last."""

    target: str
    point: str
    name: str
    time: str
    verdict: BootVerdict
    reason: str
    seconds: float
    system: str = ""
    screenshot: str = ""


def history() -> list[Drilled]:
    """What drills this user's history has, oldest first; lines that are none are passed over."""
    found = []
    with suppress(FileNotFoundError):
        for line in (state_folder() / "drills.jsonl").read_text().splitlines():
            with suppress(ValueError, TypeError, KeyError):
                members = json.loads(line)
                members["verdict"] = BootVerdict(members["verdict"])
                found.append(Drilled(**members))
    return found


def note(drilled: Drilled, picture: bytes = b"") -> Drilled:
    """Add a line to the history, for good, and the picture beside it."""
    path = state_folder() / "drills.jsonl"
    with storage_errors(f"write {path}"):
        make_folders(path.parent)
        if picture:
            drilled = replace(drilled, screenshot=str(_keep(drilled, picture)))
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, json.dumps(asdict(drilled)).encode() + b"\n")
            os.fsync(fd)
        finally:
            os.close(fd)
    return drilled


def _keep(drilled: Drilled, picture: bytes) -> Path:
    """Write a picture; the oldest of those that are too many go."""
    folder = state_folder() / "drills"
    make_folders(folder)
    name = f"{drilled.time.replace(':', '')}-{drilled.point}-{secrets.token_hex(3)}.png"
    fd = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:  # noqa: PTH123
        file.write(picture)
    for old in sorted(folder.glob("*.png"))[:-_PICTURES]:
        old.unlink(missing_ok=True)
    return folder / name

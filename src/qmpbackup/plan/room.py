# SPDX-License-Identifier: Apache-2.0
"""Room on the file systems that a run writes to: what must fit, and what stays free for others.

Guests' images lie on such file systems as well, and a guest whose thin image finds no room stops or
loses writes. So a *reserve* stays free: nothing is begun that would take it for certain, and what has
begun is given up before it is touched. What a guest may make us take (a scratch) or may take itself (a
thin image that grows) refuses nothing, for it may be a hundred times what there is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qmpbackup.plan.sizes import human

LARGEST_RESERVE = 1024**3
SHARE = 20
"""One part in so many of a file system is its reserve, and one in two of what is free there: where
next to nothing is free, a backup that needs less must still be possible."""

TO_BEGIN = 4 * 1024 * 1024
"""Bytes that must be free beside the reserve where a scratch begins, unless it can hold only less."""


@dataclass(frozen=True, slots=True)
class Space:
    """A file system: its device number, a folder there, its size, and what is free for everybody."""

    device: int
    folder: str
    total: int
    free: int

    def reserve(self, wanted: int | None) -> int:
        """What is to stay free: what a user wants, else the default."""
        if wanted is not None:
            return wanted
        return min(LARGEST_RESERVE, self.total // SHARE, self.free // 2)


@dataclass(frozen=True, slots=True)
class Need:
    """What a run writes to a file system: what it is, and how many bytes that takes for certain."""

    what: str
    certain: int


def certain_bytes(most: int, held: int | None) -> int:
    """What a copy takes at least, as far as we know: of `most` bytes no more than the files below a
    disk hold (`None`: nobody knows)."""
    return 0 if held is None else min(most, held)


def scratch_need(most: Sequence[int]) -> Need:
    """What scratches of these greatest sizes need to begin with."""
    return Need("scratch", min(TO_BEGIN, sum(most)))


def shortage(space: Space, needs: Sequence[Need], wanted: int | None) -> str:
    """Why these needs do not fit beside the reserve, as a sentence; empty if they do.

    A reserve of 0 means that somebody does not want to be asked.
    """
    certain, reserve = sum(need.certain for need in needs), space.reserve(wanted)
    if wanted == 0 or certain + reserve <= space.free:
        return ""
    whats = ", ".join(dict.fromkeys(need.what for need in needs if need.certain))
    return (
        f"There is too little room on the file system of {space.folder}: {human(certain)} are needed "
        f"({whats or 'nothing yet'}), {human(space.free)} are free, and {human(reserve)} of that are "
        "kept for the images of running VMs."
    )


def given_up(space: Space, reserve: int, free: int) -> str:
    """The sentence for work that was ended because a reserve would be touched."""
    return (
        f"Given up for want of room on the file system of {space.folder}: {human(free)} are free, and "
        f"{human(reserve)} are kept for the images of running VMs."
    )

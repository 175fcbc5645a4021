# SPDX-License-Identifier: Apache-2.0
"""Disk ids: the names under which disks are stored, the same again after a restart of the VM."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """The names a disk goes by; each may be empty. Names that QEMU made up are left out before.

    `device` is the guest device's id, `drive` the drive's name (`ide0-hd0`), `node` the name of the
    node as its user gave it.
    """

    device: str
    drive: str
    node: str


def choose_ids(candidates: Sequence[Candidate]) -> list[str]:
    """One id a disk: the device's id, else the drive's name, else the node's name.

    QEMU keeps the three kinds apart, so one disk's device may be called what another's drive is.
    The first kind then keeps the plain name and the others are written with their kind before it.
    A disk with no name of its own is called by its place in the VM's list, which is the order of
    QEMU's command line.
    """
    firsts = [_first(candidate, place) for place, candidate in enumerate(candidates)]
    best: dict[str, int] = {}
    for rank, name in firsts:
        best[name] = min(rank, best.get(name, rank))
    ids = [name if rank == best[name] else f"{_KINDS[rank]}:{name}" for rank, name in firsts]
    return _distinct(ids)


_KINDS = ("device", "drive", "node", "disk")


def _first(candidate: Candidate, place: int) -> tuple[int, str]:
    names = (candidate.device, candidate.drive, candidate.node, f"disk{place}")
    rank = next(rank for rank, name in enumerate(names) if name)
    return rank, names[rank]


def _distinct(ids: Sequence[str]) -> list[str]:
    """Number what is still alike, which only a VM that breaks QEMU's own rules can show us."""
    total, seen, taken = Counter(ids), Counter[str](), set(ids)
    result: list[str] = []
    for each in ids:
        seen[each] += 1
        name = each
        while total[each] > 1 and seen[each] > 1 and (name == each or name in taken):
            name = f"{each}~{seen[each]}"
            seen[each] += name in taken
        taken.add(name)
        result.append(name)
    return result

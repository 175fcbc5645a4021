# SPDX-License-Identifier: Apache-2.0
"""Which images in a folder without manifests make up a disk, from their names and links alone.

For folders that were copied away from their target, and for those of the original tool, whose images
have no links: there the number in the name is all that orders them. Pure; knows names and what
headers say, never opens anything.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from qmpbackup.errors import DamagedError, NoSuchTarget, UsageError

PARTIAL = ".partial"
_NAME = re.compile(r"(FULL|INC|DIFF|COPY)-([0-9]{1,12})(?:-(.+))?", re.DOTALL)
_STANDS_ALONE = frozenset({"FULL", "COPY"})
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class LinkedImage:
    """A file and the backing link in its header (empty: none)."""

    name: str
    backing: str = ""


@dataclass(frozen=True, slots=True)
class Bond:
    """One image builds on another."""

    child: str
    parent: str


@dataclass(frozen=True, slots=True)
class Lineage:
    """The images of one state, the one that stands alone first, and what is to know of their links.

    `assumed` are bonds that no link says, only the order of names. `misplaced` are those whose link
    leads through another folder. `children` are images outside of this lineage that build on it.
    """

    names: tuple[str, ...]
    assumed: tuple[Bond, ...] = ()
    misplaced: tuple[Bond, ...] = ()
    children: tuple[Bond, ...] = ()


@dataclass(frozen=True, slots=True)
class _Named:
    """What the name of an image says. `disk` is what the original tool appends: the disk's name."""

    name: str
    kind: str
    number: int
    disk: str
    backing: str

    @property
    def order(self) -> tuple[int, bool, str]:
        return (self.number, self.kind not in _STANDS_ALONE, self.name)


def is_image_name(name: str) -> bool:
    """Whether a backup image could be called so, by us or by the original tool."""
    return _NAME.fullmatch(name) is not None and not name.endswith((PARTIAL, ".config"))


def time_of(name: str) -> datetime | None:
    """The time in the name of an image; `None` where there is none that could be."""
    match = _NAME.fullmatch(name)
    try:
        return datetime.fromtimestamp(int(match[2]), UTC) if match else None
    except (ValueError, OverflowError, OSError):
        return None


def candidates(names: Iterable[str]) -> tuple[str, ...]:
    """The names that are images, or could be: those of the pattern, and a full without a number.

    The original tool's `--no-timestamp` calls a full like the disk itself.
    """
    names = tuple(names)
    matches = (_NAME.fullmatch(name) for name in names if is_image_name(name))
    disks = {match[3] for match in matches if match and match[3]}
    return tuple(name for name in names if is_image_name(name) or name in disks)


def lineage(images: Sequence[LinkedImage], *, until: str = "", containing: str = "") -> Lineage:
    """The images that make up the newest state, or the one that `until` names.

    `containing` leaves all images out of the choice whose name does not contain it.

    Raises:
        NoSuchTarget: there is no image.
        UsageError: there is no `until`, or the images are those of several disks.
        DamagedError: the links lead nowhere, outside, or in a circle; or there is no full.
    """
    known = _parsed(images)
    named = {name: image for name, image in known.items() if containing in name}
    if not named:
        raise NoSuchTarget(
            "There is no backup image"
            + (f" whose name contains {containing!r}." if containing else "."),
            "Name the folder that holds a disk's FULL-… and INC-… files.",
        )
    newest = _newest(named, until)
    disk = [image for image in named.values() if image.disk == newest.disk]
    return _Walk(disk, known).from_(newest)


def _parsed(images: Iterable[LinkedImage]) -> dict[str, _Named]:
    named: dict[str, _Named] = {}
    for image in images:
        match = _NAME.fullmatch(image.name)
        if match is None:
            named[image.name] = _Named(image.name, "FULL", 0, image.name, image.backing)
        else:
            named[image.name] = _Named(
                image.name, match[1], int(match[2]), match[3] or "", image.backing
            )
    return named


def _newest(named: Mapping[str, _Named], until: str) -> _Named:
    if until:
        return named[check_until(until, sorted(named, key=lambda name: named[name].order))]
    disks = sorted({image.disk for image in named.values()})
    if len(disks) > 1:
        raise UsageError(
            f"The folder holds images of several disks ({', '.join(disks[:_SHOWN])}).",
            "Choose one disk with --filter NAME.",
        )
    chains = [image for image in named.values() if image.kind != "COPY"]
    return max(chains or named.values(), key=lambda image: image.order)


def check_until(until: str, names: Sequence[str]) -> str:
    """The name that `--until` means: a file in the folder, given by name or path.

    Raises:
        UsageError: there is none.
    """
    name = until.rstrip("/").rpartition("/")[2]
    if name in names:
        return name
    shown = ", ".join(names[-_SHOWN:]) + (" …" if len(names) > _SHOWN else "")
    raise UsageError(f"There is no image {until!r} in the folder.", f"There are: {shown}.")


class _Walk:
    """From one image down to its full. `disk` are the images of that disk, `known` are all."""

    def __init__(self, disk: Iterable[_Named], known: Mapping[str, _Named]) -> None:
        self._known = known
        self._ordered = sorted(disk, key=lambda image: image.order)

    def from_(self, newest: _Named) -> Lineage:
        names = [newest.name]
        assumed: list[Bond] = []
        misplaced: list[Bond] = []
        while (parent := self._parent(self._known[names[-1]])) is not None:
            bond = Bond(names[-1], parent)
            backing = self._known[names[-1]].backing
            if not backing:
                assumed.append(bond)
            elif backing != parent:
                misplaced.append(bond)
            if parent in names:
                raise DamagedError(f"The links of {parent} and {names[-1]} run in a circle.")
            names.append(parent)
        names.reverse()
        return Lineage(tuple(names), tuple(assumed), tuple(misplaced), self._children(names))

    def _parent(self, image: _Named) -> str | None:
        if image.kind in _STANDS_ALONE:
            if image.backing:
                raise DamagedError(
                    f"{image.name} builds on {image.backing!r}, but a full stands alone.", _HINT
                )
            return None
        return self._linked(image) if image.backing else self._previous(image)

    def _linked(self, image: _Named) -> str:
        parent = image.backing.rpartition("/")[2]
        if parent not in self._known or parent == image.name:
            raise DamagedError(
                f"{image.name} builds on {image.backing!r}, which is no image of this folder.",
                _HINT,
            )
        return parent

    def _previous(self, image: _Named) -> str:
        before = [
            each
            for each in self._ordered
            if each.order < image.order
            and (each.kind == "FULL" if image.kind == "DIFF" else each.kind != "COPY")
        ]
        if not before:
            raise DamagedError(
                f"There is no full image that {image.name} could build on.",
                "Put the FULL-… file back.",
            )
        return before[-1].name

    def _children(self, names: Sequence[str]) -> tuple[Bond, ...]:
        return tuple(
            Bond(each.name, each.backing.rpartition("/")[2])
            for each in self._known.values()
            if each.name not in names and each.backing.rpartition("/")[2] in names
        )


_HINT = "Put back an unharmed copy of it."

# SPDX-License-Identifier: Apache-2.0
"""The chain that a command means.

From manifests where there are any; else from the links inside the images. Must not know what is done
with the chain.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError, UsageError
from qmpbackup.folder import Folder
from qmpbackup.model import Point
from qmpbackup.plan import chain, levels, lineage
from qmpbackup.plan.chain import Link
from qmpbackup.plan.lineage import LinkedImage
from qmpbackup.plan.merge import MERGED, OLD, PARTIAL
from qmpbackup.service.original.named_folder import NamedFolder
from qmpbackup.targets.folder.chain_files import ChainFiles, children_of, image_of, strays

log = logging.getLogger(__name__)

_LINK_HINT = "Run `qmprestore rebase` first, which links the images."


@dataclass(frozen=True, slots=True)
class Request:
    """What all commands take. `until` names an image, `containing` a part of names; `rate` is bytes
    a second (0: no limit)."""

    folder: Path
    until: str = ""
    containing: str = ""
    skip_check: bool = False
    rate: int = 0
    lock_wait: float = 0.0


def select(place: NamedFolder, request: Request) -> ChainFiles:
    """Decide which files are meant; nothing is opened but their headers.

    Raises:
        NoSuchTarget: there is no image.
        UsageError: `until` is not there, or the folder holds several disks.
        DamagedError: the chain is not whole.
    """
    points = place.points(place.load())
    if points:
        return _from_manifests(place, points, request)
    with storage_errors(f"read {place.folder}"), Folder.open(place.folder) as folder:
        found = _images(folder)
    line = lineage.lineage(found, until=request.until, containing=request.containing)
    return ChainFiles(
        place,
        line.names,
        line.children,
        strays(place, [image.name for image in found], line.names),
        assumed=line.assumed,
        misplaced=line.misplaced,
    )


def _images(folder: Folder) -> list[LinkedImage]:
    names = folder.names()
    partial = [name for name in names if name.endswith((PARTIAL, MERGED, OLD))]
    if partial:
        raise DamagedError(
            f"{folder.path} holds an unfinished file, {partial[0]}, so the chain may not be whole.",
            "Find out what left it; if it is only half a file, remove it.",
        )
    return [image_of(folder, name) for name in lineage.candidates(names)]


def _from_manifests(place: NamedFolder, points: Sequence[Point], request: Request) -> ChainFiles:
    states = {
        disk.name: Link(point, disk)
        for point in points
        for disk in point.disks
        if disk.file.startswith(f"{place.name}/") and not disk.snapshot
    }
    newest = _newest(states, request)
    links = chain.chain(points, newest.point, newest.disk.id)
    names = tuple(link.disk.name for link in links)
    children = tuple(children_of(points, links))
    return ChainFiles(place, names, children, strays(place, states, names), links, tuple(points))


def _newest(states: dict[str, Link], request: Request) -> Link:
    chosen = [name for name in states if request.containing in name]
    if request.until:
        return states[lineage.check_until(request.until, chosen)]
    if not chosen:
        raise UsageError(
            f"No image's name contains {request.containing!r}.", f"There are: {', '.join(states)}."
        )
    disk_id = states[chosen[0]].disk.id
    candidates = [states[name].point for name in chosen]
    point = levels.last_point(candidates, disk_id) or candidates[-1]
    return next(link for link in states.values() if link.point.id == point.id)


def require_links(source: ChainFiles, *, assume: bool) -> None:
    """Refuse images that are not linked. Where they have no links at all, the order of their names may
    be taken (`assume`).

    Raises:
        DamagedError: a link leads elsewhere.
        UsageError: there is none.
    """
    if source.misplaced:
        bond = source.misplaced[0]
        raise DamagedError(
            f"The link of {bond.child} to {bond.parent} leads through another folder.", _LINK_HINT
        )
    if not source.assumed:
        return
    bond = source.assumed[0]
    if not assume:
        raise UsageError(
            f"{bond.child} has no link to the image that it builds on, so nothing proves that the "
            "chain is whole.",
            f"{_LINK_HINT.removesuffix('.')}; or trust the numbers in the names: --skip-check.",
        )
    log.warning("%s has no link; taking the order from the numbers in the names.", bond.child)

# SPDX-License-Identifier: Apache-2.0
"""Merge a chain into its full in place: `qmprebase rebase`, `qmprestore commit` and `snapshotrebase`.

    lock ─ finish what an earlier run left ─ choose the chain ─ refuse what others build on
    verify the files ─ room ─ journal ─ build beside the full ─ prove ─ journal ─ swap

Nothing is destroyed before the result is proved and durable, and what is to be done with it written
down; a run that dies after that is finished by the next one.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

from qmpbackup import interrupt
from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError, Interrupted, QmpBackupError, StorageError, UsageError
from qmpbackup.folder import Folder
from qmpbackup.images import qemu_img, relink
from qmpbackup.images.digest import digest
from qmpbackup.images.layers import Layer, check_link
from qmpbackup.model import Point, StoredDisk
from qmpbackup.plan.chain import Link
from qmpbackup.plan.merge import (
    Contents,
    MergePlan,
    Operation,
    Rewritten,
    check_siblings,
    rewrite,
    tags_for,
)
from qmpbackup.service.rebase import build
from qmpbackup.service.rebase import source as sources
from qmpbackup.service.rebase.place import Place
from qmpbackup.service.rebase.source import LINK_HINT, Request, Source
from qmpbackup.targets.folder import journal
from qmpbackup.targets.folder.journal import Intent, Phase

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was done, and `finished`: what of an earlier run was brought to an end first."""

    plan: MergePlan
    finished: tuple[str, ...] = ()


def merge(request: Request, operation: Operation) -> Outcome:
    """Merge the chain that a request means.

    Raises:
        QmpBackupError: nothing was changed, or, where the message says so, the merge is begun and
            the next run finishes it.
    """
    place = Place.find(request.folder)
    with interrupt.held(), place.exclusive(request.lock_wait):
        finished = clear_up(place)
        source = sources.select(place, request)
        _refuse_unlinked(source, request)
        with sources.opened(source) as layers:
            plan = _plan(source, layers, operation)
            if plan.superseded:
                _Merge(request, source, plan, layers).run()
    return Outcome(plan, tuple(finished))


def dry_run(request: Request, operation: Operation) -> MergePlan:
    """Decide what a merge would do, and change nothing.

    Raises:
        QmpBackupError: as the merge itself would, short of reading the files.
    """
    place = Place.find(request.folder)
    refuse_unfinished(place)
    source = sources.select(place, request)
    _refuse_unlinked(source, request)
    with interrupt.held(), sources.opened(source) as layers:
        plan = _plan(source, layers, operation)
        if plan.superseded:
            needed = build.needed_bytes(plan, layers)
            build.require_room(place.folder, needed, "The merged image")
    return plan


def merge_part(place: Place, points: Sequence[Point], links: Sequence[Link]) -> None:
    """Merge neighbours out of a chain into the lowest of them; the lock to remove must be held.

    Args:
        place: the folder of the disk in its target.
        points: all points of the target.
        links: the neighbours, the lowest first; what is left is the state of the last.

    Raises:
        QmpBackupError: as `merge`.
    """
    request = Request(place.folder)
    source = sources.part(place, points, links)
    with sources.opened(source) as layers:
        _Merge(request, source, _plan(source, layers, Operation.COMMIT), layers).run()


def clear_up(place: Place) -> list[str]:
    """Bring to an end what died runs have left: backups and merges. The lock must be held."""
    done = []
    if place.target is not None:
        done += place.target.recover()
        done += journal.roll_forward(place.target.path)
    else:
        done += place.journal.finish()
    for clause in done:
        log.warning("Cleaned up after a run that died: %s.", clause)
    return done


def refuse_unfinished(place: Place) -> None:
    """Refuse to read a folder where a merge was interrupted.

    Raises:
        DamagedError: one was.
    """
    if place.journal.is_there():
        raise DamagedError(
            f"A merge in {place.folder} was interrupted.",
            f"Finish it first: qmprestore commit --dir {place.folder}",
        )


def _refuse_unlinked(source: Source, request: Request) -> None:
    if source.misplaced:
        bond = source.misplaced[0]
        raise DamagedError(
            f"The link of {bond.child} to {bond.parent} leads through another folder.", LINK_HINT
        )
    if not source.assumed:
        return
    bond = source.assumed[0]
    if not request.skip_check:
        raise UsageError(
            f"{bond.child} has no link to the image that it builds on, so nothing proves that the "
            "chain is whole.",
            f"{LINK_HINT.removesuffix('.')}; or trust the numbers in the names: --skip-check.",
        )
    log.warning("%s has no link; taking the order from the numbers in the names.", bond.child)


def _plan(source: Source, layers: list[Layer], operation: Operation) -> MergePlan:
    relinked = check_siblings(source.names, source.children, source.strays)
    if len(layers) == 1:
        return MergePlan(operation, source.names)
    carried = qemu_img.snapshot_names(layers[0])
    keeps = operation is Operation.SNAPSHOTS
    ids = tuple(link.point.id for link in source.links) or source.names
    return MergePlan(
        operation=operation,
        chain=source.names,
        tags=tags_for(tuple(zip(source.names, source.times, strict=True)), carried)
        if keeps
        else (),
        carried=carried,
        relinked=relinked,
        lost=() if keeps else ids[:-1],
        below=_size_below(source),
    )


def _size_below(source: Source) -> int | None:
    """The size of the disk in the file that a part of a chain builds on; `None`: it stands alone."""
    disk = source.links[0].disk if source.links else None
    if disk is None or disk.parent is None:
        return None
    below = next(point.disk(disk.id) for point in source.points if point.id == disk.parent)
    return below.size if below is not None else None


class _Merge:
    """One merge from the verification of the chain to the end of its journal."""

    def __init__(
        self,
        request: Request,
        source: Source,
        plan: MergePlan,
        layers: list[Layer],
    ) -> None:
        self._request = request
        self._source = source
        self._place = source.place
        self._journal = source.place.journal
        self._plan = plan
        self._layers = layers

    def run(self) -> None:
        """All steps; what fails before the swap is undone."""
        if not self._request.skip_check:
            sources.verify(self._source, self._layers)
        relinked = self._prove_children()
        needed = build.needed_bytes(self._plan, self._layers)
        build.require_room(self._place.folder, needed, "The merged image")
        try:
            self._journal.write(Intent(Phase.BUILDING, self._plan.base))
            intent = self._intent(self._build(), relinked)
            interrupt.check()
            self._journal.write(intent)
        except BaseException:
            self._undo()
            raise
        self._swap(intent)

    def _build(self) -> Contents:
        log.info("Merging %s into %s", ", ".join(self._plan.superseded), self._plan.base)
        with storage_errors(f"open {self._place.folder}"):
            folder = Folder.open(self._place.folder)
        with folder:
            return build.build(folder, self._plan, self._layers, self._request.rate)

    def _prove_children(self) -> dict[str, Contents]:
        """What the images that build on the chain hold once they build on the full."""
        found: dict[str, Contents] = {}
        for name in self._plan.relinked:
            with sources.opened_child(self._source, name) as (layer, disk):
                contents = self._relinked(layer, disk)
            if disk is not None:
                found[disk.file] = contents
        return found

    def _relinked(self, layer: Layer, disk: StoredDisk | None) -> Contents:
        check_link(layer, self._plan.newest)
        if disk is not None:  # always: a new digest must not call damage whole
            sources.verify_child(self._source, layer, disk)
        head = relink.relinked(layer.head, layer.name, self._plan.base)
        if disk is None:
            return Contents(0, "")
        with storage_errors(f"read {layer.name}"):
            return Contents(os.fstat(layer.fd).st_size, digest(layer.fd, head=head))

    def _intent(self, base: Contents, relinked: dict[str, Contents]) -> Intent:
        rewritten = Rewritten()
        if self._source.links:
            source = self._source
            rewritten = rewrite(source.points, source.links, self._plan, base, relinked)
        return Intent(
            phase=Phase.SWAPPING,
            base=self._plan.base,
            size=base.size,
            relink=self._plan.relinked,
            remove=self._plan.superseded,
            record=rewritten.record,
            forget=rewritten.forget,
        )

    def _undo(self) -> None:
        try:
            self._journal.discard(self._plan.base)
        except QmpBackupError as error:
            log.warning("What was built stays for the next run to remove: %s", error)

    def _swap(self, intent: Intent) -> None:
        try:
            self._journal.perform(intent)
        except QmpBackupError as error:
            raise StorageError(
                f"The merge is begun but could not be finished: {error.message}",
                f"{error.hint} Then run the same command again, which finishes it.".strip(),
            ) from error
        except Interrupted:
            log.warning("The merge is begun. Run the same command again, which finishes it.")
            raise

# SPDX-License-Identifier: Apache-2.0
"""Merge a chain, or neighbours out of one, into the lowest of its files, in place.

    verify the files ─ room ─ journal ─ build beside the lowest ─ prove ─ journal ─ swap

Nothing is destroyed before the result is proved and durable, and what is to be done with it written
down; a run that dies after that is finished by the next one.
"""

import logging
import os
from collections.abc import Sequence

from qmpbackup import interrupt
from qmpbackup.durable import storage_errors
from qmpbackup.errors import Interrupted, QmpBackupError, StorageError
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
from qmpbackup.targets.folder import chain_files, merged_image
from qmpbackup.targets.folder.chain_files import ChainFiles
from qmpbackup.targets.folder.disk_folder import DiskFolder
from qmpbackup.targets.folder.journal import Intent, Phase

log = logging.getLogger(__name__)


def merge_part(place: DiskFolder, points: Sequence[Point], links: Sequence[Link]) -> None:
    """Merge neighbours out of a chain into the lowest of them; the lock to remove must be held.

    Args:
        place: the folder of the disk in its target.
        points: all points of the target.
        links: the neighbours, the lowest first; what is left is the state of the last.

    Raises:
        QmpBackupError: nothing was changed, or, where the message says so, the merge is begun and
            the next run finishes it.
    """
    source = chain_files.part(place, points, links)
    with chain_files.opened(source) as layers:
        Merging(source, plan_of(source, layers, Operation.COMMIT), layers).run()


def plan_of(source: ChainFiles, layers: list[Layer], operation: Operation) -> MergePlan:
    """What a merge has to do.

    Raises:
        UsageError: something builds on what would go.
    """
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


def _size_below(source: ChainFiles) -> int | None:
    """The size of the disk in the file that a part of a chain builds on; `None`: it stands alone."""
    disk = source.links[0].disk if source.links else None
    if disk is None or disk.parent is None:
        return None
    below = next(point.disk(disk.id) for point in source.points if point.id == disk.parent)
    return below.size if below is not None else None


class Merging:
    """One merge from the verification of the chain to the end of its journal."""

    def __init__(
        self,
        source: ChainFiles,
        plan: MergePlan,
        layers: list[Layer],
        *,
        rate: int = 0,
        skip_check: bool = False,
    ) -> None:
        self._rate = rate
        self._skip_check = skip_check
        self._source = source
        self._place = source.place
        self._journal = source.place.journal
        self._plan = plan
        self._layers = layers

    def run(self) -> None:
        """All steps; what fails before the swap is undone."""
        if not self._skip_check:
            chain_files.verify(self._source, self._layers)
        relinked = self._prove_children()
        needed = merged_image.needed_bytes(self._plan, self._layers)
        merged_image.require_room(self._place.folder, needed, "The merged image")
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
            return merged_image.build(folder, self._plan, self._layers, self._rate)

    def _prove_children(self) -> dict[str, Contents]:
        """What the images that build on the chain hold once they build on the full."""
        found: dict[str, Contents] = {}
        for name in self._plan.relinked:
            with chain_files.opened_child(self._source, name) as (layer, disk):
                contents = self._relinked(layer, disk)
            if disk is not None:
                found[disk.file] = contents
        return found

    def _relinked(self, layer: Layer, disk: StoredDisk | None) -> Contents:
        check_link(layer, self._plan.newest)
        if disk is not None:  # always: a new digest must not call damage whole
            chain_files.verify_child(self._source, layer, disk)
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

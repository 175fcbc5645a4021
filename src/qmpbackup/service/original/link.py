# SPDX-License-Identifier: Apache-2.0
"""Link the images of a chain and leave a symlink to the newest: `qmprestore rebase`.

Nothing is merged and no state ends. In a target the images are linked already; those of the original
tool get their links here, in the order of the numbers in their names.
"""

import logging
from dataclasses import dataclass

from qmpbackup import interrupt
from qmpbackup.durable import storage_errors
from qmpbackup.errors import UsageError
from qmpbackup.folder import Folder
from qmpbackup.images import relink
from qmpbackup.plan.lineage import Bond
from qmpbackup.plan.merge import SYMLINK
from qmpbackup.service.original.choosing import Request, select
from qmpbackup.service.original.merge import clear_up, refuse_unfinished
from qmpbackup.service.original.named_folder import NamedFolder
from qmpbackup.targets.folder import chain_files
from qmpbackup.targets.folder.chain_files import ChainFiles
from qmpbackup.targets.folder.journal import put_symlink

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LinkPlan:
    """Links to write, and the image that the symlink leads to."""

    bonds: tuple[Bond, ...]
    newest: str

    def lines(self) -> tuple[str, ...]:
        """The plan for people, one step a line."""
        links = (f"let {bond.child} build on {bond.parent}" for bond in self.bonds)
        return (*links, f"let the link {SYMLINK} lead to {self.newest}")


def link(request: Request) -> LinkPlan:
    """Link the chain that a request means.

    Raises:
        QmpBackupError: no symlink was left; links that are right were perhaps written.
    """
    place = NamedFolder.find(request.folder)
    with interrupt.held(), place.exclusive(request.lock_wait):
        clear_up(place)
        source = select(place, request)
        plan = _plan(source)
        _verify(source, request)
        with storage_errors(f"make links in {place.folder}"), Folder.open(place.folder) as folder:
            for bond in plan.bonds:
                interrupt.check()
                log.info("%s builds on %s", bond.child, bond.parent)
                relink.write(folder, bond.child, bond.parent, anew=True)
            put_symlink(folder, plan.newest)
    return plan


def dry_run(request: Request) -> LinkPlan:
    """Decide what would be linked, and change nothing.

    Raises:
        QmpBackupError: as `link` itself would, short of reading the files.
    """
    place = NamedFolder.find(request.folder)
    refuse_unfinished(place)
    return _plan(select(place, request))


def _plan(source: ChainFiles) -> LinkPlan:
    bonds = tuple(sorted((*source.assumed, *source.misplaced), key=lambda bond: bond.child))
    for bond in bonds:
        if ":" in bond.parent:
            raise UsageError(
                f"QEMU takes {bond.parent!r} in a link for a protocol.", "Rename the images."
            )
    with storage_errors(f"read {source.place.folder}"), Folder.open(source.place.folder) as folder:
        if folder.exists(SYMLINK) and not (source.place.folder / SYMLINK).is_symlink():
            raise UsageError(
                f"{source.place.folder / SYMLINK} is in the way of the link to the newest image.",
                "Move it away.",
            )
    return LinkPlan(bonds, source.names[-1])


def _verify(source: ChainFiles, request: Request) -> None:
    with chain_files.opened(source) as layers:
        if not request.skip_check:
            chain_files.verify(source, layers)

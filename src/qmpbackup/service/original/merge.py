# SPDX-License-Identifier: Apache-2.0
"""Merge a chain into its full in place: `qmprebase rebase`, `qmprestore commit` and `snapshotrebase`.

    lock ─ finish what an earlier run left ─ choose the chain ─ refuse what others build on
    verify the files ─ room ─ journal ─ build beside the full ─ prove ─ journal ─ swap

Nothing is destroyed before the result is proved and durable, and what is to be done with it written
down; a run that dies after that is finished by the next one.
"""

import logging
from dataclasses import dataclass

from qmpbackup import interrupt
from qmpbackup.errors import DamagedError
from qmpbackup.plan.merge import (
    MergePlan,
    Operation,
)
from qmpbackup.service.original.choosing import Request, require_links, select
from qmpbackup.service.original.named_folder import NamedFolder
from qmpbackup.targets.folder import chain_files, journal, merged_image
from qmpbackup.targets.folder.merging import Merging, plan_of

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
    place = NamedFolder.find(request.folder)
    with interrupt.held(), place.exclusive(request.lock_wait):
        finished = clear_up(place)
        source = select(place, request)
        require_links(source, assume=request.skip_check)
        with chain_files.opened(source) as layers:
            plan = plan_of(source, layers, operation)
            if plan.superseded:
                Merging(
                    source, plan, layers, rate=request.rate, skip_check=request.skip_check
                ).run()
    return Outcome(plan, tuple(finished))


def dry_run(request: Request, operation: Operation) -> MergePlan:
    """Decide what a merge would do, and change nothing.

    Raises:
        QmpBackupError: as the merge itself would, short of reading the files.
    """
    place = NamedFolder.find(request.folder)
    refuse_unfinished(place)
    source = select(place, request)
    require_links(source, assume=request.skip_check)
    with interrupt.held(), chain_files.opened(source) as layers:
        plan = plan_of(source, layers, operation)
        if plan.superseded:
            needed = merged_image.needed_bytes(plan, layers)
            merged_image.require_room(place.folder, needed, "The merged image")
    return plan


def clear_up(place: NamedFolder) -> list[str]:
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


def refuse_unfinished(place: NamedFolder) -> None:
    """Refuse to read a folder where a merge was interrupted.

    Raises:
        DamagedError: one was.
    """
    if place.journal.is_there():
        raise DamagedError(
            f"A merge in {place.folder} was interrupted.",
            f"Finish it first: qmprestore commit --dir {place.folder}",
        )

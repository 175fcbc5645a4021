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
from qmpbackup.errors import DamagedError, UsageError
from qmpbackup.plan.merge import (
    MergePlan,
    Operation,
)
from qmpbackup.service.rebase.place import Place
from qmpbackup.service.rebase.source import LINK_HINT, Request, select
from qmpbackup.targets.folder import chain_files, journal, merged_image
from qmpbackup.targets.folder.chain_files import Source
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
    place = Place.find(request.folder)
    with interrupt.held(), place.exclusive(request.lock_wait):
        finished = clear_up(place)
        source = select(place, request)
        _refuse_unlinked(source, request)
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
    place = Place.find(request.folder)
    refuse_unfinished(place)
    source = select(place, request)
    _refuse_unlinked(source, request)
    with interrupt.held(), chain_files.opened(source) as layers:
        plan = plan_of(source, layers, operation)
        if plan.superseded:
            needed = merged_image.needed_bytes(plan, layers)
            merged_image.require_room(place.folder, needed, "The merged image")
    return plan


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

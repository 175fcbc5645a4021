# SPDX-License-Identifier: Apache-2.0
"""A repository that is to take a point of a VM: it opens while the VM is looked at."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from qmpbackup.errors import NoSuchTarget, UsageError
from qmpbackup.model import VmIdentity
from qmpbackup.restic.repository import Repository
from qmpbackup.targets.interface import Found, Target, Wish
from qmpbackup.targets.repository.target import RepositoryTarget

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RepositoryOpening:
    """See `Opening`. `repository` waits until it is open."""

    repository: Callable[[], Repository]
    wish: Wish

    @contextmanager
    def found(self, vm: VmIdentity) -> Iterator[Found]:
        """Hold it as restic's own backups do, and read what it holds of the VM."""
        target = RepositoryTarget(self.repository(), vm)
        target.repository.storage.require_ours()
        with target.writing(self.wish.lock_wait):
            stored = target.load()
            for damage in stored.damaged:
                log.warning("Damaged: %s: %s", damage.path, damage.reason)
            if self.wish.strict:
                target.require_known()
            if others := target.namesakes():
                log.warning("%s They count as another VM's.", others)
            yield Found(target, stored, target)

    def made(self, vm: VmIdentity, new_id: str) -> AbstractContextManager[Target]:
        """Refuse: a backup makes no repository."""
        raise NoSuchTarget(
            f"There is no repository to hold {vm.name or new_id}.", "Make one: init."
        )


def refuse_what_makes_no_sense(wish: Wish) -> None:
    """Refuse what no repository can do.

    Raises:
        UsageError: it was wished.
    """
    if wish.differential:
        raise UsageError(
            "In a repository every point is complete, so there are no differentials.",
            "Use --level auto or inc.",
        )
    if wish.monthly:
        raise UsageError(
            "A repository has no folders for months.", "`qmpbackup prune` limits what is kept."
        )
    if wish.uuid:
        raise UsageError("The id of a repository is its own.", "Leave --uuid out.")
    if wish.verify_chain:
        raise UsageError(
            "In a repository no point builds on the files of others.", "Leave --verify-chain out."
        )

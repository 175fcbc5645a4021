# SPDX-License-Identifier: Apache-2.0
"""Points go from a restic repository: forgotten and swept by restic's own program.

Points do not build on each other, so what is not kept simply goes. restic is told which
snapshots; location and password reach it by its environment, as they reached us. Must not know the
format of repositories.
"""

import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from qmpbackup import interrupt, process
from qmpbackup.errors import (
    Interrupted,
    Locked,
    NoSuchTarget,
    QmpBackupError,
    StorageError,
    UsageError,
    WrongPassword,
)
from qmpbackup.plan.retention import Verdict
from qmpbackup.process import Result
from qmpbackup.restic.repository import Repository
from qmpbackup.restic.storage.interface import Kind
from qmpbackup.restic.storage.trust import words_for_restic
from qmpbackup.targets.inventory import Inventory
from qmpbackup.targets.removal import Removed, Sweep
from qmpbackup.targets.repository.access import Access
from qmpbackup.targets.repository.points import VmPoints

log = logging.getLogger(__name__)

_AT_ONCE = 1000
"""Snapshots that are named in one call; a command line has room for many times more."""

_ASK_AGAIN = 2.0
"""Seconds between two tries to lock the repository."""

_ENDS_WITHIN = 30.0
"""Seconds that restic gets to remove its lock when we are interrupted."""

_EXITS: Mapping[int, type[QmpBackupError]] = {
    3: StorageError,
    10: NoSuchTarget,
    11: Locked,
    12: WrongPassword,
}
"""What restic 0.17 and later mean by their exit codes; before, all was 1, and its words tell."""

_WORDS: Mapping[str, type[QmpBackupError]] = {
    "already locked": Locked,
    "wrong password": WrongPassword,
    "is there a repository at": NoSuchTarget,
    "no space left": StorageError,
    "permission denied": StorageError,
    "operation not permitted": StorageError,
    "read-only file system": StorageError,
    "unexpected http": StorageError,
    "403 forbidden": StorageError,
    "unable to remove": StorageError,
    "unable to create lock": StorageError,
}

_HINTS: Mapping[type[QmpBackupError], str] = {
    Locked: "Wait with --lock-wait; `restic unlock` removes locks of programs that died.",
    StorageError: "Who may only add to a repository cannot prune it.",
}


class RepositoryClearing:
    """See `Clearing`. Nothing is held here: restic takes a lock that leaves room for no other."""

    def __init__(
        self, points: VmPoints, found: Inventory, access: Access | None, sweep: Sweep, until: float
    ) -> None:
        self.points = found.points
        self.poor: Mapping[str, str] = {}
        self.tags: Mapping[str, Sequence[str]] = {
            point.id: tuple(tag for each in points.snapshots_of(point) for tag in each.tags)
            for point in found.points
        }
        self._points = points
        self._access = access
        self._dry_run = sweep.dry_run
        self._sweeping = sweep.sweeping
        self._until = until
        for damage in found.damaged:
            log.warning("Damaged, so left alone: %s: %s", damage.path, damage.reason)

    def perform(self, verdicts: Sequence[Verdict]) -> Removed:
        """Have restic forget the snapshots of what goes, and sweep."""
        # By their ids, never by a group of restic's: nothing of another VM can be among them.
        gone = [
            snapshot.id
            for each in verdicts
            if not each.kept
            for snapshot in self._points.snapshots_of(each.point)
        ]
        if self._dry_run or not gone:
            return Removed(tuple(verdicts), None if gone else 0)
        if self._access is None:
            raise ValueError("a repository that was opened for us alone")
        before = stored(self._points.repository)
        with _told(self._access) as (environment, fds):
            for first in range(0, len(gone), _AT_ONCE):
                part = gone[first : first + _AT_ONCE]
                sweep = ["--prune"] if self._sweeping and part[-1] == gone[-1] else []
                _restic(["forget", "--quiet", *sweep, "--", *part], environment, fds, self._until)
        return Removed(tuple(verdicts), before - stored(self._points.repository))


def require_possible(sweep: Sweep) -> None:
    """Refuse what repositories have not.

    Raises:
        UsageError: it was asked for.
    """
    if not sweep.merging:
        raise UsageError("Nothing is merged in a repository.", "Leave --no-merge out.")


def sweep_all(access: Access, until: float) -> None:
    """Have restic remove what no point needs any more, whichever VM's it was.

    Raises:
        Locked: somebody else held the repository `until` then.
        StorageError: it cannot be changed.
    """
    with _told(access) as (environment, fds):
        _restic(["prune", "--quiet"], environment, fds, until)


def stored(repository: Repository) -> int:
    """Bytes of all packs."""
    return sum(size for _, size in repository.storage.list(Kind.DATA))


@contextmanager
def _told(access: Access) -> Iterator[tuple[dict[str, str], list[int]]]:
    """What restic has to know, by its environment and by descriptors that it inherits.

    The location is not in the command line either, as it may contain a password.
    """
    environment = {"RESTIC_PROGRESS_FPS": "0"}
    if access.location.text:
        environment |= {"RESTIC_REPOSITORY": access.location.text, "RESTIC_REPOSITORY_FILE": ""}
    if any(os.environ.get(name) for name in _PASSWORDS):
        yield environment, []
        return
    fd = os.memfd_create("password", os.MFD_CLOEXEC)
    try:
        os.write(fd, access.secret.encode())
        yield {**environment, "RESTIC_PASSWORD_FILE": f"/dev/fd/{fd}"}, [fd]
    finally:
        os.close(fd)


_PASSWORDS = ("RESTIC_PASSWORD", "RESTIC_PASSWORD_FILE", "RESTIC_PASSWORD_COMMAND")


def _restic(
    arguments: Sequence[str], environment: Mapping[str, str], fds: Sequence[int], until: float
) -> None:
    """Run restic; while the repository is locked, again and again `until` then."""
    words = ["restic", *words_for_restic(os.environ), *arguments]
    while True:
        result = _run(words, environment, fds)
        if result.code == 0:
            return
        error = _failure(result)
        if not isinstance(error, Locked) or time.monotonic() + _ASK_AGAIN > until:
            raise error
        log.info("The repository is locked; waiting.")
        wake = time.monotonic() + _ASK_AGAIN
        while time.monotonic() < wake:
            interrupt.check()
            time.sleep(0.1)


def _run(arguments: Sequence[str], environment: Mapping[str, str], fds: Sequence[int]) -> Result:
    """Run it; where a signal ends us, let it end in order, so that no lock of it stays."""
    with process.Child(arguments, environment=environment, pass_fds=fds) as child:
        try:
            return child.wait()
        except Interrupted:
            os.kill(child.pid, signal.SIGINT)
            with suppress(QmpBackupError):
                child.wait(_ENDS_WITHIN)
            raise


def _failure(result: Result) -> QmpBackupError:
    """The error for a restic that failed: its exit code, or where all are 1, what it said."""
    lines = [line.strip() for line in result.messages.splitlines() if line.strip()]
    told = {word: line for line in lines for word in _WORDS if word in line.lower()}  # the last
    word = next((each for each in _WORDS if each in told), "")
    kind = _EXITS.get(result.code) or (_WORDS[word] if word else QmpBackupError)
    said = (told.get(word) or result.reason).removeprefix("Fatal: ").rstrip(".")
    return kind(f"restic could not prune: {said}.", _HINTS.get(kind, ""))

# SPDX-License-Identifier: Apache-2.0
"""restic's locks: files that say who uses the repository, and whether alone.

    look for locks of others ─ write ours ─ wait a moment ─ look again ─ work, refreshing ─ remove ours

Who only reads may begin at once, as reading harms nobody: what came out counts once we have looked again
(`Held.settle`).

The rules are restic's (doc/design.rst, "Locks"; internal/repository/lock.go): a lock is stale 30
minutes after it was last refreshed, or when its process on this host is gone. It is refreshed every
five minutes, the new file first and then the old one removed; who could not do so in time has lost
it, and must not write any more.

restic finds out whether a process is alive by sending it SIGHUP, so that must not end us while we
hold a lock: see `interrupt`. Knows of the repository no more than how to load and seal a file.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final, Protocol

from qmpbackup import interrupt
from qmpbackup.errors import (
    DamagedError,
    Exhausted,
    Interrupted,
    Locked,
    QmpBackupError,
    StorageError,
)
from qmpbackup.restic.lock_file import Lock, encode, parse
from qmpbackup.restic.storage.interface import File, Kind, Missing, Refused, Storage

_log = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.1
_ATTEMPTS: Final = 3


@dataclass(frozen=True, slots=True)
class Timing:
    """How long things take, in seconds; restic's own, which only tests have a reason to change.

    `settle` passes between writing a lock and looking again, `refresh` between two refreshes.
    Without one for `lost` seconds, a lock is so near to being stale that nobody may rely on it.
    """

    settle: float = 0.2
    refresh: float = 5 * 60.0
    lost: float = 30 * 60.0 - 7.5 * 60.0
    retry: float = 1.0
    longest_retry: float = 30.0


USUAL: Final = Timing()


class Lockable(Protocol):
    """What of a repository is needed here."""

    @property
    def storage(self) -> Storage:
        """Where its files lie."""

    def files(self, kind: Kind) -> Iterator[tuple[str, int]]:
        """Names and lengths of all files of a kind; the first time, as of when it was opened."""

    def load_unpacked(self, kind: Kind, name: str, size: int | None = None) -> bytes:
        """The JSON of a file, checked."""

    def seal_unpacked(self, kind: Kind, data: bytes) -> tuple[str, bytes]:
        """Name and bytes of a file with this JSON."""


@contextmanager
def hold(
    repository: Lockable,
    *,
    exclusive: bool = False,
    early: bool = False,
    wait: float = 0.0,
    timing: Timing = USUAL,
) -> "Iterator[Held]":
    """Hold a lock for the block. With `early` the block begins before we have looked again, which then
    is done by its end, or by `Held.settle`: a block that is left otherwise than by `Locked` was alone
    with those that it may share with.

    Where the storage lets us write no lock, who only reads goes on without one, as with restic's
    `--no-lock`; see `Held.require`.

    Raises:
        Locked: others held the repository for all of `wait` seconds.
        DamagedError: a lock cannot be read, so it may be anybody's.
        StorageError: the storage fails, or lets us write no exclusive lock.
    """
    with interrupt.hangups_survived("restic"):
        held = _acquire(repository, Lock.ours(exclusive=exclusive), early, wait, timing)
        try:
            held.start()
            try:
                yield held
            except QmpBackupError:
                held.settle()  # what others did meanwhile may be the reason
                raise
            held.settle()
        finally:
            held.end()


def _acquire(repository: Lockable, ours: Lock, early: bool, wait: float, timing: Timing) -> "Held":
    deadline = time.monotonic() + wait
    pause = timing.retry
    while True:
        held = Held(repository, ours, timing)
        try:
            held.acquire(early=early)
            return held
        except Locked as error:
            left = deadline - time.monotonic()
            if left <= 0:
                raise
            _log.info("%s Waiting.", error.message)
            _sleep(min(pause, left))
            pause = min(2 * pause, timing.longest_retry)


@dataclass(slots=True)
class Held:
    """A lock of ours. `names` are its files: one, but for the moment of a refresh."""

    _repository: Lockable
    _lock: Lock
    _timing: Timing
    _names: list[str] = field(default_factory=list)
    _refreshed: float = 0.0
    _is_lost: bool = False
    _changing: threading.RLock = field(default_factory=threading.RLock)
    _ended: threading.Event = field(default_factory=threading.Event)
    _settled: threading.Event = field(default_factory=threading.Event)
    _others_came: BaseException | None = None
    _thread: threading.Thread | None = None

    def acquire(self, *, early: bool = False) -> None:
        """Look for others, write our lock, and look again, unless `early`.

        Raises:
            Locked: there are others; nothing of ours is left.
        """
        self._look()
        try:
            self._write()
        except Refused as error:
            if self._lock.exclusive:
                raise
            _log.warning("Reading without a lock: %s", error.message)
            self._settled.set()
            return
        if early:
            return
        self._settled.set()
        try:
            _sleep(self._timing.settle)
            self._look()
        except BaseException:
            self.end()
            raise

    def start(self) -> None:
        """Refresh it from now on; look again, if that is still to be done."""
        if self._names:
            self._thread = threading.Thread(target=self._keep, name="lock", daemon=True)
            self._thread.start()

    def settle(self) -> None:
        """Wait until we have looked again.

        Raises:
            Locked, QmpBackupError: as `acquire`; nothing that was read counts.
            Interrupted: a signal is waiting.
        """
        while not self._settled.wait(_POLL_SECONDS):
            interrupt.check()
        if self._others_came is not None:
            raise self._others_came

    def _keep(self) -> None:
        if not self._settled.is_set() and not self._ended.wait(self._timing.settle):
            try:
                self._look()
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that settles
                self._others_came = error
            self._settled.set()
        self._refresh_on()

    def end(self) -> None:
        """Stop refreshing it, and remove it; harmless when repeated."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self._remove_all()
        except Interrupted:
            # Who ends us has no patience with a storage that fails; one more try is due all the same.
            self._repository.storage.give_up()
            self._remove_all()
            raise

    def _remove_all(self) -> None:
        for name in self._names:
            self._remove(name)
        self._names.clear()

    def require(self) -> None:
        """To be called before anything is written that others will rely on.

        Raises:
            StorageError: we hold no lock, or lost it, for example while this host slept.
        """
        with self._changing:
            if not self._names:
                raise Refused(
                    f"{self._repository.storage.name} lets nobody lock it, so it cannot be written.",
                    "Give this user the right to write and to remove locks.",
                )
            if not self._is_lost and time.time() - self._refreshed > self._timing.lost:
                self._refresh_late()
            if self._is_lost:
                raise StorageError(
                    "The lock of the repository could not be refreshed in time, and is lost.",
                    "See that the storage can be reached, and run again.",
                )

    def _write(self) -> None:
        """Write a file with the present time, and make it the first of ours."""
        self._lock = replace(self._lock, time=datetime.now().astimezone())
        name, sealed = self._repository.seal_unpacked(Kind.LOCK, encode(self._lock))
        # It is ours to remove from here on: a save that failed may yet have had its effect.
        self._names.insert(0, name)
        try:
            self._repository.storage.save(File(Kind.LOCK, name), [sealed])
        except Refused:
            self._names.pop(0)
            raise
        except BaseException:
            self._remove(self._names.pop(0))
            raise
        self._refreshed = self._lock.time.timestamp()

    def _refresh_on(self) -> None:
        while not self._ended.wait(self._timing.refresh):
            with self._changing:
                try:
                    if time.time() - self._refreshed > self._timing.lost:
                        self._refresh_late()
                    else:
                        self._write()
                        self._forget_older()
                except (QmpBackupError, Exhausted) as error:
                    _log.warning("The lock of the repository was not refreshed: %s", error)

    def _refresh_late(self) -> None:
        """Others may have taken our lock for stale: it is still ours if it was there all along."""
        before = self._names[0]
        self._is_lost = True
        try:
            if self._exists(before):
                self._write()
                time.sleep(self._timing.settle)
                self._is_lost = not self._exists(before)
                self._forget_older()
        except QmpBackupError as error:
            _log.warning("The lock of the repository was not refreshed: %s", error)

    def _forget_older(self) -> None:
        self._names[1:] = [name for name in self._names[1:] if not self._remove(name)]

    def _exists(self, wanted: str) -> bool:
        return any(name == wanted for name, _ in self._listed())

    def _listed(self) -> list[tuple[str, int]]:
        try:
            return list(self._repository.files(Kind.LOCK))
        except Missing:  # a copy of a repository may lack folders in which nothing was
            return []

    def _remove(self, name: str) -> bool:
        """Whether a file is gone."""
        try:
            self._repository.storage.remove(File(Kind.LOCK, name))
        except Missing:
            return True
        except QmpBackupError as error:
            _log.warning("The lock %s was not removed: %s", name, error)
            return False
        return True

    def _look(self) -> None:
        """Look for locks of others that keep us out.

        Raises:
            Locked: there is one.
            DamagedError: one cannot be read.
        """
        for name, lock in self._others():
            if lock.is_dead:
                _log.info("Removing the lock of a process that is gone: %s", lock)
                with suppress(QmpBackupError):
                    self._repository.storage.remove(File(Kind.LOCK, name))
            elif lock.is_stale:
                _log.debug("A lock is stale: %s", lock)
            elif lock.exclusive or self._lock.exclusive:
                raise Locked(
                    f"{self._repository.storage.name} is locked {lock}.",
                    "Wait for its end, or let this run wait with --lock-wait SECONDS. If it is "
                    "dead, `restic unlock` removes its lock.",
                )

    def _others(self) -> Iterator[tuple[str, Lock]]:
        for name, size in self._listed():
            # Where uploads are not atomic, one that broke off leaves an empty file (as in restic).
            if size and name not in self._names:
                lock = self._load(name, size)
                if lock is not None:
                    yield name, lock

    def _load(self, name: str, size: int) -> Lock | None:
        for attempt in range(_ATTEMPTS):
            _sleep(self._timing.retry * attempt)
            known = None if attempt else size  # it may have been written meanwhile
            try:
                return parse(self._repository.load_unpacked(Kind.LOCK, name, known), name)
            except Missing:
                return None
            except DamagedError as error:
                damaged = error
        raise DamagedError(
            damaged.message, "If nobody uses the repository: `restic unlock --remove-all`."
        )


def _sleep(seconds: float) -> None:
    """Let time pass; a signal that is held back ends it."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _POLL_SECONDS))
        interrupt.check()

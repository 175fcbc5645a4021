# SPDX-License-Identifier: Apache-2.0
"""What is the same for every storage, as wrappers around one: retries, a limit, a log."""

import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from qmpbackup import interrupt
from qmpbackup.restic.storage.interface import Buffer, File, Kind, Missing, Storage, Temporary
from qmpbackup.restic.storage.listing import Listing

_log = logging.getLogger(__name__)
_POLL_SECONDS: Final = 0.1
_LEAST_TRIES_TO_REMOVE: Final = 3

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Retries:
    """How long to try again: pauses double from `first` to `longest`, `total` in all (seconds).

    A storage that has not done anything yet is given up after `strange`: more often than in
    trouble, it is not there, because its name or its address is wrong.
    """

    first: float = 0.5
    longest: float = 30.0
    total: float = 300.0
    strange: float = 45.0


class _Wrapper(Storage):
    """Does all by the storage in it."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    @property
    def name(self) -> str:
        return self._storage.name

    def create(self) -> None:
        self._call(self._storage.create)

    def save(self, file: File, parts: Sequence[Buffer]) -> None:
        self._call(self._storage.save, file, parts)

    def load(self, file: File, offset: int = 0, length: int | None = None) -> bytes:
        return self._call(self._storage.load, file, offset, length)

    def size(self, file: File) -> int:
        return self._call(self._storage.size, file)

    def list(self, kind: Kind) -> Iterator[tuple[str, int]]:
        return iter(self._call(self._listed, kind))

    def _listed(self, kind: Kind) -> Listing:
        """All of a listing, so that one which breaks off names nothing twice."""
        return Listing.of(kind, self.name, self._storage.list(kind))

    def remove(self, file: File) -> None:
        self._call(self._storage.remove, file)

    def require_same(self) -> None:
        self._call(self._storage.require_same)

    def require_ours(self) -> None:
        self._call(self._storage.require_ours)

    def give_up(self) -> None:
        self._storage.give_up()

    def close(self) -> None:
        self._storage.close()

    def _call(self, what: Callable[..., T], *arguments: object) -> T:
        raise NotImplementedError


class Retrying(_Wrapper):
    """Tries again what failed for a reason that may pass. Every operation can be repeated: names are
    hashes of contents, and what is gone is gone."""

    def __init__(self, storage: Storage, patience: Retries | None = None) -> None:
        super().__init__(storage)
        self._patience = patience or Retries()
        self._known = False
        self._given_up = threading.Event()

    @property
    def impatient(self) -> Storage:
        """What is in it."""
        return self._storage

    def give_up(self) -> None:
        """From now on everything is tried once."""
        self._given_up.set()
        super().give_up()

    def remove(self, file: File) -> None:
        """Remove a file. That it is gone at a second try is as it should be."""
        tries = 0

        def remove() -> None:
            nonlocal tries
            tries += 1
            try:
                self._storage.remove(file)
            except Missing:
                if tries == 1:
                    raise

        # A lock that stays keeps others out: it is worth more than one try even after giving up.
        self._persist(remove, (), least=_LEAST_TRIES_TO_REMOVE)

    def _call(self, what: Callable[..., T], *arguments: object) -> T:
        return self._persist(what, arguments, least=1)

    def _persist(self, what: Callable[..., T], arguments: Sequence[object], least: int) -> T:
        started = time.monotonic()
        pause = self._patience.first
        said = ""
        for tries in itertools.count(1):
            try:
                result = what(*arguments)
            except Temporary as error:
                total = self._patience.total if self._known else self._patience.strange
                if self._given_up.is_set():
                    if tries >= least:
                        raise
                    time.sleep(_POLL_SECONDS)
                elif time.monotonic() - started + pause > total:
                    raise
                # Once: what goes on for minutes is no news.
                level = logging.DEBUG if error.message == said else logging.WARNING
                _log.log(level, "%s Trying again.", error.message)
                said = error.message
            else:
                self._known = True
                return result
            self._rest(pause * random.uniform(0.5, 1.0))  # noqa: S311 - so that not all come at once
            pause = min(2 * pause, self._patience.longest)
        raise AssertionError("counting ended")

    def _rest(self, seconds: float) -> None:
        """Let time pass; giving up ends it, and in the main thread a signal."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._given_up.wait(
            min(left, _POLL_SECONDS)
        ):
            interrupt.check()


class Limited(_Wrapper):
    """Lets only so many operations go on at once."""

    def __init__(self, storage: Storage, at_once: int) -> None:
        super().__init__(storage)
        self._slots = threading.Semaphore(at_once)

    def _call(self, what: Callable[..., T], *arguments: object) -> T:
        with self._slots:
            return what(*arguments)


class Logged(_Wrapper):
    """Logs each operation, how long it took and how it failed, for `--debug`."""

    def _call(self, what: Callable[..., T], *arguments: object) -> T:
        started = time.monotonic()
        said = f"{what.__name__.removeprefix('_')} {' '.join(map(_short, arguments))}".strip()
        try:
            result = what(*arguments)
        except Exception as error:
            _log.debug("%s: %s", said, error)
            raise
        _log.debug("%s: %.3f s", said, time.monotonic() - started)
        return result


def _short(argument: object) -> str:
    """An argument without any contents."""
    if isinstance(argument, File | int | Kind):
        return str(argument)
    if isinstance(argument, Sequence):
        return f"{sum(map(len, argument))} bytes"
    return ""

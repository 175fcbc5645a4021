# SPDX-License-Identifier: Apache-2.0
"""What a storage is asked before anybody needs it, so that one far away is waited for once.

    begin        a question is put in a thread; who needs its answer waits for it then
    ask, look    files of a kind are listed, snapshots and index files; `list` gives each listing once

A question that fails for a reason that may pass is put again where its answer is needed: so all that is
said of trouble, and all patience with it, is there. Must not know what the answers are for.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final, TypeVar

from qmpbackup import interrupt
from qmpbackup.errors import StorageError
from qmpbackup.restic.storage.interface import Kind, Storage, Temporary

_AT_ONCE: Final = 4
_POLL_SECONDS: Final = 0.1

T = TypeVar("T")
_Listing = list[tuple[str, int]]


class Ahead:
    """Questions to one storage, put and answered for one thread. `close` it before the storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._threads = ThreadPoolExecutor(_AT_ONCE, "ahead")
        self._is_over: list[Callable[[], bool]] = []
        self._listings: dict[Kind, Callable[[], _Listing]] = {}
        self._known: Callable[[], frozenset[str]] = frozenset
        """The snapshots that were listed before the index files were."""

    def close(self) -> None:
        """Break off what is under way."""
        if not all(is_over() for is_over in self._is_over):
            self._storage.give_up()
        self._threads.shutdown(cancel_futures=True)

    def begin(self, question: Callable[[Storage], T]) -> Callable[[], T]:
        """Put a question. What is returned waits for the answer, raises what the question raised, and
        `Interrupted` where a signal is waiting."""
        return self._answer(question, self._put(question))

    def ask(self, kind: Kind) -> None:
        """Begin to list files of a kind."""
        self._listings[kind] = self.begin(_lister(kind))

    def look(self) -> None:
        """Begin to list snapshots and index files.

        Index files that are listed after snapshots name all that those need. So they are listed at once
        where snapshots have been listed before, and once more if another has come since.
        """
        before, question = self._known, _lister(Kind.SNAPSHOT)
        snapshots = self._put(question)

        def index(storage: Storage) -> _Listing:
            if not before():
                wait([snapshots])
            return _lister(Kind.INDEX)(storage)

        self._known = before if before() else lambda: _names(_result(snapshots))
        self._listings[Kind.SNAPSHOT] = self._answer(question, snapshots)
        self._listings[Kind.INDEX] = self.begin(index)

    def list(self, kind: Kind) -> Iterator[tuple[str, int]]:
        """What was begun and nobody was given yet; else as `Storage.list`."""
        begun = self._listings.pop(kind, None)
        found = begun() if begun else _lister(kind)(self._storage)
        if kind is Kind.SNAPSHOT:
            names = _names(found)
            if not names <= self._known():
                self._listings.pop(Kind.INDEX, None)
            self._known = lambda: names
        return iter(found)

    def _put(self, question: Callable[[Storage], T]) -> "Future[T]":
        future = self._threads.submit(question, self._storage.impatient)
        self._is_over.append(future.done)
        return future

    def _answer(self, question: Callable[[Storage], T], future: "Future[T]") -> Callable[[], T]:
        def answer() -> T:
            while not wait([future], _POLL_SECONDS).done:
                interrupt.check()
            try:
                return future.result()
            except Temporary:
                return question(self._storage)

        return answer


def _lister(kind: Kind) -> Callable[[Storage], _Listing]:
    return lambda storage: list(storage.list(kind))


def _names(listing: _Listing) -> frozenset[str]:
    return frozenset(name for name, _ in listing)


def _result(snapshots: "Future[_Listing]") -> _Listing:
    """What came, if it came."""
    try:
        return snapshots.result()
    except StorageError:
        return []

# SPDX-License-Identifier: Apache-2.0
"""A table of all snapshots: when each was made, and what somebody wants to know of it, in a few words.

A data centre's repository holds a hundred thousand snapshots, and a file of its own is slow to read for
each, from a cache, too. So the table is kept as one: only what was stored since is read. Whose words
they are, and what they say, is nobody's business here.

    JSON: the notes, each once ‖ \\n ‖ for each snapshot: name (32), time (8), number of its note (4)
"""

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from qmpbackup import interrupt
from qmpbackup.errors import DamagedError
from qmpbackup.restic.repository import Repository
from qmpbackup.restic.snapshot import Snapshot
from qmpbackup.restic.storage.interface import Kind, Missing

_ROW: Final = struct.Struct(">32sqI")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_AT_ONCE: Final = 8
_BATCH: Final = 128


class Tabled(NamedTuple):
    """A snapshot: its name, its time in microseconds since 1970, and the number of its note."""

    name: bytes
    micros: int
    note: int

    @property
    def time(self) -> datetime:
        """When it was made."""
        return _EPOCH + self.micros * _MICROSECOND


class SnapshotTable:
    """All snapshots that are there, in no order, and the notes on them."""

    def __init__(self) -> None:
        self.rows: list[Tabled] = []
        self.notes: list[str] = []
        self._numbers: dict[str, int] = {}

    def add(self, name: bytes, micros: int, note: str) -> None:
        """Enter a snapshot."""
        number = self._numbers.setdefault(note, len(self.notes))
        if number == len(self.notes):
            self.notes.append(note)
        self.rows.append(Tabled(name, micros, number))

    def encode(self) -> bytes:
        """As it is kept."""
        rows = b"".join(_ROW.pack(*each) for each in self.rows)
        return json.dumps(self.notes).encode("ascii") + b"\n" + rows

    @classmethod
    def decode(cls, data: bytes) -> "SnapshotTable":
        """As it was kept; an empty one for anything else."""
        head, _, body = data.partition(b"\n")
        table = cls()
        try:
            notes = json.loads(head)
            rows = [Tabled(*each) for each in _ROW.iter_unpack(body)]
        except (ValueError, struct.error):
            return table
        is_ours = isinstance(notes, list) and all(isinstance(each, str) for each in notes)
        if is_ours and all(row.note < len(notes) for row in rows):
            table.rows, table.notes = rows, notes
            table._numbers = {note: number for number, note in enumerate(notes)}
        return table


def read(
    repository: Repository,
    called: str,
    note: Callable[[Snapshot], str],
    damaged: Callable[[str, DamagedError], None],
) -> SnapshotTable:
    """All snapshots that are there now, each with its `note`, which is asked for once and kept under the
    name that the table is `called` by; `damaged` is told of those that cannot be read.

    Raises:
        StorageError: the storage fails.
    """
    cached = repository.cached(called)
    kept = SnapshotTable.decode(cached or b"")
    known = {row.name: row for row in kept.rows}
    table = SnapshotTable()
    unknown: list[tuple[str, int]] = []
    for name, size in _listed(repository):
        row = known.pop(bytes.fromhex(name), None)
        if row is None:
            unknown.append((name, size))
        else:
            table.add(row.name, row.micros, kept.notes[row.note])
    _enter(repository, table, unknown, note, damaged)
    if known or unknown or cached is None:
        repository.cache(called, table.encode())
    return table


def _listed(repository: Repository) -> Iterator[tuple[str, int]]:
    try:
        yield from repository.storage.list(Kind.SNAPSHOT)
    except Missing:  # a copy may lack a folder in which nothing was
        return


def _enter(
    repository: Repository,
    table: SnapshotTable,
    unknown: Sequence[tuple[str, int]],
    note: Callable[[Snapshot], str],
    damaged: Callable[[str, DamagedError], None],
) -> None:
    """Read snapshots, several at once; no more of each stays in memory than what is noted."""

    def read_some(
        some: Sequence[tuple[str, int]],
    ) -> list[tuple[str, tuple[int, str] | DamagedError]]:
        found: list[tuple[str, tuple[int, str] | DamagedError]] = []
        for name, size in some:
            try:
                one = repository.snapshot(name, size, keep=False)
                found.append((name, ((one.time - _EPOCH) // _MICROSECOND, note(one))))
            except Missing:
                continue  # somebody forgot it meanwhile
            except DamagedError as error:
                found.append((name, error))
        return found

    batches = [unknown[at : at + _BATCH] for at in range(0, len(unknown), _BATCH)]
    with ThreadPoolExecutor(_AT_ONCE, "snapshots") as threads:
        try:
            for future in [threads.submit(read_some, each) for each in batches]:
                interrupt.check()
                for name, found in future.result():
                    if isinstance(found, DamagedError):
                        damaged(name, found)
                    else:
                        table.add(bytes.fromhex(name), *found)
        finally:
            threads.shutdown(wait=True, cancel_futures=True)

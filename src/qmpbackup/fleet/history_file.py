# SPDX-License-Identifier: Apache-2.0
"""The file of the history: an SQLite database that may go at any time, and never stops anybody.

What cannot be read is put aside (`lost` says so), what cannot be written is kept in memory for as long as
we live (`trouble`). Knows tables; must not know what their rows mean.

The journal is truncated, not a write-ahead log: others may read the file who cannot write beside it.
"""

import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Final, TypeVar

from qmpbackup.durable import make_folders

_log = logging.getLogger(__name__)

NAME: Final = "history.db"
_BROKEN: Final = "history-broken.db"
_VERSION: Final = 1
PATIENCE: Final = 10.0
"""Seconds in which somebody else may keep it locked, until we go on without it."""
_OF_THE_FILE: Final = frozenset(
    {
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_CONSTRAINT,
        sqlite3.SQLITE_ERROR,  # our statements are right, so its tables are not ours
    }
)
_NAMES: Final = frozenset({"attempt", "holding", "known_vm", "told"})
_TABLES: Final = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS attempt (
  key INTEGER PRIMARY KEY AUTOINCREMENT, work TEXT NOT NULL, vm TEXT NOT NULL, target TEXT NOT NULL,
  run TEXT NOT NULL, started INTEGER NOT NULL, ended INTEGER, exit_code INTEGER, reason TEXT NOT NULL,
  scheduled INTEGER, point TEXT NOT NULL, level TEXT NOT NULL, consistency TEXT NOT NULL,
  added INTEGER NOT NULL, read INTEGER NOT NULL, pause REAL NOT NULL);
CREATE INDEX IF NOT EXISTS attempt_of ON attempt (vm, target, work);
CREATE INDEX IF NOT EXISTS attempt_unended ON attempt (run) WHERE ended IS NULL;
CREATE TABLE IF NOT EXISTS holding (
  vm TEXT NOT NULL, target TEXT NOT NULL, looked INTEGER NOT NULL, newest INTEGER,
  newest_id TEXT NOT NULL, consistency TEXT NOT NULL, points INTEGER NOT NULL, damaged INTEGER NOT NULL,
  host TEXT NOT NULL, uuid TEXT NOT NULL, problem TEXT NOT NULL, ahead INTEGER
  NOT NULL, place TEXT NOT NULL DEFAULT '', PRIMARY KEY (vm, target));
CREATE TABLE IF NOT EXISTS known_vm (
  group_name TEXT NOT NULL, vm TEXT NOT NULL, first_seen INTEGER NOT NULL, seen INTEGER NOT NULL,
  PRIMARY KEY (group_name, vm));
CREATE TABLE IF NOT EXISTS told (key TEXT PRIMARY KEY, at INTEGER NOT NULL);
PRAGMA user_version = 1;
COMMIT;
"""
_ADD_PLACE: Final = "ALTER TABLE holding ADD COLUMN place TEXT NOT NULL DEFAULT ''"
_FAILED: Final = (sqlite3.DatabaseError, UnicodeDecodeError)
"""How SQLite says that something is wrong; the second, where its own sentence is spoilt."""

Value = int | float | str | bytes | None
Row = tuple[Value, ...]
T = TypeVar("T")


class HistoryFile:
    """A database of ours, on disk as long as that goes well. Any thread may use it."""

    def __init__(self, folder: Path, *, read_only: bool, patience: float = PATIENCE) -> None:
        """Open it, making the folder where it is to be written to."""
        self.trouble = ""
        self.lost = ""
        self._path = folder / NAME
        self._read_only = read_only
        self._patience = patience
        self._lock = threading.RLock()
        self._connection = self._opened()

    def close(self) -> None:
        """Let go of it."""
        with self._lock:
            self._connection.close()

    def do(self, statement: str, values: Mapping[str, Value] | None = None) -> list[Row]:
        """Carry out one statement, whatever has become of the file; gives its rows."""
        return self.read(statement, values or {}, tuple)

    def read(self, statement: str, values: Mapping[str, Value], of: Callable[[Row], T]) -> list[T]:
        """The same, with each row as what it means. `of` may fail with `Unreadable`: then the file is as
        broken as if SQLite had said so."""
        return self._whatever_becomes(
            lambda: list(map(of, self._connection.execute(statement, values).fetchall()))
        )

    def do_all(self, statement: str, values: Sequence[Mapping[str, Value]]) -> None:
        """Carry out one statement with many values, which come onto the disk at once: it is that which takes
        time."""
        self._whatever_becomes(lambda: _at_once(self._connection, statement, values))

    def _whatever_becomes(self, do: Callable[[], T]) -> T:
        """Do something with the database, and again with another where it fails."""
        with self._lock:
            for rescue in (self._rescue, self._lose):
                try:
                    return do()
                except sqlite3.ProgrammingError:
                    raise  # a fault of ours, which no other file mends
                except _FAILED as error:
                    rescue(error)
            return do()

    def _opened(self) -> sqlite3.Connection:
        why = ""
        for _ in range(2):  # the second time, a broken one is out of the way
            try:
                if self._read_only and not self._path.exists():
                    return _in_memory()
                return self._made_and_connected()
            except OSError as error:
                return self._without(f"{error.strerror}: {self._path.parent}")
            except _FAILED as error:
                why = str(error)
                if not _is_broken(error):
                    return self._without(why, self._connected_to_read)
                if self._read_only or not self._put_aside(error):
                    break
        return self._without(why)

    def _made_and_connected(self) -> sqlite3.Connection:
        if not self._read_only:
            _touch(self._path)
        return self._connected()

    def _connected(self) -> sqlite3.Connection:
        mode = "ro" if self._read_only else "rw"
        connection = sqlite3.connect(
            f"{self._path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=self._patience,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            _prepare(connection, read_only=self._read_only)
            if _is_complete(connection):
                return connection
            with closing(connection):  # an earlier version's, which may only be read
                return _copied(connection)
        except BaseException:
            connection.close()
            raise

    def _rescue(self, error: Exception) -> None:
        """Have a database again after one has failed: what it knew, where that can be had."""
        failed = self._connection
        if not _is_broken(error):
            self._connection = self._without(str(error), lambda: failed)
        elif self._read_only or self.trouble or not self._put_aside(error):
            self._connection = self._without(str(error))
        else:
            self._connection = self._opened()
        failed.close()

    def _lose(self, error: Exception) -> None:
        """Have an empty one after the second has failed, too."""
        self._connection.close()
        self._connection = self._without(str(error))

    def _without(
        self, why: str, known: Callable[[], sqlite3.Connection] | None = None
    ) -> sqlite3.Connection:
        """Go on in memory, with what is `known`."""
        if self._read_only:
            self.trouble = f"The history {self._path} cannot be read: {why}."
        else:
            self.trouble = (
                f"The history {self._path} cannot be written: {why}. Backups go on; what is noted "
                "of them is lost at the end of this run."
            )
        _log.warning("%s", self.trouble)
        if known is None:
            return _in_memory()
        try:
            with closing(known()) as source:
                return _copied(source)
        except _FAILED:
            return _in_memory()

    def _connected_to_read(self) -> sqlite3.Connection:
        uri = f"{self._path.absolute().as_uri()}?mode=ro"
        return sqlite3.connect(uri, uri=True, timeout=self._patience)

    def _put_aside(self, error: Exception) -> bool:
        """Keep a broken database for whoever wants to look, and be without it; False where it stays."""
        aside = self._path.with_name(_BROKEN)
        try:
            self._path.replace(aside)
            with suppress(FileNotFoundError):  # left there, it would be rolled back into the next
                self._path.with_name(f"{NAME}-journal").unlink()
        except OSError:
            return False
        self.lost = (
            f"The history {self._path} is broken ({error}): it is put aside as {aside.name}, and begun "
            "anew. Points are not concerned: they are in the targets."
        )
        _log.warning("%s", self.lost)
        return True


def _prepare(connection: sqlite3.Connection, *, read_only: bool) -> None:
    """See that the tables are ours; an empty database gets them.

    Raises:
        sqlite3.DatabaseError: it cannot be used.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema")}
    if not read_only:
        connection.execute("PRAGMA journal_mode = TRUNCATE")
        if version == 0 and not names:
            connection.executescript(_TABLES)
            return
    if version != _VERSION or not names >= _NAMES:
        raise _Foreign("it is no history of this version")
    if not (read_only or _is_complete(connection)):
        connection.execute(_ADD_PLACE)


def _is_complete(connection: sqlite3.Connection) -> bool:
    """Whether it has what earlier versions did not make."""
    columns = connection.execute("SELECT name FROM pragma_table_info('holding')")
    return "place" in {name for (name,) in columns}


def _at_once(
    connection: sqlite3.Connection, statement: str, values: Sequence[Mapping[str, Value]]
) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.executemany(statement, values)
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


class _Foreign(sqlite3.DatabaseError):
    """A database, and not one of ours."""


class Unreadable(sqlite3.DatabaseError):
    """A row that is none that we have written."""


def _is_broken(error: Exception) -> bool:
    """Whether the file itself is at fault, not the room for it nor the right to it."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    return code in _OF_THE_FILE


def _copied(source: sqlite3.Connection) -> sqlite3.Connection:
    """A copy in memory.

    Raises:
        sqlite3.Error: it cannot be made, as where somebody holds a lock, for which SQLite would wait for
            ever.
    """
    memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)

    def progress(status: int, left: int, total: int) -> None:
        del left, total
        if status in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            raise sqlite3.OperationalError("database is locked")

    try:
        source.backup(memory, progress=progress)
        _prepare(memory, read_only=False)
    except BaseException:
        memory.close()
        raise
    return memory


def _in_memory() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    _prepare(connection, read_only=False)
    return connection


def _touch(path: Path) -> None:
    """Make the file: for us to write, and for our group to read."""
    make_folders(path.parent)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640))

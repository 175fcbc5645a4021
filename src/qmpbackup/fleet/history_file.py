# SPDX-License-Identifier: Apache-2.0
"""The file of the history: an SQLite database that may go at any time, and never stops anybody.

What cannot be read is put aside, what cannot be written is kept in memory for as long as we live; in
both cases `trouble` says so. Knows tables; must not know what their rows mean.

The journal is truncated, not a write-ahead log: others may read the file who cannot write beside it.
"""

import logging
import os
import sqlite3
import threading
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

from qmpbackup.durable import make_folders

_log = logging.getLogger(__name__)

NAME: Final = "history.db"
_BROKEN: Final = "history-broken.db"
_VERSION: Final = 1
_BUSY_SECONDS: Final = 30.0
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
  NOT NULL, PRIMARY KEY (vm, target));
CREATE TABLE IF NOT EXISTS known_vm (
  group_name TEXT NOT NULL, vm TEXT NOT NULL, first_seen INTEGER NOT NULL, seen INTEGER NOT NULL,
  PRIMARY KEY (group_name, vm));
CREATE TABLE IF NOT EXISTS told (key TEXT PRIMARY KEY, at INTEGER NOT NULL);
PRAGMA user_version = 1;
COMMIT;
"""

Value = int | float | str | bytes | None
Row = tuple[Value, ...]


class HistoryFile:
    """A database of ours, on disk as long as that goes well. Any thread may use it."""

    def __init__(self, folder: Path, *, read_only: bool) -> None:
        """Open it, making the folder where it is to be written to."""
        self.trouble = ""
        self._path = folder / NAME
        self._read_only = read_only
        self._lock = threading.RLock()
        self._connection = self._opened()

    def close(self) -> None:
        """Let go of it."""
        with self._lock:
            self._connection.close()

    def do(self, statement: str, values: Mapping[str, Value] | None = None) -> list[Row]:
        """Carry out one statement, whatever has become of the file; gives its rows."""
        with self._lock:
            try:
                return self._connection.execute(statement, values or {}).fetchall()
            except sqlite3.DatabaseError as error:
                self._rescue(error)
            return self._connection.execute(statement, values or {}).fetchall()

    def _opened(self) -> sqlite3.Connection:
        if self._read_only and not self._path.exists():
            return _in_memory()
        try:
            if not self._read_only:
                _touch(self._path)
            return self._connected()
        except OSError as error:
            return self._without(f"{error.strerror}: {self._path.parent}")
        except sqlite3.DatabaseError as error:
            if self._read_only or not _is_broken(error):
                return self._without(str(error))
            self._put_aside(error)
            return self._opened()

    def _connected(self) -> sqlite3.Connection:
        mode = "ro" if self._read_only else "rw"
        connection = sqlite3.connect(
            f"{self._path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            _prepare(connection, read_only=self._read_only)
        except BaseException:
            connection.close()
            raise
        return connection

    def _rescue(self, error: sqlite3.DatabaseError) -> None:
        """Have a database again after one has failed."""
        if isinstance(error, (sqlite3.ProgrammingError, sqlite3.IntegrityError)):
            raise error  # a fault of ours, which no other file mends
        failed = self._connection
        if _is_broken(error) and not (self._read_only or self.trouble):
            failed.close()
            self._put_aside(error)
            self._connection = self._opened()
            return
        self._connection = self._without(str(error), failed)
        failed.close()

    def _without(self, why: str, known: sqlite3.Connection | None = None) -> sqlite3.Connection:
        """Go on in memory, with what is `known`."""
        if self._read_only:
            self.trouble = f"The history {self._path} cannot be read: {why}."
        else:
            self.trouble = (
                f"The history {self._path} cannot be written: {why}. Backups go on; what is noted "
                "of them is lost at the end of this run."
            )
        _log.warning("%s", self.trouble)
        memory = _in_memory()
        try:
            if known is not None:
                known.backup(memory)
            else:
                with closing(self._connected_to_read()) as source:
                    source.backup(memory)
            _prepare(memory, read_only=False)
        except sqlite3.Error:
            memory.close()
            return _in_memory()
        return memory

    def _connected_to_read(self) -> sqlite3.Connection:
        uri = f"{self._path.absolute().as_uri()}?mode=ro"
        return sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS)

    def _put_aside(self, error: sqlite3.DatabaseError) -> None:
        """Keep a broken database for whoever wants to look, and be without it."""
        aside = self._path.with_name(_BROKEN)
        _log.warning(
            "The history %s is broken (%s): it is put aside as %s, and begun anew. Points are not "
            "concerned: they are in the targets.",
            self._path,
            error,
            aside.name,
        )
        try:
            self._path.replace(aside)
        except OSError:
            with suppress(OSError):
                self._path.unlink()
        with suppress(OSError):
            self._path.with_name(f"{NAME}-journal").unlink()


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


class _Foreign(sqlite3.DatabaseError):
    """A database, and not one of ours."""


def _is_broken(error: sqlite3.DatabaseError) -> bool:
    """Whether the file itself is at fault, not the room for it nor the right to it."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    return code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def _in_memory() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    _prepare(connection, read_only=False)
    return connection


def _touch(path: Path) -> None:
    """Make the file: for us to write, and for our group to read."""
    make_folders(path.parent)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640))

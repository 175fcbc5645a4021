# SPDX-License-Identifier: Apache-2.0
"""The files of a configuration, put together: which tables they have, and which file each is from.

Nothing is merged: a table stands once in all files. Must not know what the keys in them mean.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from qmpbackup.fleet.config.sockets import is_name
from qmpbackup.fleet.plain_files import read_plain
from qmpbackup.fleet.settings import Fault
from qmpbackup.plan.guessing import close_to, or_did_you_mean

SINGLE: Final = ("run", "defaults", "metrics")
NAMED: Final = ("group", "vm", "target", "notify")

_LARGEST: Final = 4 * 1024 * 1024
"""Bytes of a file that is read."""


@dataclass(frozen=True, slots=True)
class Written:
    """A table as it was written: its full name, such as `vm.db1`, and its keys."""

    file: str
    name: str
    keys: Mapping[str, object] = field(default_factory=dict)

    @property
    def own(self) -> str:
        """Its name without the kind of table."""
        return self.name.partition(".")[2]


@dataclass(slots=True)
class Tables:
    """The tables of all files, by their full names, and what is wrong with where they stand."""

    main: str
    tables: dict[str, Written] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def single(self, name: str) -> Written:
        """One of `SINGLE`, empty where nobody wrote it."""
        return self.tables.get(name, Written(self.main, name))

    def named(self, kind: str) -> list[Written]:
        """All of one of `NAMED`."""
        return [each for each in self.tables.values() if each.name.startswith(f"{kind}.")]


def gathered(path: Path) -> Tables:
    """The tables of a file, and of those in `conf.d` beside it."""
    found = Tables(str(path))
    for each in _files(path, found.faults):
        for name, value in _parsed(each, found.faults).items():
            _add(found, str(each), name, value)
    return found


def _files(path: Path, faults: list[Fault]) -> Iterator[Path]:
    yield path
    folder = path.parent / "conf.d"
    try:
        names = sorted(each.name for each in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        faults.append(Fault(str(folder), "", f"This cannot be read: {error.strerror}."))
        return
    yield from (folder / each for each in names if each.endswith(".toml") and each[0] != ".")


def _parsed(path: Path, faults: list[Fault]) -> Mapping[str, object]:
    try:
        data = read_plain(path, _LARGEST + 1)
        if len(data) > _LARGEST:
            sentence = "This is no configuration: it is larger than 4 MiB."
        else:
            return tomllib.loads(data.decode("utf-8"))
    except FileNotFoundError:
        sentence = "There is no such file; `qmpbackup config example` prints what may stand in it."
    except OSError as error:
        sentence = f"This cannot be read: {error.strerror}."
    except UnicodeDecodeError as error:
        sentence = f"This is no text in UTF-8: byte {error.start} is not."
    except RecursionError:
        sentence = "This is nested too deeply."
    except tomllib.TOMLDecodeError as error:
        sentence = f"This is no TOML: {error}."
    except ValueError:
        sentence = "A number in it is too long."
    faults.append(Fault(str(path), "", sentence))
    return {}


def _add(found: Tables, file: str, name: str, value: object) -> None:
    if name in SINGLE and isinstance(value, dict):
        _place(found, Written(file, name, value), "")
    elif name in NAMED and isinstance(value, dict):
        for own, keys in value.items():
            _add_named(found, file, name, own, keys)
    elif name in {*SINGLE, *NAMED}:
        found.faults.append(Fault(file, name, "This must be a table."))
    else:
        _add_unknown(found, file, name, value)


def _add_named(found: Tables, file: str, kind: str, own: str, keys: object) -> None:
    name = f"{kind}.{own}"
    if not isinstance(keys, dict):
        sentence = f"This belongs into a table with a name, such as [{kind}.NAME]."
        found.faults.append(Fault(file, name, sentence, name))
    elif not is_name(own):
        sentence = "Nothing can be called so: a folder must be able to be."
        found.faults.append(Fault(file, name, sentence, name))
    else:
        _place(found, Written(file, name, keys), name)


def _add_unknown(found: Tables, file: str, name: str, value: object) -> None:
    """A typo in the name of a table of VMs and the like costs that table; in that of one that counts for
    all, all would run with wrong values."""
    meant = close_to(name, (*SINGLE, *NAMED))
    rest = or_did_you_mean(name, (*SINGLE, *NAMED))
    if meant in SINGLE or not isinstance(value, dict):
        found.faults.append(Fault(file, name, f"Unknown table{rest}"))
        return
    for own in value if meant else (None,):
        full = name if own is None else f"{name}.{own}"
        found.faults.append(Fault(file, full, f"Unknown table{rest}", full))


def _place(found: Tables, table: Written, subject: str) -> None:
    other = found.tables.setdefault(table.name, table)
    if other is not table:
        sentence = f"This table stands in {other.file}, too; keep one."
        found.faults.append(Fault(table.file, table.name, sentence, subject))

# SPDX-License-Identifier: Apache-2.0
"""JSON objects that others may have written, taken apart: each member with its type and bound, and none
that is not understood. Must not know what the objects are for.
"""

import re
from collections.abc import Callable
from datetime import datetime
from enum import Enum
from typing import Any, TypeVar

from qmpbackup import bounded_json
from qmpbackup.errors import DamagedError, QmpBackupError, StorageError
from qmpbackup.targets.names import is_point_id

SCHEMA = 1
"""Of every document in a target."""

MOST_MEMORY = 128 * 1024 * 1024
"""Bytes of memory that the values in one may take."""

_LARGEST_SIZE = 2**63 - 1
_LONGEST_TEXT = 65536
_LONGEST_LIST = 65536
_TIME_FORM = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)


T = TypeVar("T")
E = TypeVar("E", bound=Enum)
Json = dict[str, Any]

RESTORE_HINT = "Put back an unharmed copy of it."


def parse_object(data: bytes, name: str) -> Json:
    """Parse one JSON object.

    Raises:
        DamagedError: it is none.
    """
    try:
        content = bounded_json.load(data, MOST_MEMORY, _distinct)
    except ValueError as error:
        raise DamagedError(f"{name} is not valid JSON ({error}).", RESTORE_HINT) from error
    if not isinstance(content, dict):
        raise DamagedError(f"{name} is not a JSON object.", RESTORE_HINT)
    return content


def _distinct(pairs: list[tuple[str, Any]]) -> Json:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return content


class ObjectReader:
    """Takes members out of a JSON object, each with its type and bound; `end` wants none left."""

    def __init__(self, content: Json, name: str) -> None:
        self.content = content
        self._name = name
        self._left = set(content)

    def fail(self, key: str, wanted: str) -> QmpBackupError:
        """The error for a member that is not as the schema says."""
        return DamagedError(f"{self._name}: {key!r} is not {wanted}.", RESTORE_HINT)

    def take(self, key: str) -> Any:
        """The raw member; a missing one is damage."""
        if key not in self.content:
            raise DamagedError(f"{self._name}: {key!r} is missing.", RESTORE_HINT)
        self._left.discard(key)
        return self.content[key]

    def schema(self) -> None:
        """Check the version of the schema."""
        version = self.integer("schema")
        if version > SCHEMA:
            raise StorageError(
                f"{self._name} was written by a newer version of qmpbackup (schema {version}; this "
                f"one knows {SCHEMA}).",
                "Upgrade qmpbackup here.",
            )
        if version != SCHEMA:
            raise self.fail("schema", str(SCHEMA))

    def text(self, key: str, longest: int = _LONGEST_TEXT) -> str:
        """A string of bounded length."""
        return self._text(key, self.take(key), longest)

    def _text(self, key: str, value: object, longest: int) -> str:
        if not isinstance(value, str) or len(value) > longest:
            raise self.fail(key, f"a text of at most {longest} characters")
        return value

    def matching(self, key: str, pattern: re.Pattern[str]) -> str:
        """A string that a pattern matches as a whole."""
        value = self.text(key)
        if not pattern.fullmatch(value):
            raise self.fail(key, f"of the form {pattern.pattern}")
        return value

    def integer(self, key: str) -> int:
        """A size or number, 0 or more."""
        value = self.take(key)
        if type(value) is not int or not 0 <= value <= _LARGEST_SIZE:
            raise self.fail(key, "a number of bytes or a count")
        return value

    def seconds(self, key: str) -> float:
        """A length of time."""
        value = self.take(key)
        if type(value) not in {int, float} or not 0 <= value < 1e12:
            raise self.fail(key, "a length of time in seconds")
        return float(value)

    def time(self, key: str) -> datetime:
        """A time in UTC."""
        text = self.matching(key, _TIME_FORM)
        try:
            return datetime.fromisoformat(text)
        except ValueError:
            raise self.fail(key, "a time like 2026-11-02T03:04:05.000000Z") from None

    def choice(self, key: str, kind: type[E]) -> E:
        """A member of an enumeration."""
        try:
            return kind(self.text(key))
        except ValueError:
            raise self.fail(key, "one of " + ", ".join(str(each.value) for each in kind)) from None

    def point_id(self, key: str) -> str:
        """The id of a point."""
        value = self.text(key)
        if not is_point_id(value):
            raise self.fail(key, "the id of a point")
        return value

    def optional_point_id(self, key: str) -> str | None:
        """The id of a point, or null."""
        return None if self.take(key) is None else self.point_id(key)

    def given(self, key: str) -> bool:
        """Whether a member is there that earlier versions did not write."""
        return key in self.content

    def texts(self, key: str, longest: int = 1024 * 1024) -> tuple[str, ...]:
        """A list of strings."""
        return tuple(self._text(key, each, longest) for each in self._list(key))

    def objects(self, key: str, parse: "Callable[[ObjectReader], T]") -> tuple[T, ...]:
        """A list of objects, each parsed."""
        return tuple(
            self._inside(f"{key}[{number}]", each, parse)
            for number, each in enumerate(self._list(key))
        )

    def member(self, key: str, parse: "Callable[[ObjectReader], T]") -> T:
        """One object, parsed."""
        return self._inside(key, self.take(key), parse)

    def _inside(self, where: str, value: object, parse: "Callable[[ObjectReader], T]") -> T:
        if not isinstance(value, dict):
            raise self.fail(where, "an object")
        inside = ObjectReader(value, f"{self._name}: {where}")
        result = parse(inside)
        inside.end()
        return result

    def _list(self, key: str) -> list[object]:
        value = self.take(key)
        if not isinstance(value, list) or len(value) > _LONGEST_LIST:
            raise self.fail(key, f"a list of at most {_LONGEST_LIST}")
        return value

    def end(self) -> None:
        """Nothing may be left that we have not understood."""
        if self._left:
            unknown = ", ".join(sorted(self._left))
            raise DamagedError(f"{self._name} has unknown members: {unknown}.", RESTORE_HINT)

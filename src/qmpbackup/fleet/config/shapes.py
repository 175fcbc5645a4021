# SPDX-License-Identifier: Apache-2.0
"""Shapes of values: single ones, lists, tables of certain keys, and how each is read.

A value is read as TOML gave it. What is wrong is noted beside its key, so that all of it is said at once;
what is read then does not matter. Must not know which keys there are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from qmpbackup.errors import UsageError
from qmpbackup.plan.guessing import or_did_you_mean

Wrongs = list[tuple[str, str]]
"""What is wrong: keys, and a sentence for each."""

Schema = Mapping[str, Any]

_SHOWN: Final = 60
"""Characters of a wrong value that a sentence shows."""


class Shape(Protocol):
    """How a value is written. `word` says it to people, `schema` to editors."""

    @property
    def word(self) -> str: ...

    @property
    def schema(self) -> Schema: ...

    def read(self, value: object, key: str, wrongs: Wrongs) -> Any:
        """What a value means; what is wrong with it is added to `wrongs`."""


@dataclass(frozen=True, slots=True)
class Plain:
    """A single value; `convert` raises UsageError for what is none."""

    word: str
    schema: Schema
    convert: Callable[[object], Any]

    def read(self, value: object, key: str, wrongs: Wrongs) -> Any:
        """What it means."""
        try:
            return self.convert(value)
        except UsageError as error:
            wrongs.append((key, str(error)))
            return None


@dataclass(frozen=True, slots=True)
class Many:
    """A list of values of one kind; a single one may stand for itself where `or_one` says so."""

    of: Shape
    or_one: bool = False

    @property
    def word(self) -> str:
        """As `list of …`."""
        return f"{self.of.word}, or a list of them" if self.or_one else f"list: {self.of.word}"

    @property
    def schema(self) -> Schema:
        """An array."""
        several = {"type": "array", "items": self.of.schema}
        return {"anyOf": [self.of.schema, several]} if self.or_one else several

    def read(self, value: object, key: str, wrongs: Wrongs) -> Any:
        """All of them, as a tuple."""
        if isinstance(value, list):
            return tuple(
                self.of.read(each, f"{key}[{index}]", wrongs) for index, each in enumerate(value)
            )
        if self.or_one:
            return (self.of.read(value, key, wrongs),)
        wrongs.append((key, f'Here belongs a list, such as ["…"], not {named(value)}.'))
        return ()


@dataclass(frozen=True, slots=True)
class Row:
    """A key of a table: its kind, its default as TOML would have it (None: there is none), what it means,
    and where its default says too little, an example. `member` is what it is called once read."""

    name: str
    kind: Shape
    default: Any
    sentence: str
    example: Any = None
    is_required: bool = False
    member: str = ""

    @property
    def attribute(self) -> str:
        """Its name as a member."""
        return self.member or self.name


@dataclass(frozen=True, slots=True)
class Keyed:
    """A table of certain keys, which `build` makes a value of. Keys that are not there have their defaults."""

    build: Callable[..., Any]
    keys: tuple[Row, ...]
    word: str = "table"

    @property
    def schema(self) -> Schema:
        """An object without other members."""
        return {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                each.name: {"description": each.sentence, **each.kind.schema} for each in self.keys
            },
        }

    @property
    def default(self) -> dict[str, Any]:
        """What stands in it where nobody writes anything."""
        return {each.name: each.default for each in self.keys if each.default is not None}

    def read(self, value: object, key: str, wrongs: Wrongs) -> Any:
        """What `build` makes of it; None where something is wrong."""
        if not isinstance(value, dict):
            names = ", ".join(each.name for each in self.keys)
            wrongs.append((key, f"Here belongs a table with {names}, not {named(value)}."))
            return None
        before = len(wrongs)
        members = read_keys(self.keys, value, key, wrongs)
        return self.build(**members) if len(wrongs) == before else None


def read_keys(
    keys: tuple[Row, ...], table: Mapping[str, object], at: str, wrongs: Wrongs
) -> dict[str, Any]:
    """What the keys of a table mean, those that are not there by their defaults; named as members."""
    known = {each.name: each for each in keys}
    prefix = f"{at}." if at else ""
    for name in table:
        if name not in known:
            wrongs.append((f"{prefix}{name}", f"Unknown key{or_did_you_mean(name, known)}"))
    members = {}
    for each in keys:
        value = table.get(each.name, each.default)
        if value is not None:
            members[each.attribute] = each.kind.read(value, f"{prefix}{each.name}", wrongs)
        elif each.is_required:
            wrongs.append((f"{prefix}{each.name}", f"This is missing: {each.sentence}"))
    return members


@dataclass(frozen=True, slots=True)
class Mapped:
    """A table of any keys with values of one kind."""

    of: Shape
    check: Callable[[str, object], str] = field(default=lambda _name, _value: "")
    """What is wrong with a key and its value together, as a sentence."""
    word: str = "table of names and values"

    @property
    def schema(self) -> Schema:
        """An object."""
        return {"type": "object", "additionalProperties": self.of.schema}

    def read(self, value: object, key: str, wrongs: Wrongs) -> Any:
        """All of it."""
        if not isinstance(value, dict):
            wrongs.append((key, f"Here belongs a table, not {named(value)}."))
            return {}
        found = {}
        for name, each in value.items():
            problem = self.check(name, each)
            if problem:
                wrongs.append((f"{key}.{name}", problem))
            else:
                found[name] = self.of.read(each, f"{key}.{name}", wrongs)
        return found


def named(value: object) -> str:
    """What a value is, without saying it."""
    match value:
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case dict():
            return "a table"
        case _:
            return "a date or time (text stands in quotes)"


def quoted(value: str) -> str:
    """A wrong value for a sentence, at most so long as a line bears."""
    text = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}…"
    return f'"{text}"'


@dataclass(frozen=True, slots=True)
class OrWord:
    """A word that stands for None, or values of another kind."""

    literal: str
    other: Shape

    @property
    def word(self) -> str:
        """As `auto`, or …."""
        return f"`{self.literal}`, or {self.other.word}"

    @property
    def schema(self) -> Schema:
        """The one or the other."""
        return {"anyOf": [{"const": self.literal}, self.other.schema]}

    def read(self, value: object, key: str, wrongs: Wrongs) -> Any:
        """What it means."""
        return None if value == self.literal else self.other.read(value, key, wrongs)


def text_of(value: object) -> str:
    """A value that must be text on one line.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(value, str):
        raise UsageError(f"Here belongs text in quotes, not {named(value)}.")
    if not value.isprintable():
        raise UsageError("This text has characters that cannot be printed.")
    return value

# SPDX-License-Identifier: Apache-2.0
"""Kinds of single values: how each is written, what it then is, and the sentence for what is none.

Must not know which keys there are. No sentence shows a value where a secret may stand.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from qmpbackup.errors import UsageError
from qmpbackup.fleet.config.shapes import (
    Many,
    Plain,
    Row,
    Schema,
    Shape,
    Wrongs,
    named,
    quoted,
    read_keys,
    text_of,
)
from qmpbackup.fleet.settings import Secret
from qmpbackup.plan import calendar, retention
from qmpbackup.plan.guessing import or_did_you_mean
from qmpbackup.plan.sizes import parse_size

_SPAN: Final = re.compile(r"(?:\d{1,9}(?:\.\d{1,3})?\s*(?:ms|s|m|h|d|w)\s*)+", re.ASCII)
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)", re.ASCII)
_LONGEST: Final = 36525 * 86400.0
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_SHARE: Final = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)\s*%", re.ASCII)
_LARGEST_SIZE: Final = 2**63 - 1
PLACEHOLDERS: Final = ("vm", "group", "host")
_BRACES: Final = re.compile(r"\{([^{}]*)\}")


def with_names(text: str) -> str:
    """Text in which `{vm}`, `{group}` and `{host}` stand for names, and nothing else stands in braces.

    Raises:
        UsageError: something else does.
    """
    for found in _BRACES.findall(text):
        if found not in PLACEHOLDERS:
            raise UsageError(f"{{{found}}} stands for nothing; {{vm}}, {{group}} and {{host}} do.")
    return text


def _some_text(value: object) -> str:
    text = text_of(value)
    if not text.strip():
        raise UsageError("This is empty.")
    return text


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"Here belongs true or false, not {named(value)}.")
    return value


def choice(words: Iterable[str], make: Callable[[str], Any] = str) -> Plain:
    """One of some words, and what `make` makes of it."""
    known = tuple(map(str, words))

    def convert(value: object) -> Any:
        if (text := text_of(value)) not in known:
            rest = or_did_you_mean(text, known)
            raise UsageError(f"{quoted(text)} is none of {', '.join(known)}{rest}")
        return make(text)

    return Plain(" · ".join(f"`{each}`" for each in known), {"enum": list(known)}, convert)


def number(least: int, most: int) -> Plain:
    """A whole number."""

    def convert(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise UsageError(f"Here belongs a number from {least} to {most}, not {named(value)}.")
        if not least <= value <= most:
            raise UsageError(f"This must be a number from {least} to {most}.")
        return value

    schema = {"type": "integer", "minimum": least, "maximum": most}
    return Plain(f"number, {least} to {most}", schema, convert)


def parse_span(text: str) -> float:
    """Seconds from `10m`, `1h30m`, `400d`.

    Raises:
        UsageError: it is no such time.
    """
    if not _SPAN.fullmatch(text.strip()):
        raise UsageError(
            f"{quoted(text)} is no length of time; write it with ms, s, m, h, d or w, as in 10m or 7d."
        )
    seconds = sum(float(count) * _UNITS[unit] for count, unit in _PART.findall(text))
    if seconds > _LONGEST:
        raise UsageError(
            f"{quoted(text)} is too long; the longest time is a hundred years, 36525d."
        )
    return seconds


def span(empty: float | None = None) -> Plain:
    """A length of time, in seconds; `empty` is what no text at all means, where that is allowed."""

    def convert(value: object) -> float:
        text = text_of(value)
        if not text and empty is not None:
            return empty
        return parse_span(text)

    return Plain("length of time (`90s`, `10m`, `12h`, `7d`)", {"type": "string"}, convert)


def _size(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        try:
            size = parse_size(text_of(value))
        except UsageError:
            shown = quoted(value) if isinstance(value, str) else named(value)
            raise UsageError(
                f'Not a size: {shown}. Write bytes, or as in "20M", with K, M, G or T.'
            ) from None
    if not 0 <= size <= _LARGEST_SIZE:
        raise UsageError("This size is below 0, or more than QEMU can count.")
    return size


def _rate(value: object) -> int:
    return _size(value.removesuffix("/s") if isinstance(value, str) else value)


def _share(value: object) -> float:
    found = _SHARE.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None or float(found[1]) > 100:
        shown = quoted(value) if isinstance(value, str) else named(value)
        raise UsageError(f'{shown} is no share between 0% and 100%; write it as in "5%".')
    return float(found[1]) / 100


def _times(value: object) -> str:
    text = text_of(value)
    if text:
        calendar.parse(text)
    return text


def _window(value: object) -> str:
    text = text_of(value)
    calendar.parse_window(text)
    return text


def _count(value: object) -> int:
    if value == "unlimited" or (type(value) is int and value == retention.UNLIMITED):
        return retention.UNLIMITED
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9:
        return value
    raise UsageError('Here belongs a number of points, or "unlimited".')


def _within(value: object) -> str:
    text = text_of(value)
    if text:
        retention.parse_duration(text)
    return text


def one(word: str, convert: Callable[[object], Any]) -> Plain:
    """A single value that is written as text."""
    return Plain(word, {"type": "string"}, convert)


TEXT: Final = one("text", text_of)
SOME_TEXT: Final = one("text", _some_text)
FLAG: Final = Plain("`true` or `false`", {"type": "boolean"}, _flag)
_NUMBER_OR_TEXT: Final = {"type": ["integer", "string"]}
SIZE: Final = Plain("bytes, or as in `20M`", _NUMBER_OR_TEXT, _size)
RATE: Final = Plain("bytes a second, or as in `20M`", _NUMBER_OR_TEXT, _rate)
SHARE: Final = one("share (`5%`)", _share)
ON_CALENDAR: Final = one("time as systemd writes it (`02:30`, `*:00`, `Mon..Fri 20:00`)", _times)
WINDOW: Final = one("hours (`20:00-06:00`, `Mon..Fri 08:00-18:00`)", _window)
COUNT: Final = Plain("number, or `unlimited`", _NUMBER_OR_TEXT, _count)
WITHIN: Final = one("as `--keep-within` (`1y5m7d2h`)", _within)


@dataclass(frozen=True, slots=True)
class _Hidden:
    """Where a secret is. Nothing of a wrong value is ever said."""

    word: str = 'secret (`{ credential = "…" }`, `{ file = "/…" }` or `{ command = ["…"] }`)'

    @property
    def schema(self) -> Schema:
        """A table with one of its three keys."""
        ways = {
            "credential": {"type": "string"},
            "file": {"type": "string"},
            "command": {"type": "array", "items": {"type": "string"}},
        }
        one_of = [
            {"type": "object", "properties": {name: way}, "required": [name]}
            for name, way in ways.items()
        ]
        return {"oneOf": [{**each, "additionalProperties": False} for each in one_of]}

    def read(self, value: object, key: str, wrongs: Wrongs) -> Secret | None:
        """Where it is."""
        name = re.sub(r"[^A-Za-z0-9]+", "-", key.removeprefix("target.").removesuffix(".password"))
        if isinstance(value, str):
            wrongs.append((key, f'A secret stands in the file; use {{ credential = "{name}" }}.'))
            return None
        if not isinstance(value, dict) or len(value) != 1:
            said = (
                f'Write one of {{ credential = "{name}" }}, {{ file = … }}, {{ command = [ … ] }}.'
            )
            wrongs.append((key, said))
            return None
        before = len(wrongs)
        members = read_keys(_WAYS, value, key, wrongs)
        return Secret(**members) if len(wrongs) == before else None


def _credential(value: object) -> str:
    if not isinstance(value, str) or not _CREDENTIAL.fullmatch(value):
        raise UsageError(
            "A credential has a name of letters, digits, dots, dashes and underscores."
        )
    return value


def absolute(value: object) -> str:
    """A path that does not hang on where a command was called.

    Raises:
        UsageError: it is none.
    """
    text = _some_text(value)
    if not text.startswith("/"):
        raise UsageError("This path must begin with a slash.")
    return text


_CREDENTIAL: Final = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,255}", re.ASCII)
_WORD: Final = one("word", text_of)
COMMAND: Final = Many(_WORD)
PATH: Final = one("path", absolute)
_WAYS: Final = (
    Row(
        "credential",
        one("name", _credential),
        None,
        "A credential of systemd's, or a file of ours.",
    ),
    Row("file", PATH, None, "A file that holds it."),
    Row("command", COMMAND, None, "A command that prints it."),
)
SECRET: Final[Shape] = _Hidden()


@dataclass(frozen=True, slots=True)
class OrSecret:
    """Text of some kind that is no secret, or where a secret is."""

    text: Plain

    @property
    def word(self) -> str:
        """As `…, or a secret`."""
        return f"{self.text.word}, or a secret"

    @property
    def schema(self) -> Schema:
        """The one or the other."""
        return {"anyOf": [self.text.schema, SECRET.schema]}

    def read(self, value: object, key: str, wrongs: Wrongs) -> Any:
        """The text, or where the secret is."""
        kind = self.text if isinstance(value, str) else SECRET
        return kind.read(value, key, wrongs)

# SPDX-License-Identifier: Apache-2.0
"""JSON as Go writes it, read with distrust.

Trees are named by the hash of their JSON, so it has to be Go's to the byte: no spaces, `<`, `>`, `&`,
U+2028 and U+2029 escaped, times as RFC 3339 with as many digits of a second as are not zero. Reading
takes what any writer may have put there and says `DamagedError` to all that is not of the form asked
for; numbers, depth and types are checked before anybody computes with them. Knows no object of the
format.
"""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from typing import Final

from qmpbackup import bounded_json
from qmpbackup.errors import DamagedError

_MOST_MEMORY: Final = 96 << 20
"""Bytes of memory that the values in one document may take: some 20,000 nodes of a tree."""

UINT32: Final = (1 << 32) - 1
UINT64: Final = (1 << 64) - 1

_ESCAPES: Final = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"} | {
    8: "\\u0008",  # newer Go has the short forms for these two; every reader knows both
    12: "\\u000c",
}
_SURROGATE = re.compile("[\ud800-\udfff]")
_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:Z|([+-])(\d\d):(\d\d))", re.ASCII
)
_YEAR_0: Final = datetime(1, 1, 1, tzinfo=UTC)


def text(value: str) -> str:
    """A JSON string with its quotes; what is no Unicode becomes U+FFFD."""
    if value.isalnum() and value.isascii():
        return f'"{value}"'
    return json.dumps(_SURROGATE.sub("\ufffd", value), ensure_ascii=False).translate(_ESCAPES)


def dump(members: Mapping[str, object]) -> str:
    """A JSON object with these members in their order. Values: None, bool, int, float, str, datetime,
    and lists, tuples and mappings of them."""
    return "{" + ",".join(f"{text(name)}:{_value(value)}" for name, value in members.items()) + "}"


def _value(value: object) -> str:
    if isinstance(value, str):
        return text(value)
    if isinstance(value, datetime):
        return text(time(value))
    if isinstance(value, Mapping):
        return dump(value)
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_value, value)) + "]"
    return json.dumps(value, allow_nan=False)


def time(value: datetime) -> str:
    """An aware datetime as Go writes one."""
    offset = value.utcoffset()
    if offset is None:
        raise ValueError("a time without its offset from UTC")
    minutes = round(offset / timedelta(minutes=1))
    sign = "-" if minutes < 0 else "+"
    zone = f"{sign}{abs(minutes) // 60:02}:{abs(minutes) % 60:02}" if minutes else "Z"
    fraction = f".{value.microsecond:06}".rstrip("0.") if value.microsecond else ""
    return f"{value.replace(microsecond=0, tzinfo=None).isoformat()}{fraction}{zone}"


def load(data: bytes, what: str) -> dict[str, object]:
    """The members of a JSON object.

    Raises:
        DamagedError: it is none.
    """
    try:
        found = bounded_json.load(data, _MOST_MEMORY)
    except bounded_json.TooLarge as error:
        raise damaged(what, "it holds more than it may") from error
    except ValueError as error:
        raise DamagedError(f"{what} is damaged: it is no JSON.") from error
    if not isinstance(found, dict):
        raise damaged(what, "it is no JSON object")
    return found


def damaged(what: str, why: str) -> DamagedError:
    """The error for an object of another form."""
    return DamagedError(f"{what} is damaged: {why}.")


class Members:
    """The members of a JSON object, each asked for with the type it must have.

    A member that is missing or null is the type's empty value, as Go has it. All methods raise
    `DamagedError` for a member of another type.
    """

    def __init__(self, members: Mapping[str, object], what: str) -> None:
        self._members = members
        self._what = what

    def _wrong(self, name: str) -> DamagedError:
        return damaged(self._what, f"its {name} has a wrong form")

    def string(self, name: str) -> str:
        """A string; what is no Unicode in it becomes U+FFFD."""
        value = self._members.get(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self._wrong(name)
        return _SURROGATE.sub("\ufffd", value)

    def strings(self, name: str) -> tuple[str, ...]:
        """A list of strings."""
        value = self._members.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self._wrong(name)
        return tuple(_SURROGATE.sub("\ufffd", each) for each in value)

    def number(self, name: str, most: int = UINT64, least: int = 0) -> int:
        """A whole number within limits."""
        value = self._members.get(name)
        if value is None:
            return 0
        if type(value) is not int or not least <= value <= most:
            raise self._wrong(name)
        return value

    def boolean(self, name: str) -> bool:
        """True or false."""
        value = self._members.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self._wrong(name)
        return value

    def time(self, name: str) -> datetime:
        """A time; those before the year 1 become its beginning, as Go's zero time is."""
        value = self._members.get(name)
        if value is None:
            return _YEAR_0
        match = _TIME.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise self._wrong(name)
        try:
            return _datetime(match)
        except (ValueError, OverflowError) as error:
            raise self._wrong(name) from error

    def id(self, name: str) -> bytes | None:
        """An id, given as 64 hexadecimal digits; None where there is none."""
        value = self._members.get(name)
        if value is None:
            return None
        found = parse_id(value) if isinstance(value, str) else None
        if found is None:
            raise self._wrong(name)
        return found

    def base64(self, name: str) -> bytes:
        """Bytes, given as Base64."""
        import base64
        import binascii

        value = self._members.get(name)
        if value is None:
            return b""
        if not isinstance(value, str):
            raise self._wrong(name)
        try:
            return base64.b64decode(value.encode("ascii"), validate=True)
        except (UnicodeEncodeError, binascii.Error) as error:
            raise self._wrong(name) from error

    def object(self, name: str) -> dict[str, object] | None:
        """A JSON object; None where there is none."""
        value = self._members.get(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name)
        return value


def parse_id(value: str) -> bytes | None:
    """The 32 bytes that 64 hexadecimal digits say, or None."""
    try:
        found = bytes.fromhex(value) if len(value) == 64 else b""
    except ValueError:
        return None
    return found if len(found) == 32 else None


def _datetime(match: re.Match[str]) -> datetime:
    year, month, day, hour, minute, second = (int(each) for each in match.groups()[:6])
    if year == 0:
        return _YEAR_0
    micros = int((match[7] or "").ljust(6, "0")[:6])
    zone = UTC
    if match[8] and (match[9], match[10]) != ("00", "00"):
        offset = timedelta(hours=int(match[9]), minutes=int(match[10]))
        zone = timezone(-offset if match[8] == "-" else offset)
    # Another program's clock, at the ends of the calendar, must not trip who compares later.
    moment = datetime(year, month, day, hour, minute, second, micros, tzinfo=zone)
    moment.astimezone(UTC)
    return moment

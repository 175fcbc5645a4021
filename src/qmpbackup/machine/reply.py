# SPDX-License-Identifier: Apache-2.0
"""Typed access to what QEMU sent. Replies are input like any other: wrong types end in exit 6."""

import re
from collections.abc import Iterator, Mapping

from qmpbackup.errors import MonitorProtocolError

_NO_NAME = re.compile("[\0\ud800-\udfff]")
_LARGEST = 2**63 - 1


class Reply:
    """A JSON object from QEMU, read member by member with the type one expects.

    Every accessor raises `MonitorProtocolError` when a member is missing or of another type; those
    that take a `default` return it for a missing member only.
    """

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, Mapping):
            raise _wrong(where, "an object", value)
        self._value: Mapping[object, object] = value
        self._where = where

    def __contains__(self, member: str) -> bool:
        return member in self._value

    def text(self, member: str, default: str | None = None) -> str:
        """A string without NUL, which no name of QEMU's contains, nor half a character. Line ends and
        the like may be in it, as in the id of a device: whoever shows it escapes it."""
        value = self._member(member, default)
        if not isinstance(value, str) or _NO_NAME.search(value):
            raise _wrong(f"{self._where}.{member}", "a text", value)
        return value

    def integer(self, member: str, default: int | None = None) -> int:
        """An integer that is not negative and fits into QEMU's own, which have 64 bits with a sign."""
        value = self._member(member, default)
        if type(value) is not int or not 0 <= value <= _LARGEST:
            raise _wrong(f"{self._where}.{member}", "a number", value)
        return value

    def boolean(self, member: str, default: bool | None = None) -> bool:
        """A truth value."""
        value = self._member(member, default)
        if not isinstance(value, bool):
            raise _wrong(f"{self._where}.{member}", "a truth value", value)
        return value

    def nested(self, member: str) -> "Reply":
        """An object."""
        return Reply(self._member(member, None), f"{self._where}.{member}")

    def optional(self, member: str) -> "Reply | None":
        """An object, or `None` where the member is missing."""
        return self.nested(member) if member in self._value else None

    def objects(self, member: str) -> Iterator["Reply"]:
        """The objects of an array; a missing array is an empty one."""
        return objects(self._value.get(member, []), f"{self._where}.{member}")

    def texts(self, member: str) -> list[str]:
        """The strings of an array; a missing array is an empty one."""
        value = self._value.get(member, [])
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise _wrong(f"{self._where}.{member}", "an array of texts", value)
        return value

    def _member(self, member: str, default: object) -> object:
        value = self._value.get(member, default)
        if value is None:
            raise _wrong(f"{self._where}.{member}", "present", value)
        return value


def objects(value: object, where: str) -> Iterator[Reply]:
    """The objects of an array that QEMU sent."""
    if not isinstance(value, list):
        raise _wrong(where, "an array", value)
    return (Reply(item, f"{where}[{index}]") for index, item in enumerate(value))


def one_line(text: str) -> str:
    """Text from QEMU or from a guest, made fit for one line of a terminal."""
    text = " ".join(text.split())[:500]
    return "".join(character if character.isprintable() else "?" for character in text)


def _wrong(where: str, expected: str, value: object) -> MonitorProtocolError:
    shown = repr(value)[:80]
    return MonitorProtocolError(
        f"The monitor's reply is not understood: {where} should be {expected}, but is {shown}.",
        "Check that the socket is a QMP monitor of QEMU.",
    )

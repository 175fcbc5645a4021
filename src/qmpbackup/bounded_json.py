# SPDX-License-Identifier: Apache-2.0
"""JSON from strangers: how much memory its values will take is reckoned before any of them is made.

A document of a few bytes a value (`[[],[],…`, `{"":{"":…`) takes thirty times its length once parsed,
so bounds on lengths alone bound nothing. Counting the characters that begin values costs a fraction
of parsing. Must not know whose documents these are.
"""

import json
from collections.abc import Callable
from typing import Any, Final, NoReturn

# What CPython takes for each, measured and rounded up: the object itself, and its place in another.
_OBJECT: Final = 240
_ARRAY: Final = 72
_VALUE: Final = 80
_MEMBER: Final = 120
_WIDEST: Final = 4
"""Bytes of a character, in all of a text that holds a single rare one."""


class TooLarge(ValueError):
    """Its values would take more memory than they may."""


def cost(data: bytes | bytearray) -> int:
    """At most how many bytes of memory the values of a document take, beside the document."""
    is_narrow = data.isascii() and b"\\u" not in data
    values = (
        _OBJECT * data.count(b"{")
        + _ARRAY * data.count(b"[")
        + _VALUE * (data.count(b",") + 1)
        + _MEMBER * data.count(b":")
    )
    return values + len(data) * (1 if is_narrow else 2 * _WIDEST)


def load(
    data: bytes | bytearray,
    most: int,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """The value of a document in UTF-8 whose values take no more memory than `most` bytes.

    `pairs` makes objects of their members, where something else than a dictionary is wanted.

    Raises:
        TooLarge: they would take more.
        ValueError: this is no JSON, is nested too deeply, or has a number that nothing can hold.
    """
    taken = cost(data)
    if taken > most:
        raise TooLarge(f"its values would take {taken} bytes of memory")
    try:
        return json.loads(data.decode(), parse_constant=_refuse, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")

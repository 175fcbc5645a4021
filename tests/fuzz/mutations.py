# SPDX-License-Identifier: Apache-2.0
"""Valid documents made strange: values of other kinds in any place, and bytes that fell over."""

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

Place = tuple[str | int, ...]


class Raw(str):
    """Text that stands in a document as it is, whether or not that makes it one."""

    __slots__ = ()


STRANGE: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    2**31,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    Raw("1e999"),
    Raw("-1e999"),
    Raw("NaN"),
    Raw("9" * 5000),
    Raw("[" * 3000 + "]" * 3000),
    Raw('{"":' * 500 + "0" + "}" * 500),
    Raw('"\\ud800"'),
    Raw('"\\u0000"'),
    Raw('"\\ud83d\\ude00"'),
    Raw('"' + "a" * 70_000 + '"'),
    Raw("[" + "[]," * 20_000 + "0]"),
    Raw('{"a":1,"a":2}'),
    Raw(""),
    "",
    "x",
    "..",
    "../../etc/passwd",
    "/",
    "a\nb",
    "\x1b[2J",
    "0" * 64,
    "-0",
    "é" * 40,
    "blake3:" + "0" * 64,
    "9999-99-99T99:99:99Z",
    "0001-01-01T00:00:00+23:59",
    [],
    [[]],
    {},
    {"x": 1},
)


def places(value: Any) -> Iterator[Place]:
    """The paths of all values inside a value, itself first."""
    yield ()
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield from ((key, *rest) for rest in places(item))


@st.composite
def documents(draw: st.DrawFn, value: Any) -> Any:
    """A value with up to three places in it replaced, removed or doubled; `Raw` text may be in it."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(places(value))))
        if not place:
            return copy.deepcopy(draw(st.sampled_from(STRANGE)))
        inner = value
        for key in place[:-1]:
            inner = inner[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "double"]))
        if action == "remove":
            del inner[place[-1]]
        elif action == "double" and isinstance(inner, list):
            inner.append(copy.deepcopy(inner[int(place[-1])]))
        else:
            inner[place[-1]] = copy.deepcopy(draw(st.sampled_from(STRANGE)))
    return value


def rendered(value: Any) -> bytes:
    """A document as text, `Raw` as it is."""
    if isinstance(value, Raw):
        return value.encode()
    if isinstance(value, dict):
        members = (json.dumps(key).encode() + b":" + rendered(each) for key, each in value.items())
        return b"{" + b",".join(members) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(map(rendered, value)) + b"]"
    return json.dumps(value).encode()


@st.composite
def spoilt(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes of which some fell over, went missing, came twice, or became a number at a limit."""
    spoiled = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(spoiled)))
        length = draw(st.integers(0, 64))
        action = draw(st.sampled_from(["flip", "cut", "end", "double", "many", "number", "insert"]))
        piece = bytes(spoiled[at : at + length])
        if action == "flip" and at < len(spoiled):
            spoiled[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "cut":
            del spoiled[at : at + length]
        elif action == "end":
            del spoiled[at:]
        elif action == "double":
            spoiled[at:at] = piece
        elif action == "many":
            spoiled[at:at] = piece * draw(st.sampled_from([10, 1000]))
        elif action == "number":
            size = draw(st.sampled_from([1, 2, 4, 8]))
            number = draw(st.sampled_from([0, 1, (1 << 8 * size) - 1, 1 << (8 * size - 1)]))
            spoiled[at : at + size] = number.to_bytes(
                size, draw(st.sampled_from(["big", "little"]))
            )
        else:
            spoiled[at:at] = draw(st.binary(max_size=16))
    return bytes(spoiled)


def texts(samples: list[Any]) -> st.SearchStrategy[bytes]:
    """JSON documents like the samples: strange in their values, their bytes, or both."""
    made = st.sampled_from(samples).flatmap(documents).map(rendered)
    return st.one_of(made, made, made.flatmap(spoilt))


def blobs(samples: list[bytes]) -> st.SearchStrategy[bytes]:
    """Bytes like the samples."""
    return st.sampled_from(samples).flatmap(spoilt)


def words(samples: list[str]) -> st.SearchStrategy[str]:
    """Text like the samples, half characters among it."""
    pieces = st.sampled_from(
        [*samples, "", "\0", "\ud800", "\udcff", "é", "\n", "=", ":", "//", "@"]
    )
    return st.lists(pieces | st.text(max_size=4), min_size=1, max_size=6).map(
        "".join
    ) | st.sampled_from(samples)

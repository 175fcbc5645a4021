# SPDX-License-Identifier: Apache-2.0
"""Index files: which packs there are, and which blobs lie where in them, as JSON.

The form is restic's (doc/design.rst, "Indexing"); members nobody told us of are read past. What
`supersedes` says is written where asked and read past, as restic does since it gave the member up:
an index file is in force as long as it is there. Knows nothing of how index files are sealed.
"""

import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from json.decoder import JSONDecoder
from typing import Any, Final

from qmpbackup.errors import DamagedError
from qmpbackup.restic.pack import BlobType, PackedBlob, check_blob
from qmpbackup.restic.storage.interface import is_name

LARGEST: Final = 8 << 20
"""Bytes below which an index file stays (restic, doc/design.rst)."""

MOST_BLOBS: Final = 50_000
"""Blobs after which restic begins another index file (internal/repository/index/index.go)."""

_TYPES: Final = {"data": BlobType.DATA, "tree": BlobType.TREE}
_NAMES: Final = {type_: name for name, type_ in _TYPES.items()}
_SPACE = re.compile(r"[ \t\r\n]*")

Pack = tuple[str, Sequence[PackedBlob]]


def encode(packs: Iterable[Pack], supersedes: Iterable[str] = ()) -> Iterator[bytes]:
    """JSON documents, each to be saved as an index file, that together name all the packs.

    A pack is never split: one with more than 40 000 blobs may make a document longer than `LARGEST`.
    """
    old = ",".join(f'"{name}"' for name in supersedes)
    start = f'{{"supersedes":[{old}],"packs":[' if old else '{"packs":['
    waiting: list[str] = []
    size = blobs = 0
    for name, content in packs:
        text = _encode_pack(name, content)
        full = len(start) + size + len(text) + 3 >= LARGEST or blobs + len(content) > MOST_BLOBS
        if waiting and full:
            yield f"{start}{','.join(waiting)}]}}".encode()
            start, waiting, size, blobs = '{"packs":[', [], 0, 0
        waiting.append(text)
        size += len(text) + 1
        blobs += len(content)
    if waiting or old:
        yield f"{start}{','.join(waiting)}]}}".encode()


def _encode_pack(name: str, blobs: Sequence[PackedBlob]) -> str:
    return f'{{"id":"{name}","blobs":[{",".join(map(_encode_blob, blobs))}]}}'


def _encode_blob(blob: PackedBlob) -> str:
    raw = f',"uncompressed_length":{blob.raw_length}' if blob.raw_length else ""
    return (
        f'{{"id":"{blob.id.hex()}","type":"{_NAMES[blob.type]}","offset":{blob.offset}'
        f',"length":{blob.length}{raw}}}'
    )


def parse(data: bytes, name: str) -> Iterator[tuple[str, list[PackedBlob]]]:
    """The packs of an index file, one at a time: no more than one is in memory beside the document.

    A pack may come several times, with the same or with other blobs.

    Raises:
        DamagedError: this is no index.
    """
    what = f"The index {name}"
    try:
        for value in _packs(data.decode()):
            yield _pack(value, what)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{what} is damaged: {error}.") from error


def _packs(text: str) -> Iterator[object]:
    """The members of the outer object's `packs`; other members are parsed and dropped."""
    decoder = JSONDecoder()
    position = _expect(text, 0, "{")
    while (position := _skip(text, position)) < len(text) and text[position] != "}":
        key, position = decoder.raw_decode(text, position)
        if not isinstance(key, str):
            raise ValueError("a name of a member is no string")  # noqa: TRY004 - JSON's own error
        position = _skip(text, _expect(text, position, ":"))
        if key == "packs" and text[position : position + 1] == "[":
            position = yield from _array(decoder, text, position)
        else:
            value, position = decoder.raw_decode(text, position)
            if key == "packs" and value is not None:  # Go writes an empty list as null
                raise ValueError("its packs are no list")
        position = _skip(text, position)
        if text[position : position + 1] == ",":
            position += 1
        elif text[position : position + 1] != "}":
            break
    if _skip(text, _expect(text, position, "}")) != len(text):
        raise ValueError("there is more behind its end")


def _array(decoder: JSONDecoder, text: str, position: int) -> Generator[object, None, int]:
    """The members of a list; returns where it ends."""
    position = _skip(text, position + 1)
    if text[position : position + 1] == "]":
        return position + 1
    while True:
        value, position = decoder.raw_decode(text, _skip(text, position))
        yield value
        position = _skip(text, position)
        if text[position : position + 1] == "]":
            return position + 1
        position = _expect(text, position, ",")


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _expect(text: str, position: int, character: str) -> int:
    position = _skip(text, position)
    if text[position : position + 1] != character:
        raise ValueError(f"{character} is missing at {position}")
    return position + 1


def _pack(value: object, what: str) -> tuple[str, list[PackedBlob]]:
    if not isinstance(value, dict):
        raise ValueError("a pack is no object")  # noqa: TRY004 - the document's fault, not the code's
    name, blobs = value.get("id"), value.get("blobs")
    if not isinstance(name, str) or not is_name(name):
        raise ValueError("the name of a pack is none")
    if blobs is None:
        blobs = []
    if not isinstance(blobs, list):
        raise ValueError("the blobs of a pack are no list")  # noqa: TRY004 - as above
    return name, [_blob(blob, what) for blob in blobs]


def _blob(value: Any, what: str) -> PackedBlob:
    try:
        id_, type_ = bytes.fromhex(value["id"]), _TYPES[value["type"]]
        offset, length = value["offset"], value["length"]
        raw_length = value.get("uncompressed_length", 0)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("a blob has not the members it must have") from error
    # No bool, no float; and fromhex reads past spaces.
    if len(id_) != 32 or not (type(offset) is type(length) is type(raw_length) is int):
        raise ValueError("a member of a blob has a wrong form")
    blob = PackedBlob(type_, id_, offset, length, raw_length)
    check_blob(blob, what, compressed=raw_length != 0)
    return blob

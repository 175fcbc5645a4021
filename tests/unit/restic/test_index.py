# SPDX-License-Identifier: Apache-2.0
"""Index files: what is written is read, and whatever is no index is damage, never anything worse."""

import json
import os
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpbackup.errors import DamagedError
from qmpbackup.restic.crypto import OVERHEAD
from qmpbackup.restic.index import index_file
from qmpbackup.restic.pack import BlobType, PackedBlob

NAME = "5a" * 32
IDS = st.binary(min_size=32, max_size=32)
BLOBS = st.builds(
    PackedBlob,
    st.sampled_from(BlobType),
    IDS,
    st.integers(0, 1 << 31),
    st.integers(OVERHEAD + 1, 64 << 20),
    st.just(0) | st.integers(32 << 20, 128 << 20),
)
PACKS = st.lists(st.tuples(IDS.map(bytes.hex), st.lists(BLOBS, max_size=5)), min_size=1, max_size=5)
GOOD = {
    "id": "ab" * 32,
    "type": "data",
    "offset": 0,
    "length": 100,
    "uncompressed_length": 1000,
}


def parse(data: bytes) -> list[tuple[str, list[PackedBlob]]]:
    return list(index_file.parse(data, NAME))


def with_blob(**changes: object) -> bytes:
    return json.dumps({"packs": [{"id": "cd" * 32, "blobs": [GOOD | changes]}]}).encode()


@given(PACKS, st.lists(IDS.map(bytes.hex), max_size=3))
def test_what_was_written_is_read(
    packs: list[tuple[str, list[PackedBlob]]], old: list[str]
) -> None:
    (document,) = index_file.encode(packs, old)
    assert parse(document) == packs
    whole = json.loads(document)
    assert whole.get("supersedes", []) == old
    for _, pack in zip(packs, whole["packs"], strict=True):
        for blob in pack["blobs"]:
            assert blob.get("uncompressed_length") != 0, "restic leaves it out where there is none"


def test_nothing_to_write_makes_no_file() -> None:
    assert list(index_file.encode([])) == []


def test_files_stay_below_8_mib_and_no_pack_is_split() -> None:
    blobs = [
        PackedBlob(BlobType.DATA, os.urandom(32), n * 4_000_000, 4_000_000, 4_100_000)
        for n in range(1000)
    ]
    packs = [(os.urandom(32).hex(), blobs) for _ in range(120)]
    documents = list(index_file.encode(packs, ["ef" * 32]))
    assert all(len(document) < 8 << 20 for document in documents)
    assert [pack for document in documents for pack in parse(document)] == packs
    assert "supersedes" in json.loads(documents[0])
    assert "supersedes" not in json.loads(documents[1])


@pytest.mark.parametrize(
    "document",
    [
        b'{"packs":[]}',
        b'{"packs":null}',
        b"{}",
        b' {\n"supersedes": ["x"], "new": {"a": [1, {"packs": 3}]} , "packs" : [ ] } ',
    ],
)
def test_an_index_may_be_empty_and_may_say_things_nobody_told_us_of(document: bytes) -> None:
    assert parse(document) == []


def test_unknown_members_of_packs_and_blobs_are_read_past() -> None:
    blob = GOOD | {"colour": "red"}
    document = json.dumps({"packs": [{"time": 1, "id": "cd" * 32, "blobs": [blob]}]}).encode()
    found = PackedBlob(BlobType.DATA, b"\xab" * 32, 0, 100, 1000)
    assert parse(document) == [("cd" * 32, [found])]


@pytest.mark.parametrize("blobs", [None, []])
def test_a_pack_may_have_no_blobs(blobs: Any) -> None:
    assert parse(json.dumps({"packs": [{"id": "cd" * 32, "blobs": blobs}]}).encode()) == [
        ("cd" * 32, [])
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "ab"},
        {"id": "zz" * 32},
        {"id": " " + "ab" * 31 + " "},
        {"id": 5},
        {"id": None},
        {"type": "file"},
        {"type": ["data"]},
        {"type": None},
        {"offset": -1},
        {"offset": True},
        {"offset": 0.0},
        {"offset": "0"},
        {"offset": 1 << 32},
        {"length": OVERHEAD - 1},
        {"length": 1 << 32},
        {"length": OVERHEAD},
        {"offset": (1 << 32) - 50},
        {"length": 100 << 20},
        {"uncompressed_length": -1},
        {"uncompressed_length": 1 << 40},
        {"uncompressed_length": 10**400},
        {"uncompressed_length": None},
    ],
)
def test_a_blob_that_cannot_be_is_damage(changes: dict[str, object]) -> None:
    assert parse(with_blob())
    with pytest.raises(DamagedError, match=NAME):
        parse(with_blob(**changes))


@pytest.mark.parametrize("member", ["id", "type", "offset", "length"])
def test_a_blob_that_lacks_something_is_damage(member: str) -> None:
    blob = {name: value for name, value in GOOD.items() if name != member}
    with pytest.raises(DamagedError):
        parse(json.dumps({"packs": [{"id": "cd" * 32, "blobs": [blob]}]}).encode())


def test_a_number_of_a_million_digits_is_damage() -> None:
    document = with_blob().replace(b'"offset": 0', b'"offset": ' + b"9" * 1_000_000)
    with pytest.raises(DamagedError):
        parse(document)


@pytest.mark.parametrize("deep", [b"[", b'{"a":', b'{"packs":[', b'{"packs":[{"blobs":['])
def test_deep_nesting_is_damage(deep: bytes) -> None:
    with pytest.raises(DamagedError):
        parse(b'{"x":' + deep * 100_000)
    with pytest.raises(DamagedError):
        parse(deep * 100_000)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["packs", "id", "blobs", "type", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(JSON | st.fixed_dictionaries({"packs": JSON}))
def test_any_json_is_an_index_or_damage(value: object) -> None:
    try:
        parse(json.dumps(value).encode())
    except DamagedError:
        return
    assert isinstance(value, dict)


@given(st.binary(max_size=100))
def test_any_bytes_are_damage(data: bytes) -> None:
    with pytest.raises(DamagedError):
        parse(data)


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_any_changed_byte_is_damage_or_changes_a_value(position: int, value: int) -> None:
    document = bytearray(with_blob())
    document[position % len(document)] = value
    try:
        for _, blobs in parse(bytes(document)):
            assert all(blob.length >= OVERHEAD for blob in blobs)
    except DamagedError:
        pass


@given(st.integers(0, 10_000))
def test_a_cut_index_is_damage(length: int) -> None:
    document = with_blob()
    with pytest.raises(DamagedError):
        parse(document[: length % len(document)])


def test_a_large_index_takes_little_more_memory_than_itself() -> None:
    packs = [
        (f"{p:064x}", [PackedBlob(BlobType.DATA, os.urandom(32), n * 99, 99, 0) for n in range(40)])
        for p in range(800)
    ]
    (document,) = index_file.encode(packs)
    tracemalloc.start()
    try:
        for _ in index_file.parse(document, NAME):
            pass
        assert tracemalloc.get_traced_memory()[1] < 1.5 * len(document)
    finally:
        tracemalloc.stop()

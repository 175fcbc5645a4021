# SPDX-License-Identifier: Apache-2.0
"""Packs: what went in comes out, and whatever is not a pack is damage, never anything worse."""

import hashlib
import os
import random
import struct
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from qmpbackup.errors import DamagedError
from qmpbackup.restic.crypto import OVERHEAD, Key, seal
from qmpbackup.restic.pack import (
    BlobType,
    PackBuilder,
    PackedBlob,
    encode_header,
    open_blob,
    open_large_blob,
    parse_header,
    read_header,
    seal_blob,
    seal_large_blob,
)
from qmpbackup.restic.storage.interface import File, Kind, Missing
from qmpbackup.restic.storage.local import LocalStorage

KEY = Key.random()
Opener = Callable[[Key, bytes | bytearray, PackedBlob], bytes]


def open_in_blocks(key: Key, sealed: bytes | bytearray, blob: PackedBlob) -> bytes:
    """A blob that is read in blocks."""
    return b"".join(open_large_blob(key, sealed, blob))


either_way = pytest.mark.parametrize("open_", [open_blob, open_in_blocks])
CONTENTS = st.lists(
    st.one_of(st.binary(max_size=200), st.integers(0, 5000).map(lambda n: b"easy" * n)), min_size=1
)
MIB = 1 << 20


def packed(sealed: bytes, plain: bytes, raw_length: int) -> PackedBlob:
    return PackedBlob(BlobType.DATA, hashlib.sha256(plain).digest(), 0, len(sealed), raw_length)


@given(CONTENTS, st.sampled_from(BlobType), st.sampled_from([None, 1, 3]))
def test_what_went_into_a_pack_comes_out_of_it_alone(
    contents: list[bytes], type_: BlobType, level: int | None
) -> None:
    builder = PackBuilder()
    for plain in contents:
        sealed, raw_length = seal_blob(KEY, plain, level)
        builder.add(type_, hashlib.sha256(plain).digest(), sealed, raw_length)
    size = builder.size
    name, parts, blobs = builder.finish(KEY)
    pack = b"".join(parts)
    assert name == hashlib.sha256(pack).hexdigest()
    assert len(pack) == size
    assert parse_header(KEY, pack, len(pack)) == blobs
    for blob, plain in zip(blobs, contents, strict=True):
        assert open_blob(KEY, pack[blob.offset : blob.offset + blob.length], blob) == plain


def test_what_does_not_get_smaller_is_not_compressed() -> None:
    noise = random.Random(1).randbytes(100_000)  # noqa: S311 - no secret
    assert seal_blob(KEY, noise)[1] == 0
    assert len(seal_blob(KEY, noise)[0]) == len(noise) + OVERHEAD
    assert seal_blob(KEY, bytes(100_000))[1] == 100_000
    assert len(seal_blob(KEY, bytes(100_000))[0]) < 200
    assert seal_blob(KEY, b"")[1] == 0


@given(st.lists(st.binary(max_size=300), max_size=5), st.sampled_from([None, 1]))
def test_what_was_sealed_in_blocks_is_read_either_way(
    blocks: list[bytes], level: int | None
) -> None:
    plain = b"".join(blocks)
    sealed, raw_length = seal_large_blob(KEY, blocks, len(plain), level)
    blob = packed(sealed, plain, raw_length)
    assert open_blob(KEY, sealed, blob) == plain
    assert open_in_blocks(KEY, sealed, blob) == plain


def test_repositories_of_version_1_get_no_compression() -> None:
    sealed, raw_length = seal_blob(KEY, bytes(1000), None)
    assert (len(sealed), raw_length) == (1000 + OVERHEAD, 0)


@either_way
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_any_flipped_bit_of_a_blob_is_damage(open_: Opener, position: int, mask: int) -> None:
    plain = b"some text, " * 100
    sealed, raw_length = seal_blob(KEY, plain)
    flipped = bytearray(sealed)
    flipped[position % len(sealed)] ^= mask
    with pytest.raises(DamagedError):
        open_(KEY, flipped, packed(sealed, plain, raw_length))


@either_way
def test_a_blob_of_another_content_is_damage(open_: Opener) -> None:
    sealed, raw_length = seal_blob(KEY, b"one" * 100)
    with pytest.raises(DamagedError, match="content"):
        open_(KEY, sealed, packed(sealed, b"two" * 100, raw_length))


@either_way
def test_a_shortened_blob_is_damage(open_: Opener) -> None:
    sealed, raw_length = seal_blob(KEY, b"one" * 100)
    with pytest.raises(DamagedError):
        open_(KEY, sealed[:-1], packed(sealed, b"one" * 100, raw_length))


@either_way
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("said", [1, 1000, 3 * MIB])
def test_a_decompression_bomb_is_damage_and_takes_no_memory(
    open_: Opener, known: bool, said: int
) -> None:
    size = 64 * MIB
    bomb = zstandard.ZstdCompressor(write_content_size=known).compress(bytes(size))
    sealed = seal(KEY, bomb)
    blob = packed(sealed, bytes(10), said)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedError):
            open_(KEY, sealed, blob)
        assert tracemalloc.get_traced_memory()[1] < said + MIB
    finally:
        tracemalloc.stop()


@either_way
@given(st.binary(max_size=300), st.integers(1, 1000))
def test_any_bytes_in_place_of_a_compressed_blob_are_damage(
    open_: Opener, data: bytes, said: int
) -> None:
    sealed = seal(KEY, data)
    with pytest.raises(DamagedError):
        open_(KEY, sealed, packed(sealed, os.urandom(8), said))


def test_something_behind_a_compressed_blob_is_damage() -> None:
    plain = b"text" * 100
    sealed = seal(KEY, zstandard.ZstdCompressor().compress(plain) + b"more")
    with pytest.raises(DamagedError):
        open_blob(KEY, sealed, packed(sealed, plain, len(plain)))


@either_way
def test_blobs_compressed_as_a_stream_are_read_as_other_programs_write_them(open_: Opener) -> None:
    plain = b"text" * 100
    sealed = seal(KEY, zstandard.ZstdCompressor(write_content_size=False).compress(plain))
    assert open_(KEY, sealed, packed(sealed, plain, len(plain))) == plain


@given(st.binary(max_size=400), st.integers(0, 1 << 33))
def test_any_bytes_in_place_of_a_header_are_damage(tail: bytes, size: int) -> None:
    with pytest.raises(DamagedError):
        parse_header(KEY, tail, size)


ENTRY = st.tuples(
    st.integers(0, 5), st.integers(0, (1 << 32) - 1), st.booleans(), st.binary(max_size=36)
).map(lambda e: struct.pack("<BI", e[0], e[1]) + (bytes(4) if e[2] else b"") + e[3].ljust(32))


@given(st.lists(ENTRY, max_size=6), st.integers(0, 1 << 34), st.booleans())
def test_a_header_sealed_by_a_hostile_writer_is_damage_or_fits_the_pack(
    entries: list[bytes], body: int, fitting: bool
) -> None:
    plain = b"".join(entries)
    sealed = seal(KEY, plain)
    tail = sealed + struct.pack("<I", len(sealed))
    if fitting:
        body = sum(struct.unpack_from("<I", entry, 1)[0] for entry in entries)
    try:
        blobs = parse_header(KEY, tail, body + len(tail))
    except DamagedError:
        return
    assert sum(blob.length for blob in blobs) == body
    assert all(blob.plain_length >= 0 and blob.length >= OVERHEAD for blob in blobs)
    assert all(one.offset + one.length == two.offset for one, two in pairwise(blobs))


def entry(blob: PackedBlob) -> bytes:
    return encode_header(KEY, (blob,))


@pytest.mark.parametrize(
    ("length", "raw_length"),
    [(OVERHEAD - 1, 0), (OVERHEAD, 1), (OVERHEAD + 1, (1 << 32) - 1), ((1 << 32) - 1, 0)],
)
def test_impossible_lengths_are_damage(length: int, raw_length: int) -> None:
    header = entry(PackedBlob(BlobType.DATA, bytes(32), 0, length, raw_length))
    with pytest.raises(DamagedError):
        parse_header(KEY, header, length + len(header))


@pytest.mark.parametrize("difference", [-1, 1, 1000])
def test_a_header_that_does_not_fit_the_packs_length_is_damage(difference: int) -> None:
    header = entry(PackedBlob(BlobType.DATA, bytes(32), 0, 100))
    assert parse_header(KEY, header, 100 + len(header))
    with pytest.raises(DamagedError):
        parse_header(KEY, header, 100 + len(header) + difference)


def test_the_header_of_a_stored_pack_is_read_however_many_blobs_it_has(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.create()
    for count in (1, 63, 64, 65, 3000):
        builder = PackBuilder()
        for number in range(count):
            builder.add(BlobType.TREE, number.to_bytes(32, "big"), seal(KEY, b"x"), number % 2)
        name, parts, blobs = builder.finish(KEY)
        storage.save(File(Kind.DATA, name), parts)
        assert read_header(storage, KEY, name, builder.size) == blobs
        with pytest.raises(DamagedError):
            read_header(storage, KEY, name, builder.size - 1)
    with pytest.raises(Missing):
        read_header(storage, KEY, "00" * 32, 1000)
    with pytest.raises(DamagedError):
        read_header(storage, KEY, "00" * 32, 3)

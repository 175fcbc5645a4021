# SPDX-License-Identifier: Apache-2.0
"""Packs: many sealed blobs in one file, with a sealed header at its end that says what is in it.

    blob ‖ … ‖ blob ‖ header, sealed ‖ length of the sealed header (4, little-endian)

One entry of the header: type (1), length of the sealed blob (4), for compressed types the length of
the plaintext (4), SHA-256 of the plaintext (32); restic, doc/design.rst ("Pack Format"). Knows
nothing of indexes, nor of what the blobs mean.
"""

import hashlib
import struct
import threading
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import IO, TYPE_CHECKING, Final, NamedTuple, cast

from qmpbackup.errors import DamagedError
from qmpbackup.restic.crypto import (
    OVERHEAD,
    Buffer,
    Key,
    seal,
    seal_blocks,
    unseal,
    unseal_blocks,
)
from qmpbackup.restic.storage.interface import File, Kind, Storage

if TYPE_CHECKING:
    import zstandard

LARGEST_HEADER: Final = 16 << 20
"""Bytes of a sealed header that restic still reads."""

LARGEST_PACK: Final = 0xFFFF_FFFF
"""Offsets in indexes have 32 bits in every reader."""

_LENGTH = struct.Struct("<I")
_PLAIN = struct.Struct("<BI32s")
_COMPRESSED = struct.Struct("<BII32s")
_COMPRESSED_BIT = 2
EMPTY_PACK: Final = OVERHEAD + _LENGTH.size
"""Bytes of a pack beside its blobs and their entries."""
_ENTRIES_AT_ONCE = 64
_UNKNOWN_SIZE = frozenset({-1, (1 << 64) - 1})


class BlobType(IntEnum):
    """What a blob is: a piece of a file, or a folder's listing."""

    DATA = 0
    TREE = 1


LARGEST_BLOB: Final = {BlobType.DATA: 128 << 20, BlobType.TREE: 2 << 30}
"""Bytes of plaintext that are believed. Restic's own chunks end at 8 MiB and its packs at 128; the
tree with a large disk's list of chunks takes 64 MiB a million."""

LARGEST_WINDOW: Final = 32 << 20
"""Bytes that zstd may look back in a stream, for which it takes memory; restic's strongest level
needs as many."""

_BLOCK: Final = 1 << 20
"""Bytes of a large blob that are dealt with at a time."""


class PackedBlob(NamedTuple):
    """A blob in a pack: where its sealed form lies there, and what it opens to.

    `id` is the SHA-256 of the plaintext, `raw_length` the plaintext's length where the blob is
    compressed and 0 where it is not. (A tuple, because a large index has millions of them.)
    """

    type: BlobType
    id: bytes
    offset: int
    length: int
    raw_length: int = 0

    @property
    def plain_length(self) -> int:
        """Bytes of plaintext."""
        return self.raw_length or self.length - OVERHEAD

    def __str__(self) -> str:
        return f"{self.type.name.lower()} blob {self.id.hex()}"


def seal_blob(key: Key, plain: Buffer, level: int | None = 1) -> tuple[bytes, int]:
    """Compress and seal; returns the sealed blob and what its entry has as `raw_length`.

    What zstd does not make smaller is kept as it is. `level` is zstd's, None for repositories of
    version 1, which know no compression. Releases the GIL for the work; a context of zstd costs
    nothing measurable beside a blob, so each call has its own and any thread may call.
    """
    if level is None or not plain:
        return seal(key, plain), 0
    import zstandard

    compressed = zstandard.ZstdCompressor(level=level, write_checksum=False).compress(plain)
    if len(compressed) >= len(plain):
        return seal(key, plain), 0
    return seal(key, compressed), len(plain)


def seal_large_blob(
    key: Key, blocks: Iterable[Buffer], length: int, level: int | None = 1
) -> tuple[bytes, int]:
    """As `seal_blob`, for `length` bytes that come in blocks and are never held whole; they are
    compressed in any case."""
    if level is None or not length:
        return seal_blocks(key, blocks), 0
    return seal_blocks(key, _compress(blocks, length, level)), length


def _compress(blocks: Iterable[Buffer], length: int, level: int) -> Iterator[bytes]:
    import zstandard

    frame = zstandard.ZstdCompressor(level=level, write_checksum=False).compressobj(size=length)
    for block in blocks:
        yield frame.compress(block)
    yield frame.flush()


def open_large_blob(key: Key, sealed: Buffer, blob: PackedBlob) -> Iterator[bytes]:
    """As `open_blob`, in blocks: nothing of them is to be believed before the last one has come.

    Raises:
        DamagedError: it is not the blob that `blob` says.
    """
    _check_length(sealed, blob)
    blocks = unseal_blocks(key, sealed, f"The {blob}", _BLOCK)
    digest = hashlib.sha256()
    for block in _decompress_blocks(blocks, blob) if blob.raw_length else blocks:
        digest.update(block)
        yield block
    if digest.digest() != blob.id:
        raise DamagedError(f"The {blob} is damaged: its content is another.")


def _decompress_blocks(blocks: Iterator[bytes], blob: PackedBlob) -> Iterator[bytes]:
    import zstandard

    try:
        context = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        reader = context.stream_reader(cast("IO[bytes]", _Source(blocks)))
        left = blob.raw_length
        # One byte more than there should be, to find out what is too long.
        while block := reader.read(min(_BLOCK, left + 1)):
            left -= len(block)
            if left < 0:
                break
            yield block
    except zstandard.ZstdError as error:
        raise DamagedError(f"The {blob} is damaged: it cannot be decompressed.") from error
    if left:
        raise DamagedError(f"The {blob} is damaged: its compressed form has another length.")


class _Source:
    """Blocks as what a stream of zstd reads from."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks

    def read(self, _size: int) -> bytes:
        """The next block, whatever its size; none at the end."""
        return next(self._blocks, b"")


def open_blob(key: Key, sealed: Buffer, blob: PackedBlob) -> bytes:
    """Check and decrypt a sealed blob, decompress it within its bounds, and check its hash.

    Raises:
        DamagedError: it is not the blob that `blob` says.
    """
    _check_length(sealed, blob)
    plain = unseal(key, sealed, f"The {blob}")
    if blob.raw_length:
        plain = _decompress(plain, blob)
    if hashlib.sha256(plain).digest() != blob.id:
        raise DamagedError(f"The {blob} is damaged: its content is another.")
    return plain


def _check_length(sealed: Buffer, blob: PackedBlob) -> None:
    if len(sealed) != blob.length or blob.plain_length > LARGEST_BLOB[blob.type]:
        raise DamagedError(f"The {blob} is damaged: its length is wrong.")


def _decompress(compressed: bytes, blob: PackedBlob) -> bytes:
    import zstandard

    # The frame's own word on its size would decide how much memory is taken: it is read first.
    try:
        size = zstandard.get_frame_parameters(compressed).content_size
        if size not in _UNKNOWN_SIZE and size != blob.raw_length:
            raise DamagedError(f"The {blob} is damaged: its compressed form has another length.")
        return _decompressor().decompress(
            compressed, max_output_size=blob.raw_length, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise DamagedError(f"The {blob} is damaged: it cannot be decompressed.") from error


_of_thread = threading.local()


def _decompressor() -> "zstandard.ZstdDecompressor":
    """This thread's own: making one costs a tenth of what it does with a chunk."""
    import zstandard

    found: zstandard.ZstdDecompressor | None = getattr(_of_thread, "decompressor", None)
    if found is None:
        found = _of_thread.decompressor = zstandard.ZstdDecompressor()
    return found


class PackBuilder:
    """Collects sealed blobs, without copying them, until they are a pack. For one thread at a time."""

    def __init__(self) -> None:
        self._parts: list[Buffer] = []
        self._blobs: list[PackedBlob] = []
        self._body = 0
        self._header = 0

    @property
    def size(self) -> int:
        """Bytes that the pack would have now."""
        return self._body + self._header + EMPTY_PACK

    @property
    def count(self) -> int:
        """Blobs in it."""
        return len(self._blobs)

    @property
    def full(self) -> bool:
        """Whether its header has no room for a further blob."""
        return self._header + _COMPRESSED.size + OVERHEAD > LARGEST_HEADER

    def add(self, type_: BlobType, id_: bytes, sealed: Buffer, raw_length: int) -> None:
        """Take a sealed blob; it must not be changed until the pack is stored."""
        if self.full or self.size + len(sealed) + _COMPRESSED.size > LARGEST_PACK:
            raise ValueError("the pack is full")
        self._blobs.append(PackedBlob(type_, id_, self._body, len(sealed), raw_length))
        self._parts.append(sealed)
        self._body += len(sealed)
        self._header += entry_size(raw_length)

    def finish(self, key: Key) -> tuple[str, list[Buffer], tuple[PackedBlob, ...]]:
        """The pack's name, the parts it is made of, and its blobs.

        Hashes the whole pack, with the GIL released. The header is opened once more before it may
        go anywhere, as restic does: a bit that fell over in memory shows here.
        """
        blobs = tuple(self._blobs)
        header = encode_header(key, blobs)
        if parse_header(key, header, self.size, "The new pack") != blobs:
            raise DamagedError("The header of a new pack is not what went into it.")
        parts = [*self._parts, header]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        return digest.hexdigest(), parts, blobs


def entry_size(raw_length: int) -> int:
    """Bytes of a blob's entry in the header of its pack."""
    return (_COMPRESSED if raw_length else _PLAIN).size


def encode_header(key: Key, blobs: tuple[PackedBlob, ...]) -> bytes:
    """The sealed header with its length behind it."""
    entries = (
        _COMPRESSED.pack(b.type | _COMPRESSED_BIT, b.length, b.raw_length, b.id)
        if b.raw_length
        else _PLAIN.pack(b.type, b.length, b.id)
        for b in blobs
    )
    sealed = seal(key, b"".join(entries))
    return sealed + _LENGTH.pack(len(sealed))


def trailer_size(tail: Buffer, pack_size: int, what: str) -> int:
    """The length of a pack's header, with the four bytes that say it, by the pack's last bytes.

    Raises:
        DamagedError: a pack of this size has no such header.
    """
    if len(tail) < _LENGTH.size:
        raise DamagedError(f"{what} is damaged: it is too short.")
    (length,) = _LENGTH.unpack(memoryview(tail)[-_LENGTH.size :])
    if not OVERHEAD + _PLAIN.size <= length <= min(LARGEST_HEADER, pack_size - _LENGTH.size):
        raise DamagedError(f"{what} is damaged: its header cannot have {length} bytes.")
    return int(length) + _LENGTH.size


def parse_header(
    key: Key, tail: Buffer, pack_size: int, what: str = "A pack"
) -> tuple[PackedBlob, ...]:
    """The blobs of a pack in their order; `tail` is its end, at least from the header on.

    Raises:
        DamagedError: this is no header of a pack of that size.
    """
    size = trailer_size(tail, pack_size, what)
    if size > len(tail):
        raise DamagedError(f"{what} is damaged: it is too short.")
    sealed = memoryview(tail)[len(tail) - size : len(tail) - _LENGTH.size]
    entries = unseal(key, sealed, f"{what}'s header")
    blobs = tuple(_entries(entries, what))
    if blobs[-1].offset + blobs[-1].length != pack_size - size:
        raise DamagedError(f"{what} is damaged: its header does not fit its size.")
    return blobs


def _entries(data: bytes, what: str) -> Iterator[PackedBlob]:
    position = offset = 0
    while position < len(data):
        kind = data[position]
        form = _COMPRESSED if kind & _COMPRESSED_BIT else _PLAIN
        if kind > (BlobType.TREE | _COMPRESSED_BIT) or len(data) - position < form.size:
            raise DamagedError(f"{what} is damaged: its header has an unknown entry.")
        _, length, *raw, id_ = form.unpack_from(data, position)
        blob = PackedBlob(BlobType(kind & 1), id_, offset, length, *raw)
        check_blob(blob, what, compressed=bool(raw))
        yield blob
        position += form.size
        offset += length


def check_blob(blob: PackedBlob, what: str, *, compressed: bool) -> None:
    """Refuse a place where no blob can be.

    Raises:
        DamagedError: a length is out of its range, or the end is beyond what a pack can have.
    """
    type_, _, offset, length, raw_length = blob
    plain_length = raw_length if compressed else length - OVERHEAD
    # What is compressed in vain, as restic does it, is longer than before by little.
    most = 2 * raw_length + 4096 + OVERHEAD if compressed else LARGEST_PACK
    if not (
        0 <= offset <= LARGEST_PACK - length
        and OVERHEAD + compressed <= length <= most
        and compressed <= plain_length <= LARGEST_BLOB[type_]
    ):
        raise DamagedError(f"{what} is damaged: it says impossible lengths of a {blob}.")


def read_header(storage: Storage, key: Key, name: str, size: int) -> tuple[PackedBlob, ...]:
    """Load and parse the header of a stored pack: one request, or two where it has many blobs.

    Raises:
        DamagedError: it has none.
        StorageError: it cannot be read.
    """
    what = f"The pack {name}"
    if size <= _LENGTH.size:
        raise DamagedError(f"{what} is damaged: it is too short.")
    file = File(Kind.DATA, name)
    wanted = min(size, EMPTY_PACK + _ENTRIES_AT_ONCE * _COMPRESSED.size)
    tail = storage.load(file, size - wanted, wanted)
    needed = trailer_size(tail, size, what)
    if needed > wanted:
        tail = storage.load(file, size - needed, needed)
    return parse_header(key, tail, size, what)

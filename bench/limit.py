# SPDX-License-Identifier: Apache-2.0
"""What a restore costs at the least on this machine, by the same libraries.

    RESTIC_PASSWORD=… python -m bench.limit REPOSITORY OUTPUT

Two threads read whole packs, and check, decrypt, decompress and hash the chunks of the only disk of a
repository's newest point, and write them with pwrite where they belong; then fsync. No second copies, no
damaged or repeated chunks, no room to be watched. Prints the seconds of that, and those from the start of
Python on, which are more by the password's.
"""

import hashlib
import hmac
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zstandard
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR, ECB
from cryptography.hazmat.primitives.poly1305 import Poly1305

from qmpbackup.model import Location
from qmpbackup.restic.crypto import Key
from qmpbackup.restic.pack import BlobType, PackedBlob
from qmpbackup.targets import opening
from qmpbackup.targets.repository.chunk_list import CHUNK, numbers
from qmpbackup.targets.repository.target import RepositoryTarget

_WRITTEN_AT_ONCE = 256 * 1024

Wanted = dict[bytes, list[tuple[PackedBlob, int]]]
"""The blobs of each pack, each with the place of its chunk."""


@contextmanager
def wanted(repository: str) -> Iterator[tuple[Key, int, Wanted]]:
    """The repository's key, the size of the disk, and what is to be read."""
    with opening.entrance(Location(repository)).opened() as target:
        if not isinstance(target, RepositoryTarget):
            raise SystemExit("That is no repository.")
        point = target.load().points[-1]
        contents = target.contents(point, point.disks[0])
        packs: Wanted = defaultdict(list)
        for index in numbers(contents.with_data()):
            place = target.repository.index.find(BlobType.DATA, contents.id_of(index))
            if place is None:
                raise SystemExit("A chunk is missing.")
            blob = place.packed(BlobType.DATA, contents.id_of(index))
            packs[place.pack].append((blob, index * CHUNK))
        yield target.repository.key, contents.size, packs


def opened(
    key: Key, sealed: memoryview, blob: PackedBlob, context: zstandard.ZstdDecompressor
) -> bytes:
    """The plaintext of a blob, proved."""
    iv = bytes(sealed[:16])
    nonce = Cipher(AES(key.mac_k), ECB()).encryptor().update(iv)  # noqa: S305 - as the format has it
    mac = Poly1305(key.mac_r + nonce)
    mac.update(sealed[16:-16])
    plain = Cipher(AES(key.encrypt), CTR(iv)).decryptor().update(sealed[16:-16])
    if blob.raw_length:
        plain = context.decompress(plain, max_output_size=blob.raw_length)
    right = hmac.compare_digest(mac.finalize(), bytes(sealed[-16:]))
    if not right or hashlib.sha256(plain).digest() != blob.id:
        raise SystemExit("A chunk is damaged.")
    return plain


def main() -> None:
    """Restore, and print how long it took."""
    started = time.monotonic()
    folder, output = sys.argv[1:]
    with wanted(folder) as (key, size, packs):
        begun = time.monotonic()
        fd = os.open(output, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(fd, size)
        left = iter(packs.items())
        lock = threading.Lock()

        def work() -> None:
            context = zstandard.ZstdDecompressor()
            while True:
                with lock:
                    name, blobs = next(left, (b"", []))
                if not blobs:
                    return
                pack = memoryview(
                    (Path(folder) / "data" / name.hex()[:2] / name.hex()).read_bytes()
                )
                for blob, at in blobs:
                    _write(
                        fd,
                        opened(key, pack[blob.offset : blob.offset + blob.length], blob, context),
                        at,
                    )

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.fsync(fd)
        now = time.monotonic()
        print(f"{now - begun:.3f} {now - started:.3f}")


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    for at in range(0, len(data), _WRITTEN_AT_ONCE):
        os.pwrite(fd, view[at : at + _WRITTEN_AT_ONCE], offset + at)


if __name__ == "__main__":
    main()

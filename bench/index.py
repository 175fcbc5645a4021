# SPDX-License-Identifier: Apache-2.0
"""How the index of a large repository fares: building its cache, opening it, asking it, changing it.

    python bench/index.py [millions of blobs, 10]

The index files are made up on the way (random ids, 40 blobs a pack, 50 000 a file), so that nothing
but the parsing and the cache is measured. Memory is what the process grows by, at its highest.
"""

import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qmpbackup.restic import index
from qmpbackup.restic.blobs import BlobIndex
from qmpbackup.restic.pack import BlobType, PackedBlob
from qmpbackup.restic.storage.interface import Kind

_A_FILE = 50_000
_A_PACK = 40
_ASKED = 100_000


class Synthetic:
    """A repository that has nothing but index files; each is made when it is asked for."""

    def __init__(self, files: int) -> None:
        self.names = [f"{number:064x}" for number in range(files)]
        self.storage: Any = self

    def list(self, _kind: Kind) -> Iterator[tuple[str, int]]:
        yield from ((name, 0) for name in self.names)

    def load_unpacked(self, _kind: Kind, name: str) -> bytes:
        return b"".join(index.encode(packs(int(name, 16), _A_FILE)))


def packs(seed: int, blobs: int) -> Iterator[tuple[str, list[PackedBlob]]]:
    """The same packs for the same seed."""
    source = random.Random(seed)  # noqa: S311 - no secret
    for _ in range(blobs // _A_PACK):
        yield (
            source.randbytes(32).hex(),
            [
                PackedBlob(BlobType.DATA, source.randbytes(32), n * 400_000, 400_000, 1 << 20)
                for n in range(_A_PACK)
            ],
        )


def peak() -> int:
    """Highest memory of this process so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def timed(what: str, start: float, count: int = 0) -> None:
    took = time.perf_counter() - start
    each = f", {took / count * 1e6:.2f} µs each" if count else ""
    print(f"{what}: {took:.2f} s{each}; memory +{(peak() - _BEFORE) / 1024:.0f} MiB", flush=True)


def main() -> None:
    blobs = int(float(sys.argv[1] if len(sys.argv) > 1 else "10") * 1e6)
    repository = Synthetic(blobs // _A_FILE)
    with tempfile.TemporaryDirectory(prefix="index-") as folder:
        start = time.perf_counter()
        for name in repository.names[:20]:
            document = repository.load_unpacked(Kind.INDEX, name)
        timed("(making up 1 million blobs)", start)
        start = time.perf_counter()
        for _ in range(20):
            for _each in index.parse(document, "x"):
                pass
        timed("(parsing 1 million blobs)", start)
        start = time.perf_counter()
        with BlobIndex.open(Path(folder), "00" * 32) as blobs_:
            blobs_.sync(repository)
            timed("build", start, len(blobs_))
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.places"))
        print(f"on disk: {size / 2**20:.0f} MiB")
        start = time.perf_counter()
        with BlobIndex.open(Path(folder), "00" * 32) as blobs_:
            blobs_.sync(repository)
            timed("open", start)
            known = [blob.id for _, each in packs(3, _A_FILE) for blob in each]
            start = time.perf_counter()
            for id_ in known:
                if blobs_.find(BlobType.DATA, id_) is None:
                    raise SystemExit("a blob is missing")
            timed("find what is there", start, len(known))
            source = random.Random("other")  # noqa: S311 - no secret
            start = time.perf_counter()
            found = sum(blobs_.has(BlobType.DATA, source.randbytes(32)) for _ in range(_ASKED))
            timed(f"ask for what is not there ({found})", start, _ASKED)
            repository.names.append(f"{1 << 40:064x}")
            start = time.perf_counter()
            blobs_.sync(repository)
            timed("one index file more", start)
            del repository.names[0]
            start = time.perf_counter()
            blobs_.sync(repository)
            timed("one index file less", start)


_BEFORE = peak()

if __name__ == "__main__":
    main()

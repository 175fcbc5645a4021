# SPDX-License-Identifier: Apache-2.0
"""How the index of a large repository fares: building its cache, opening it, asking it, changing it.

    python -m bench.index [millions of blobs, 10]

The index files are made up on the way (random ids, 40 blobs a pack, 50 000 a file), so that nothing
but the parsing and the cache is measured. Memory is what the process grows by, at its highest.
"""

import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zstandard

from qmpbackup.restic.index import index_file
from qmpbackup.restic.index.lookup import BlobIndex
from qmpbackup.restic.pack import BlobType, PackedBlob
from qmpbackup.restic.storage.interface import Kind

_A_FILE = 50_000
_A_PACK = 40


class Synthetic:
    """A repository that has nothing but index files, which are not encrypted."""

    def __init__(self, folder: Path, files: int) -> None:
        self._folder = folder
        folder.mkdir()
        for number in range(files):
            self.make(number)

    def make(self, number: int) -> None:
        """One index file more."""
        document = b"".join(index_file.encode(packs(number, _A_FILE)))
        path = self._folder / f"{number:064x}"
        path.write_bytes(zstandard.ZstdCompressor(level=1).compress(document))

    def remove(self, number: int) -> None:
        """One index file less."""
        (self._folder / f"{number:064x}").unlink()

    def files(self, _kind: Kind) -> Iterator[tuple[str, int]]:
        yield from ((path.name, path.stat().st_size) for path in self._folder.iterdir())

    def load_unpacked(self, kind: Kind, name: str, size: int | None = None) -> bytes:  # noqa: ARG002
        return zstandard.ZstdDecompressor().decompress((self._folder / name).read_bytes())


def packs(seed: int, blobs: int) -> Iterator[tuple[str, list[PackedBlob]]]:
    """The same packs for the same seed."""
    source = random.Random(seed)
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


class Report:
    """Prints what took how long, and how far memory has grown since this began."""

    def __init__(self) -> None:
        self._before = peak()

    @contextmanager
    def timed(self, what: str, count: int = 0) -> Iterator[None]:
        start, cpu = time.perf_counter(), time.process_time()
        yield
        took, cpu = time.perf_counter() - start, time.process_time() - cpu
        each = f", {cpu / count * 1e6:.2f} µs each" if count else ""
        memory = (peak() - self._before) >> 10
        print(f"{what}: {took:.2f} s, CPU {cpu:.2f} s{each}; memory +{memory} MiB", flush=True)


def made(folder: Path, files: int) -> Synthetic:
    """Make up the repository in a process of its own, whose memory is not counted."""
    import multiprocessing

    worker = multiprocessing.get_context("fork").Process(target=Synthetic, args=(folder, files))
    worker.start()
    worker.join()
    repository = Synthetic.__new__(Synthetic)
    repository.__dict__.update(_folder=folder)
    return repository


def main() -> None:
    blobs = int(float(sys.argv[1] if len(sys.argv) > 1 else "10") * 1e6)
    with tempfile.TemporaryDirectory(prefix="index-") as temporary:
        folder, cache = Path(temporary) / "index", Path(temporary) / "cache"
        repository = made(folder, blobs // _A_FILE)
        measure(repository, cache, blobs)


def measure(repository: Synthetic, cache: Path, blobs: int) -> None:
    report = Report()
    with report.timed("parse one index file", _A_FILE):
        document = repository.load_unpacked(Kind.INDEX, f"{0:064x}")
        for _each in index_file.parse(document, "x"):
            pass
    with report.timed("build", blobs), BlobIndex.open(cache, "00" * 32) as known:
        known.sync(repository)
    size = sum(path.stat().st_size for path in cache.rglob("*.places"))
    print(f"on disk: {size >> 20} MiB")
    with BlobIndex.open(cache, "00" * 32) as known:
        with report.timed("open"):
            known.sync(repository)
        ask(known, report)
        repository.make(1 << 30)
        with report.timed("one index file more"):
            known.sync(repository)
        repository.remove(0)
        with report.timed("one index file less"):
            known.sync(repository)


def ask(known: BlobIndex, report: Report) -> None:
    ids = [blob.id for _, each in packs(3, _A_FILE) for blob in each]
    random.Random(1).shuffle(ids)
    with report.timed("find what is there", len(ids)):
        found = sum(known.find(BlobType.DATA, id_) is not None for id_ in ids)
    source = random.Random("other")
    others = [source.randbytes(32) for _ in ids]
    with report.timed("ask for what is not there", len(ids)):
        found += sum(known.has(BlobType.DATA, id_) for id_ in others)
    with report.timed("ask for both together", 2 * len(ids)):
        found += sum(1 for _ in known.missing(BlobType.DATA, [*ids, *others]))
    if found != 2 * len(ids):
        raise SystemExit("the index does not answer right")


if __name__ == "__main__":
    main()

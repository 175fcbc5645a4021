# SPDX-License-Identifier: Apache-2.0
"""Index files that are made up, and whether the product knows what they say."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from qmpbackup.restic.index import index_file
from qmpbackup.restic.index.lookup import BlobIndex
from qmpbackup.restic.index.table import Spot
from qmpbackup.restic.pack import BlobType, PackedBlob
from qmpbackup.restic.storage.interface import Kind, Missing

ID = "ab" * 32
"""Of the repository."""


class Indexes:
    """A repository as far as its index files go; they are made up, and counted when they are read."""

    def __init__(self, seed: int = 1) -> None:
        self.random = random.Random(seed)  # noqa: S311 - no secret
        self.documents: dict[str, bytes] = {}
        self.read: list[str] = []
        self._common = [self.random.randbytes(32) for _ in range(20)]

    def files(self, _kind: Kind) -> Iterator[tuple[str, int]]:
        yield from [(name, len(document)) for name, document in self.documents.items()]

    def load_unpacked(self, _kind: Kind, name: str, size: int | None = None) -> bytes:
        self.read.append(name)
        if name not in self.documents:
            raise Missing(f"There is no {name}.")
        assert size in {None, len(self.documents[name])}
        return self.documents[name]

    def make(self, packs: int = 3, blobs: int = 10) -> str:
        """One index file more, with some blobs that others have too."""
        content = [(self.id().hex(), self.blobs(blobs)) for _ in range(packs)]
        (document,) = index_file.encode(content)
        name = self.id().hex()
        self.documents[name] = document
        return name

    def id(self) -> bytes:
        return self.random.randbytes(32)

    def blobs(self, count: int) -> Sequence[PackedBlob]:
        choose = self.random
        return [
            PackedBlob(
                choose.choice(list(BlobType)),
                choose.choice(self._common) if choose.random() < 0.1 else self.id(),
                number * 100,
                100,
                choose.choice([0, 200]),
            )
            for number in range(count)
        ]

    def places(self) -> dict[tuple[BlobType, bytes], set[Spot]]:
        """What the index files say, worked out the simple way."""
        found: dict[tuple[BlobType, bytes], set[Spot]] = {}
        for name, document in self.documents.items():
            for pack, blobs in index_file.parse(document, name):
                for blob in blobs:
                    place = Spot(bytes.fromhex(pack), blob.offset, blob.length, blob.raw_length)
                    found.setdefault((blob.type, blob.id), set()).add(place)
        return found


def agree(blobs: BlobIndex, indexes: Indexes) -> None:
    """The index says what the files say, and nothing else."""
    places = indexes.places()
    for (type_, id_), expected in places.items():
        assert set(blobs.find_all(type_, id_)) == expected
        assert blobs.find(type_, id_) in expected
        assert blobs.has(type_, id_)
        other = BlobType(1 - type_)
        assert blobs.has(other, id_) == ((other, id_) in places)
        nobody = id_[:-1] + bytes([id_[-1] ^ 1])
        assert not blobs.has(type_, nobody)
        assert blobs.find(type_, nobody) is None
    near = [bytes([id_[0] ^ 1]) + id_[1:] for _, id_ in places]
    for type_ in BlobType:
        asked = [id_ for _, id_ in places] + near
        lacking = {id_ for id_ in asked if (type_, id_) not in places}
        assert set(blobs.missing(type_, asked)) == lacking
    assert len(blobs) == sum(map(len, places.values()))


def cached(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.places"))

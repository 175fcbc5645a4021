# SPDX-License-Identifier: Apache-2.0
"""Every kind of stored image is read and poured alike: from a folder, a repository, and memory."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError
from qmpbackup.model import Level
from qmpbackup.restic.repository import Repository
from qmpbackup.restic.storage.local import LocalStorage
from qmpbackup.targets import pouring
from qmpbackup.targets.repository.target import RepositoryTarget
from qmpbackup.targets.stored_image import StoredImage
from stock import stored
from stock.in_memory import RememberedImage
from stock.stored import MIB, Stored, Write
from stock.stored_repository import StoredRepository

SIZE = 4 * MIB
WRITES = [Write(7, 0, 100_000), Write(9, 2 * MIB - 65536, 200_000), Write(5, SIZE - 512, 512)]


def expected(size: int = SIZE) -> bytes:
    """What all images hold."""
    data = bytearray(size)
    for write in WRITES:
        data[write.offset : write.offset + write.length] = bytes([write.value]) * write.length
    return bytes(data)


@dataclass
class Poured:
    """A sink that notes when it was written to."""

    fd: int
    path: Path
    format: str = "raw"
    is_device: bool = False
    times: list[str] = field(default_factory=list)

    @contextmanager
    def writing(self) -> Iterator[None]:
        self.times.append("begun")
        with storage_errors(f"write {self.path}"):
            yield
        self.times.append("over")


Opener = Callable[[Path, ExitStack], tuple[StoredImage, Callable[[], None]]]
"""Makes an image; gives it, and what damages it."""


def in_memory(folder: Path, stack: ExitStack) -> tuple[StoredImage, Callable[[], None]]:
    del folder, stack
    image = RememberedImage(expected())

    def damage() -> None:
        image.is_damaged = True

    return image, damage


def in_folder(folder: Path, stack: ExitStack) -> tuple[StoredImage, Callable[[], None]]:
    made = Stored(folder / "target", size=SIZE)
    made.add(Level.FULL, {"vda": WRITES[:1]})
    point = made.add(Level.INC, {"vda": WRITES[1:]})

    def damage() -> None:
        change(made.file(made.points[0], "vda"), -1000)

    stack.enter_context(made.target.lock())
    disks = stack.enter_context(made.target.images(made.points, point, point.disks))
    return disks.images["vda"], damage


def in_repository(folder: Path, stack: ExitStack) -> tuple[StoredImage, Callable[[], None]]:
    made = StoredRepository(folder)
    point = made.add({"vda": expected()})
    repository = stack.enter_context(
        Repository.open(
            LocalStorage(made.path), made.made.password, environment=made.made.environment
        )
    )
    target = RepositoryTarget(repository, made.vm)
    target.load()

    def damage() -> None:
        change(max(made.files("data"), key=lambda each: each.stat().st_size), 100)

    disks = stack.enter_context(target.images(made.points, point, point.disks))
    return disks.images["vda"], damage


def change(path: Path, place: int) -> None:
    """Spoil a byte, however the file is protected."""
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        old = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([old[0] ^ 1]))


@pytest.fixture(params=[in_memory, in_folder, in_repository], ids=lambda each: each.__name__)
def made(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[StoredImage, Callable[[], None]]]:
    with ExitStack() as stack:
        yield request.param(tmp_path, stack)


@pytest.fixture
def image(made: tuple[StoredImage, Callable[[], None]]) -> StoredImage:
    return made[0]


@contextmanager
def sink(path: Path, format_: str = "raw", *, device: bool = False) -> Iterator[Poured]:
    """A new file, or one with other contents in the place of a device."""
    path.write_bytes(b"\xee" * SIZE if device else b"")
    fd = os.open(path, os.O_RDWR)
    try:
        yield Poured(fd, path, format_, device)
    finally:
        os.close(fd)


def test_it_is_read_at_any_offset(image: StoredImage) -> None:
    whole = expected()
    assert image.size == len(whole)
    for offset in range(0, SIZE, 77_777):
        length = min(1 + 13 * offset % (2 * MIB), SIZE - offset)
        assert image.read(offset, length) == whole[offset : offset + length]


def test_extents_cover_it_and_zeros_are_zeros(image: StoredImage) -> None:
    whole, at = expected(), 0
    for extent in image.extents(0, SIZE):
        assert extent.offset == at
        at += extent.length
        if extent.zero:
            assert not any(whole[extent.offset : at])
    assert at == SIZE


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
def test_it_is_poured_into_a_file(image: StoredImage, tmp_path: Path, format_: str) -> None:
    with sink(tmp_path / "out", format_) as out:
        image.pour(out)
        assert pouring.size_of(out.fd, format_) == SIZE
    assert out.times == ["begun", "over"]
    assert stored.contents(out.path, format_) == expected()
    if format_ == "raw":
        assert out.path.stat().st_blocks * 512 < SIZE  # holes stay holes


def test_it_is_poured_over_what_a_device_held(image: StoredImage, tmp_path: Path) -> None:
    with sink(tmp_path / "device", device=True) as out:
        image.pour(out)
    assert out.times == ["begun", "over"]
    assert out.path.read_bytes() == expected()


def test_what_is_damaged_is_never_poured(
    made: tuple[StoredImage, Callable[[], None]], tmp_path: Path
) -> None:
    image, damage = made
    damage()
    with sink(tmp_path / "out") as out, pytest.raises(DamagedError):
        image.pour(out)
    assert out.times == ["begun"]

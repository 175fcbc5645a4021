# SPDX-License-Identifier: Apache-2.0
"""Images that are laid out beforehand are what QEMU takes for images, of any size and filling."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qmpbackup.images.qcow2_layout import CLUSTER, Layout
from stock.stored import MIB, run

GIB = 1024 * MIB
SIZES = [512, CLUSTER, MIB - 512, MIB, MIB + 512, 512 * MIB, 512 * MIB + 512, 5 * GIB + 3 * CLUSTER]
FILLINGS: dict[str, Callable[[int, int], bool]] = {
    "none": lambda _index, _count: False,
    "all": lambda _index, _count: True,
    "the ends": lambda index, count: index in {0, count - 1},
    "every third": lambda index, _count: index % 3 == 1,
    "what one table maps": lambda index, _count: 512 <= index < 1024,
}


@pytest.mark.parametrize("filling", FILLINGS)
@pytest.mark.parametrize("size", SIZES)
def test_an_image_holds_each_chunk_at_its_place(tmp_path: Path, size: int, filling: str) -> None:
    count = -(-size // MIB)
    present = bytearray(FILLINGS[filling](index, count) for index in range(count))
    layout = Layout(size, MIB, present)
    image, raw = tmp_path / "image.qcow2", tmp_path / "expected.raw"
    with image.open("w+b") as made, raw.open("w+b") as expected:
        expected.truncate(size)
        layout.write_metadata(made.fileno())
        numbers = [index for index in range(count) if present[index]]
        for number, index in enumerate(numbers):
            # a mark of its own at the beginning of each chunk, and one at its end
            end = min((index + 1) * MIB, size)
            for at in {index * MIB, end - 512}:
                data = (f"{index} {at} " * 100).encode()[:512]
                os.pwrite(made.fileno(), data, layout.data_at + number * MIB + at - index * MIB)
                os.pwrite(expected.fileno(), data, at)
    run("qemu-img", "check", "-q", str(image))
    run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", str(raw), str(image))
    held = sum(min(MIB, size - index * MIB) for index in numbers)
    metadata = 6 * CLUSTER + -(-size // (512 * MIB)) * CLUSTER
    assert image.stat().st_size <= -(-held // CLUSTER) * CLUSTER + metadata


def test_a_disk_of_many_terabytes(tmp_path: Path) -> None:
    size = 64 * 1024 * GIB
    present = bytearray(size // MIB)
    present[-1] = 1
    image = tmp_path / "image.qcow2"
    with image.open("w+b") as made:
        layout = Layout(size, MIB, present)
        layout.write_metadata(made.fileno())
        os.pwrite(made.fileno(), b"\7" * 512, layout.data_at)
    run("qemu-img", "check", "-q", str(image))
    run("qemu-io", "-f", "qcow2", "-r", "-c", f"read -P 7 {size - MIB} 512", str(image))


def test_what_is_no_map_of_the_disk_is_refused() -> None:
    for size, chunk, present in ((MIB, 1000, b"\1"), (MIB, MIB, b""), (MIB, 3 * MIB, b"\1")):
        with pytest.raises(ValueError, match="chunks"):
            Layout(size, chunk, present)

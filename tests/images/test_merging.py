# SPDX-License-Identifier: Apache-2.0
"""Writing images into the one that they build on: any version of the format, with states kept in it, disks
that grow, zeros over data; whether it stands alone or builds on something itself."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from lab.disks import MIB
from qmpbackup.images import merging, qemu_img
from qmpbackup.images.layers import Layer
from stock.stored import contents, run


def image(path: Path, size: int, parent: str, writes: Sequence[str], compat: str = "1.1") -> Path:
    link = ("-u", "-b", parent, "-F", "qcow2") if parent else ()
    options = ("-o", f"compat={compat}")
    run("qemu-img", "create", "-q", "-f", "qcow2", *link, *options, str(path), str(size))
    run("qemu-io", "-f", "qcow2", *(each for write in writes for each in ("-c", write)), str(path))
    return path


def chain(folder: Path, below: int, size: int, grown: int, compat: str) -> list[Path]:
    """A lower image, on a file with `below` bytes of data if there are any, and two above it."""
    if below:
        image(folder / "G", below, "", [f"write -P 9 0 {below}"])
    first = [f"write -P 1 0 {size - 65536}", "write -P 2 65536 512"]
    second = ["write -P 3 512 70000", "write -P 0 200k 64k"]
    third = [
        "write -z 4k 128k",
        f"write -z {size - 256 * 1024} 64k",
        f"write -P 4 {grown - 512} 512",
    ]
    return [
        image(folder / "A", size, "G" if below else "", first, compat),
        image(folder / "B", size, "A", second),
        image(folder / "C", grown, "B", third),
    ]


@contextmanager
def layers_of(files: Sequence[Path]) -> Iterator[list[Layer]]:
    with ExitStack() as stack:
        fds = [os.open(file, os.O_RDONLY) for file in files]
        for fd in fds:
            stack.callback(os.close, fd)
        yield [Layer.of(fd, file.name) for fd, file in zip(fds, files, strict=True)]


def merged(files: Sequence[Path], new: Path, below: int, *, keep: bool) -> None:
    fd = os.open(new, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with layers_of(files) as layers:
            merging.copy(layers[0], fd)
            for layer in layers[1:]:
                if keep:
                    merging.take_snapshot(fd, f"before {layer.name}")
                merging.apply(layer, fd, below=below)
            found = Layer.of(fd, new.name)
            assert not qemu_img.check(found).errors
            assert found.header.backing == ("G" if below else "")
            assert found.header.size == layers[-1].header.size
    finally:
        os.close(fd)


def state(path: Path, snapshot: str) -> bytes:
    out = path.with_suffix(".raw")
    kept = ("-l", f"snapshot.name={snapshot}")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", *kept, str(path), str(out))
    return out.read_bytes()


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_states_that_are_kept_stay_right(tmp_path: Path, compat: str) -> None:
    files = chain(tmp_path, 0, MIB, MIB, compat)
    merged(files, tmp_path / "new", 0, keep=True)
    assert contents(tmp_path / "new", "qcow2") == contents(files[2], "qcow2")
    assert state(tmp_path / "new", "before B") == contents(files[0], "qcow2")
    assert state(tmp_path / "new", "before C") == contents(files[1], "qcow2")


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("below", [0, MIB // 2, MIB])
def test_a_disk_that_grows_shows_zeros_where_nothing_was_written(
    tmp_path: Path, below: int, compat: str
) -> None:
    files = chain(tmp_path, below, MIB, 2 * MIB, compat)
    merged(files, tmp_path / "new", below, keep=False)
    assert contents(tmp_path / "new", "qcow2") == contents(files[2], "qcow2")

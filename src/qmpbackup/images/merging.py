# SPDX-License-Identifier: Apache-2.0
"""What qemu-img does to images of ours: it makes them, writes others into them, keeps states of them.

An image that is written to is opened by what its own head says, so it must be one that we made and that
nobody else may write to. All go by descriptor. Must not know targets or points.
"""

import os
from collections.abc import Sequence

from qmpbackup import process
from qmpbackup.durable import storage_errors
from qmpbackup.images import layers
from qmpbackup.images.layers import Layer, path
from qmpbackup.images.qcow2 import read_header
from qmpbackup.images.qemu_img import PARALLEL, ZSTD, failure


def create(fd: int, name: str, size: int, *, backing: str = "", compress: bool = False) -> None:
    """Make an open file a qcow2 image of `size` bytes; `backing` is only recorded. Into one to
    `compress` zstd is written by whoever compresses. `name` is what messages call it.

    Raises:
        StorageError: it could not be created.
    """
    link = ["-u", "-b", backing, "-F", "qcow2"] if backing else []
    options = ZSTD if compress else ()
    arguments = ["create", "-q", "-f", "qcow2", *link, *options, path(fd), str(size)]
    _run(arguments, fd, [], f"create {name}")


def apply(layer: Layer, base: int, *, rate: int = 0) -> None:
    """Write what an image holds into the image that it builds on, and leave the former alone.

    Args:
        layer: the image; where its link leads does not matter.
        base: the open image to write into, which grows to the size of the other.
        rate: bytes a second at most (0: no limit).

    Raises:
        QmpBackupError: it failed; `base` may hold part of the changes.
    """
    # qemu-img commits from the top of a chain and wants to write there; so the top is an empty
    # image of our own, and the one that matters lies below it, open for reading only.
    with storage_errors("make an image in memory"):
        top = os.memfd_create("qmpbackup-top", os.MFD_CLOEXEC)
    try:
        create(top, "an image in memory", layer.header.size)
        into = layers.image(base)
        limit = ["-r", str(rate)] if rate else []
        arguments = ["commit", "-q", "-d", *limit, "-b", into.name]
        with layers.opened([layer], into) as below:
            whole = layers.image(top, below)
            _run([*arguments, whole.name], base, whole.fds, f"apply {layer.name}")
    finally:
        os.close(top)


def apply_above(
    layer: Layer, base: int, ground: int, *, compress: bool = False, rate: int = 0
) -> None:
    """Write what an image holds itself into the one it builds on, which builds on something, too.

    What neither holds stays so, and explicit zeros stay explicit. Only `base` is written to.

    Args:
        layer: the upper image.
        base: the lower one, open, which becomes as large as a disk as the upper one.
        ground: a `stand_in` of the size of what the lower one builds on.
        compress: compress what is written; only for what the lower one does not hold yet.
        rate: bytes a second at most (0: no limit).

    Raises:
        QmpBackupError: it failed; `base` may hold part of the changes.
    """
    size = layer.header.size
    if size != read_header(base, "The merged image").size:
        whole = layers.image(base, layers.raw(ground))
        _run(["resize", "-q", whole.name, str(size)], base, whole.fds, "enlarge the merged image")
    below = path(ground)
    output = (
        f"driver=qcow2,file.driver=file,file.filename={path(base)},"
        f"backing.driver=raw,backing.file.driver=file,backing.file.filename={below}"
    )
    arguments = ["convert", *PARALLEL, "-n", "-B", below, "-F", "raw"]
    arguments += ["-c"] if compress else []
    arguments += ["-r", str(rate)] if rate else []
    with layers.opened([layer], layers.raw(ground)) as source:
        arguments += ["--target-image-opts", source.name, output]
        _run(arguments, base, source.fds, f"apply {layer.name}")


def take_snapshot(fd: int, name: str) -> None:
    """Keep the current state of an open image as an internal snapshot.

    Raises:
        QmpBackupError: it failed.
    """
    image = f"driver=qcow2,file.driver=file,file.filename={path(fd)}"
    arguments = ["snapshot", "-q", "-c", name, "--image-opts", image]
    _run(arguments, fd, [], f"take the snapshot {name}")


def resize(fd: int, format_: str, size: int) -> None:
    """Give an open image another size; what lies beyond is cut off.

    Raises:
        QmpBackupError: it failed.
    """
    arguments = ["resize", "-q", "--shrink", "-f", format_, path(fd), str(size)]
    _run(arguments, fd, [], "set the size of an image")


def _run(arguments: Sequence[str], output: int, fds: Sequence[int], action: str) -> None:
    """Have qemu-img write to an open file, which needs these others, and have it say what went wrong."""
    command = ["qemu-img", *arguments]
    result = process.run(command, pass_fds=[output, *fds], writable=[output])
    if result.code:
        raise failure(result, action)

# SPDX-License-Identifier: Apache-2.0
"""What qemu-img does to images of ours: it makes them, writes others into them, keeps states of them.

An image that is written to is opened by what its own head says, so it must be one that we made and that
nobody else may write to. All go by descriptor. Must not know targets or points.
"""

import errno
import os
from collections.abc import Sequence

from qmpbackup import interrupt, process
from qmpbackup.durable import storage_errors
from qmpbackup.images import layers
from qmpbackup.images.layers import Layer, path
from qmpbackup.images.qcow2 import read_header
from qmpbackup.images.qemu_img import PARALLEL, ZSTD, failure

_FICLONE = 0x40049409  # linux/fs.h
_CHUNK = 16 * 1024 * 1024


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


def copy(source: Layer, output: int) -> None:
    """Copy a file into an empty one, with the head that was checked: programs are going to write where
    that says.

    Raises:
        StorageError: it could not be copied.
    """
    with storage_errors(f"copy {source.name}"):
        _copy_file(source.fd, output)
        os.pwrite(output, source.head, 0)


def _copy_file(source: int, output: int) -> None:
    """Share the blocks of a file where the file system can, else copy it without its holes."""
    import fcntl

    try:
        fcntl.ioctl(output, _FICLONE, source)
        return
    except OSError:
        pass
    size = os.fstat(source).st_size
    os.ftruncate(output, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # nothing but a hole is left
        end = os.lseek(source, at, os.SEEK_HOLE)
        _copy_range(source, output, at, end)
        at = end


def _copy_range(source: int, output: int, at: int, end: int) -> None:
    while at < end:
        interrupt.check()
        view = memoryview(os.pread(source, min(_CHUNK, end - at), at))
        if not view:
            raise OSError(errno.EIO, "the file became shorter")
        while view:
            written = os.pwrite(output, view, at)
            at += written
            view = view[written:]


def apply(
    layer: Layer, base: int, *, below: int = 0, compress: bool = False, rate: int = 0
) -> None:
    """Write what an image holds itself into the one it builds on, and leave the former alone.

    What neither holds stays so, and explicit zeros stay explicit. Only `base` is written to.

    Args:
        layer: the upper image; where its link leads does not matter.
        base: the lower one, open, which becomes as large as a disk as the upper one.
        below: the size of the disk in what the lower one builds on, in bytes (0: it stands alone).
        compress: compress what is written; only for what the lower one does not hold yet.
        rate: bytes a second at most (0: no limit).

    Raises:
        QmpBackupError: it failed; `base` may hold part of the changes.
    """
    size = layer.header.size
    with layers.stand_in(below) as ground:
        _fit(base, size, ground if below else None)
        # Behind the end of what it takes for the backing file, qemu-img writes no zeros.
        os.ftruncate(ground, max(below, size))
        output = (
            f"driver=qcow2,file.driver=file,file.filename={path(base)},"
            f"backing.driver=raw,backing.file.driver=file,backing.file.filename={path(ground)}"
        )
        arguments = ["convert", *PARALLEL, "-n", "-B", path(ground), "-F", "raw"]
        arguments += ["-c"] if compress else []
        arguments += ["-r", str(rate)] if rate else []
        with layers.opened([layer], layers.raw(ground)) as source:
            arguments += ["--target-image-opts", source.name, output]
            _run(arguments, base, source.fds, f"apply {layer.name}")


def _fit(base: int, size: int, ground: int | None) -> None:
    """Let an image on this ground be as large as another; what is new shows zeros."""
    if size > read_header(base, "The merged image").size:
        whole = layers.image(base, layers.raw(ground) if ground is not None else None)
        _run(["resize", "-q", whole.name, str(size)], base, whole.fds, "enlarge the merged image")


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

# SPDX-License-Identifier: Apache-2.0
"""A disk in a folder: what QEMU's own tools make of its chain of files, in processes of their own.

    read   qemu-nbd
    pour   qemu-img copies, while the digests of all files are read: file by file, the same bytes out of
           the same cache; for a device first the digests, then the copy

The files are open descriptors and their heads were checked (`images.layers`). What a digest says is that
of whole files, so what is read here is not proved before those were read: see `service.serve`.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from qmpbackup.errors import DamagedError, StorageError
from qmpbackup.images import merging, qemu_img, qemu_nbd
from qmpbackup.images.layers import Layer, require_unchanged
from qmpbackup.model import StoredDisk
from qmpbackup.nbd import client
from qmpbackup.nbd.client import Connection
from qmpbackup.nbd.library import NbdError
from qmpbackup.process import Child
from qmpbackup.targets import pouring
from qmpbackup.targets.stored_image import Extent, Sink, Unproved

log = logging.getLogger(__name__)

_CONNECTIONS: Final = 8


@dataclass(frozen=True, slots=True)
class Chain:
    """A disk in a folder: its files, the one that stands alone first, open, and what proves them."""

    disk: StoredDisk
    layers: tuple[Layer, ...]
    proof: Unproved


@contextmanager
def opened(chain: Chain, *, to_read: bool) -> "Iterator[FolderImage]":
    """The disk that a chain makes up, or an internal snapshot of its last file, for the block; not
    `to_read` where it is only poured, which needs no server.

    Raises:
        QmpBackupError: qemu-nbd or libnbd is not installed, or the image cannot be opened.
    """
    with ExitStack() as stack:
        socket, disk = "", chain.disk
        if to_read:
            options = qemu_nbd.of_snapshot(disk.snapshot) if disk.snapshot else []
            server = qemu_nbd.serving(chain.layers, options, f"open {disk.id}")
            socket = stack.enter_context(server)
        image = FolderImage(chain, socket)
        stack.callback(image.close)
        yield image


class FolderImage:
    """See `StoredImage`. Several threads read at a time, each over a connection of its own.

    `socket` is that of the program that shows it, if it was opened to be read.
    """

    def __init__(self, chain: Chain, socket: str) -> None:
        self.size = chain.disk.size
        self._chain = chain
        self._disk = chain.disk
        self.socket = socket
        self._free = threading.Semaphore(_CONNECTIONS)
        self._idle: list[Connection] = []

    def close(self) -> None:
        """End all connections."""
        while self._idle:
            self._idle.pop().close()

    def extents(self, start: int, end: int) -> Iterator[Extent]:
        """What QEMU says of the chain."""
        with self._connection() as connection:
            found = [Extent(*each) for each in connection.extents(start, end)]
        yield from found

    def read(self, offset: int, length: int) -> bytes:
        """The bytes as they are in the files."""
        with self._connection() as connection:
            return connection.read(offset, length)

    def peek(self, offset: int, length: int) -> None:
        """Nothing is to be had without asking."""
        del offset, length

    def needs(self, format_: str) -> int:
        """What qemu-img says, which of an internal snapshot it does not."""
        del format_
        if not self._disk.snapshot:
            with suppress(DamagedError):  # the copy says better what is wrong
                return qemu_img.needed_bytes(self._chain.layers)
        return 0

    def pour(self, sink: Sink) -> None:
        """Have qemu-img copy, and read the digests."""
        if sink.is_device:
            log.info(
                "Checking the files of disk %s before %s is written to", self._disk.id, sink.path
            )
            self._chain.proof.prove(_nothing)
        with sink.writing():
            with self._copying(sink) as child:
                if not sink.is_device:
                    self._chain.proof.prove(lambda: _require_room(child))
                self._finish(child, sink)
            if not sink.is_device:
                self._fit(sink)

    def _copying(self, sink: Sink) -> AbstractContextManager[Child]:
        return qemu_img.converting(
            self._chain.layers,
            sink.fd,
            sink.format,
            snapshot=self._disk.snapshot,
            existing=sink.is_device,
        )

    def _finish(self, child: Child, sink: Sink) -> None:
        """What was copied is what the digests stand for."""
        result = child.wait()
        require_unchanged(self._chain.layers)
        if result.code:
            where = f" to {sink.path}" if sink.is_device else ""
            raise qemu_img.failure(result, f"restore disk {self._disk.id}{where}")

    def _fit(self, sink: Sink) -> None:
        """The output is as large as the disk was; only an internal snapshot can have had another size."""
        if self._disk.snapshot and pouring.size_of(sink.fd, sink.format) != self.size:
            merging.resize(sink.fd, sink.format, self.size)

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        with self._free:
            try:
                try:
                    connection = self._idle.pop()
                except IndexError:
                    connection = client.connect(self.socket, "", [client.ALLOCATION])
                yield connection
            except NbdError as error:
                raise StorageError(f"{self._disk.id} cannot be read: {error}.") from error
            self._idle.append(connection)


def _nothing() -> None:
    """There is nothing to look after."""


def _require_room(child: Child) -> None:
    """Stop early where the copy has failed for want of room.

    Raises:
        StorageError: it has.
    """
    if child.failed:
        error = qemu_img.failure(child.wait(), "restore")
        if isinstance(error, StorageError):
            raise error

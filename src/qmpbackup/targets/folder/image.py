# SPDX-License-Identifier: Apache-2.0
"""A disk in a folder, read at any offset: QEMU's own reader of chains, in a process of its own.

The files are open descriptors and their heads were checked (`images.layers`). What a digest says is that
of whole files, so what is read here is not proved before those were read: see `service.serve`.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final

from qmpbackup.errors import StorageError
from qmpbackup.images import qemu_nbd
from qmpbackup.images.layers import Layer
from qmpbackup.nbd import client
from qmpbackup.nbd.client import Connection
from qmpbackup.nbd.library import NbdError
from qmpbackup.targets.interface import Extent

_CONNECTIONS: Final = 8


@contextmanager
def opened(
    layers: Sequence[Layer], size: int, name: str, snapshot: str = ""
) -> "Iterator[FolderImage]":
    """The disk that a chain makes up, or an internal snapshot of its last file, for the block; `name` is
    what messages call it.

    Raises:
        QmpBackupError: qemu-nbd or libnbd is not installed, or the image cannot be opened.
    """
    with ExitStack() as stack:
        options = qemu_nbd.of_snapshot(snapshot) if snapshot else []
        socket = stack.enter_context(qemu_nbd.serving(layers, options, f"open {name}"))
        image = FolderImage(socket, size, name)
        stack.callback(image.close)
        yield image


class FolderImage:
    """See `StoredImage`. Several threads read at a time, each over a connection of its own."""

    def __init__(self, socket: str, size: int, name: str) -> None:
        self.size = size
        self._socket = socket
        self._name = name
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

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        with self._free:
            try:
                try:
                    connection = self._idle.pop()
                except IndexError:
                    connection = client.connect(self._socket, "", [client.ALLOCATION])
                yield connection
            except NbdError as error:
                raise StorageError(f"{self._name} cannot be read: {error}.") from error
            self._idle.append(connection)

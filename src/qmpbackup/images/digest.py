# SPDX-License-Identifier: Apache-2.0
"""Digests of whole files, read through their descriptors. Knows nothing of manifests."""

import os
from collections.abc import Callable

from qmpbackup import interrupt

_CHUNK = 1024 * 1024
"""Measured: more than this leaves the processor's cache, less does not feed several threads."""


def digest(fd: int, each: Callable[[], None] | None = None, head: bytes = b"") -> str:
    """`blake3:<hex>` of an open file, from its first byte to its last.

    `head` takes the place of the first bytes, which are not read (again). `each` is called after every MiB, and ends the reading by raising.

    The file is read, not mapped: an I/O error then is an error here and no SIGBUS.

    Raises:
        OSError: it cannot be read.
        Interrupted: a signal is waiting.
    """
    from blake3 import blake3

    hasher = blake3(head, max_threads=blake3.AUTO)
    buffer = memoryview(bytearray(_CHUNK))
    offset = len(head)
    while length := os.preadv(fd, [buffer], offset):
        hasher.update(buffer[:length])
        offset += length
        interrupt.check()
        if each is not None:
            each()
    return f"blake3:{hasher.hexdigest()}"

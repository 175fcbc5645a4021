# SPDX-License-Identifier: Apache-2.0
"""Files of the configuration are read without waiting: a FIFO in their place would hold up every run."""

import errno
import os
import stat
from pathlib import Path


def read_plain(path: Path, most: int) -> bytes:
    """Up to so many bytes of a plain file, or of one that a link leads to.

    Raises:
        OSError: it cannot be read, or is a FIFO, a device or a folder.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is no plain file")
        return file.read(most)

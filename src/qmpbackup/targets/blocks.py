# SPDX-License-Identifier: Apache-2.0
"""Bytes and zeros at places of an open file or block device, from any thread."""

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from typing import Final

_C: Final = ctypes.CDLL(None, use_errno=True)
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
"""Modes of fallocate(2): linux/falloc.h."""
_START_WRITING: Final = 2
"""SYNC_FILE_RANGE_WRITE of linux/fs.h."""
_BLKZEROOUT: Final = 0x127F
"""linux/fs.h: write zeros to a range of a block device, by whatever means it has."""
_STEP: Final = 256 * 1024 * 1024
"""Bytes that are given to the kernel at a time, which does not come back before they are done."""
_PIECE: Final = 256 * 1024
"""Bytes that are written at once. A whole aligned MiB makes Linux 6.18 with ext4 look for one large
folio of its cache, which was measured to cost four times as long."""
_NOT_ABLE: Final = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ENODEV})


def write(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data`.

    Raises:
        OSError: it could not be written.
    """
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view[:_PIECE], offset)
        view, offset = view[written:], offset + written


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Let the kernel begin to store a range, so that the fsync at the end finds little left to do.

    Where that cannot be (sync_file_range(2)), nothing happens; what fails shows in the fsync.
    """
    start, count = ctypes.c_int64(offset), ctypes.c_int64(length)
    _C.sync_file_range(fd, start, count, _START_WRITING)


def write_zeros(fd: int, offset: int, length: int, each: Callable[[], None]) -> None:
    """Make a range of a block device read as zeros, freeing it where the device can; `each` is called
    now and then.

    Raises:
        OSError: it could not be written.
    """
    end = offset + length
    while offset < end:
        each()
        count = min(_STEP, end - offset)
        if not (_punch(fd, offset, count) or _zero_out(fd, offset, count)):
            for at in range(offset, offset + count, 1024 * 1024):
                write(fd, bytes(min(1024 * 1024, offset + count - at)), at)
        offset += count


def _punch(fd: int, offset: int, length: int) -> bool:
    """Free a range so that it reads as zeros, as Linux promises for block devices; false where that
    cannot be (block/fops.c, blkdev_fallocate)."""
    mode = _PUNCH_HOLE | _KEEP_SIZE
    if _C.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_ABLE:
        return False
    raise OSError(number, os.strerror(number))


def _zero_out(fd: int, offset: int, length: int) -> bool:
    try:
        fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("QQ", offset, length))
    except OSError as error:
        if error.errno in _NOT_ABLE:
            return False
        raise
    return True

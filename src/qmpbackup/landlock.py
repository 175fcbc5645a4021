# SPDX-License-Identifier: Apache-2.0
"""A program that may write to what it was given and to nothing else, where the kernel has Landlock.

A second lock on a door that is shut already: an image that is being written is parsed by its own head,
and behind that may be a server (NFS, CIFS) that answers what it likes. Kernels have it since 5.13;
older ones, and sandboxes that forbid it, run the program without (landlock(7)). Knows descriptors and
system calls; must not know programs.
"""

import ctypes
import os
import stat
import struct
from collections.abc import Sequence
from typing import Final, Self

_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
"""Numbers of the system calls, the same on every architecture but alpha."""
_VERSION: Final = 1
_BENEATH: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_WRITE, _REMOVE_FILE, _MAKE_FILE, _MAKE_SOCKET = 1 << 1, 1 << 5, 1 << 8, 1 << 9
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_MAKING: Final = sum(1 << bit for bit in range(4, 13))
"""To make and to remove names of every kind (linux/landlock.h)."""
_IN_FOLDER: Final = _WRITE | _REMOVE_FILE | _MAKE_FILE | _MAKE_SOCKET


class Confinement:
    """What a program may write to: these open files, what is in these open folders, and `/dev/null`.

    Made before the fork; called in the child, before the program. A context manager that closes it.
    """

    def __init__(self, writable: Sequence[int]) -> None:
        self._library = ctypes.CDLL(None, use_errno=True)
        self._ruleset = self._create()
        if self._ruleset < 0:
            return
        null = os.open(os.devnull, os.O_PATH | os.O_CLOEXEC)
        try:
            for fd in (*writable, null):
                self._allow(fd)
        finally:
            os.close(null)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ruleset >= 0:
            os.close(self._ruleset)

    def __call__(self) -> None:
        """Confine this process, and all that it starts, for ever."""
        if self._ruleset >= 0:
            self._library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            self._library.syscall(_RESTRICT, self._ruleset, 0)

    def _create(self) -> int:
        version = int(self._library.syscall(_CREATE, None, ctypes.c_size_t(0), _VERSION))
        if version < 1:
            return -1
        handled = _WRITE | _MAKING
        handled |= (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
        self._truncate = _TRUNCATE if version >= 3 else 0
        attributes = struct.pack("Q", handled)
        return int(self._library.syscall(_CREATE, attributes, ctypes.c_size_t(8), 0))

    def _allow(self, fd: int) -> None:
        """Files in memory, which have no place in a file system, are allowed without a rule."""
        rights = _WRITE | self._truncate
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            rights |= _IN_FOLDER
        rule = struct.pack("=Qi", rights, fd)
        self._library.syscall(_ADD_RULE, self._ruleset, _BENEATH, rule, 0)


def is_there() -> bool:
    """Whether this kernel lets us confine programs."""
    with Confinement(()) as confinement:
        return confinement._ruleset >= 0  # noqa: SLF001 - its own module

# SPDX-License-Identifier: Apache-2.0
"""Reading many snapshots at once, of which some may be very large, damaged, or gone meanwhile."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Final

from qmpbackup import interrupt
from qmpbackup.errors import DamagedError
from qmpbackup.restic.snapshot import Snapshot
from qmpbackup.restic.storage.interface import Missing

_AT_ONCE: Final = 8
_LARGE: Final = 64 << 10
"""Bytes of a stored snapshot above which it is not read beside others."""


def read_all(
    listed: Sequence[tuple[str, int]],
    load: Callable[[str, int], Snapshot],
    damaged: Callable[[str, DamagedError], None] | None,
    wanted: Callable[[Snapshot], bool],
) -> list[Snapshot]:
    """Those `wanted` of the snapshots that are listed by name and size, oldest first.

    Raises:
        DamagedError: one is damaged, and there is no `damaged` to be told.
        StorageError: the storage fails.
    """
    found: list[Snapshot] = []
    large = threading.Lock()

    def read(name: str, size: int) -> Snapshot | None:
        """One snapshot, if it is wanted; such as name very many paths one after the other."""
        with large if size > _LARGE else nullcontext():
            one = load(name, size)
            return one if wanted(one) else None

    with ThreadPoolExecutor(_AT_ONCE, "snapshots") as threads:
        try:
            waiting = [threads.submit(read, *each) for each in listed]
            for (name, _), future in zip(listed, waiting, strict=True):
                interrupt.check()
                try:
                    one = future.result()
                except Missing:
                    continue  # somebody forgot it meanwhile
                except DamagedError as error:
                    if damaged is None:
                        raise
                    damaged(name, error)
                else:
                    found += [one] if one is not None else []
        finally:
            threads.shutdown(wait=True, cancel_futures=True)
    return sorted(found, key=lambda each: (each.time, each.id))

# SPDX-License-Identifier: Apache-2.0
"""Sizes and counts as people write and read them. Units are powers of 1024, as in all of QEMU's tools."""

import re

from qmpbackup.errors import UsageError

_UNITS = "BKMGTPE"
_SIZE = re.compile(r"(\d+)\s*([KMGTPE]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes from `1048576`, `50M`, `50MiB` or `2G`.

    Raises:
        UsageError: it is no such size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or not text.isascii():
        raise UsageError(f"{text!r} is not a size.", "Write bytes, or a number with K, M, G or T.")
    return int(match[1]) << (10 * _UNITS.index(match[2].upper() or "B"))


def human(size: float) -> str:
    """A size for people: `0 B`, `1023 B`, `1.5 MiB`."""
    if size < 1024:
        return f"{size:.0f} B"
    power = 0
    while size >= 1024 and power < len(_UNITS) - 1:
        size /= 1024
        power += 1
    if round(size, 1) >= 1024 and power < len(_UNITS) - 1:
        size, power = size / 1024, power + 1
    return f"{size:.1f} {_UNITS[power]}iB"


def count_of(number: int, what: str) -> str:
    """As `1 disk`, `2 disks`."""
    return f"{number} {what}{'' if number == 1 else 's'}"

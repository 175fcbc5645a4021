# SPDX-License-Identifier: Apache-2.0
"""Maps of chunks: one byte a chunk, 0 or 1."""

from collections.abc import Iterator


def runs(chunks: bytes | bytearray, value: int) -> Iterator[tuple[int, int]]:
    """The runs of a value in a map, as (first chunk, number of chunks)."""
    start = chunks.find(value)
    while start >= 0:
        end = chunks.find(1 - value, start)
        end = len(chunks) if end < 0 else end
        yield start, end - start
        start = chunks.find(value, end)

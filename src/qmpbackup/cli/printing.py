# SPDX-License-Identifier: Apache-2.0
"""Results on standard output."""

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from qmpbackup.errors import StorageError


def say(*lines: str) -> None:
    """Print lines, and see that they have left.

    Raises:
        StorageError: they could not be written.
        BrokenPipeError: whoever read them has gone.
    """
    with output_errors():
        for line in lines:
            print(line)
        sys.stdout.flush()


@contextmanager
def output_errors() -> Iterator[None]:
    """Turn what goes wrong with standard output in the block into what `say` raises."""
    try:
        yield
    except BrokenPipeError:
        drop_output()
        raise
    except OSError as error:
        drop_output()
        raise StorageError(
            f"Cannot write to standard output: {error.strerror}.", "Look at where it leads."
        ) from error


def say_json(*documents: Mapping[str, Any], indent: int | None = None) -> None:
    """Print documents, one a line unless indented.

    Raises:
        StorageError, BrokenPipeError: as `say`.
    """
    say(*(json.dumps(each, indent=indent) for each in documents))


def drop_output() -> None:
    """Keep Python from trying once more at exit, and complaining then."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = ()
) -> Iterator[str]:
    """Rows for people, below a line of heads, of which those of numbers stand at the `right`; nothing at
    all where there is none."""
    if not rows:
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = (
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        )
        yield "  ".join(cells).rstrip()


def printable(text: str) -> str:
    """Text from elsewhere without anything that a terminal would obey, on one line."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)

# SPDX-License-Identifier: Apache-2.0
"""What qemu-img is asked about images, and how it copies them.

Knows images and descriptors; must not know targets or points. Files are opened by us and handed over
as descriptors, under heads that were checked (`images.layers`). What is written to is in `images.merging`.
"""

import fcntl
import os
import signal
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from qmpbackup import bounded_json, process
from qmpbackup.errors import DamagedError, Exhausted, QmpBackupError, StorageError
from qmpbackup.images.layers import Layer, Openable, opened, path, raw
from qmpbackup.process import Child, Result

_QUICK = 60.0
"""Seconds after which a question about an image counts as hanging."""

ZSTD = ("-o", "compression_type=zstd")

PARALLEL = ("-W", "-m", "8")
"""Requests out of order and eight at a time: measured several times faster than one by one."""

_MOST_MEMORY = 96 * 1024 * 1024
"""Bytes that what qemu-img says of an image may take in memory."""

_FLOCK = "hhqqi4x"
"""`struct flock` of fcntl(2): type, whence, start, length, process."""

_STORAGE_SIGNS = (
    "no space left",
    "disk quota",
    "file too large",
    "read-only file system",
    "while writing",
    "could not resize",
    "could not create",
    "permission denied",
)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What `qemu-img check` found. Leaked clusters waste room and are no damage.

    `compressed` is how many clusters are compressed.
    """

    errors: int
    leaks: int
    message: str = ""
    compressed: int = 0


@contextmanager
def converting(
    layers: Sequence[Layer],
    output: int,
    format_: str,
    *,
    snapshot: str = "",
    existing: bool = False,
    compress: bool = False,
    rate: int = 0,
) -> Iterator[Child]:
    """Copy the contents of a chain into an open file or device; running while the block does.

    `snapshot` names an internal snapshot of the last layer to copy instead of its current state.
    With `existing` the output keeps its size, and zeros are written too. `compress` makes a qcow2
    output zstd; `rate` is bytes a second at most (0: no limit).
    """
    with opened(layers) as source:
        arguments = ["qemu-img", "convert", *PARALLEL, "-O", format_]
        arguments += ["-n"] if existing else []
        arguments += ["-l", f"snapshot.name={_escaped(snapshot)}"] if snapshot else []
        arguments += ["-c", *ZSTD] if compress else []
        arguments += ["-r", str(rate)] if rate else []
        fds = [*source.fds, output]
        with Child(
            [*arguments, source.name, path(output)], pass_fds=fds, writable=[output]
        ) as child:
            yield child


def _escaped(value: str) -> str:
    """A value inside QEMU's key=value lists."""
    return value.replace(",", ",,")


_KILLED = "If nobody ended it, this machine lacks memory."


def failure(result: Result, action: str) -> QmpBackupError:
    """The error for a qemu-img that failed: whose fault it is, from what it said."""
    said = result.messages.lower()
    if result.code == -signal.SIGKILL:
        return QmpBackupError(f"Cannot {action}: {result.reason}.", _KILLED)
    if any(sign in said for sign in _STORAGE_SIGNS):
        hint = "Make room there, and run again." if "no space" in said else ""
        return StorageError(f"Cannot {action}: {result.reason}.", hint)
    return DamagedError(f"Cannot {action}: {result.reason}.")


def check(layer: Layer) -> CheckResult:
    """Check the metadata of one image.

    Raises:
        QmpBackupError: qemu-img could not be run.
        Exhausted: it was ended before it could tell.
    """
    with opened([layer]) as image:
        arguments = ["qemu-img", "check", "--output=json", image.name]
        result = process.run(arguments, pass_fds=image.fds, writable=())
    if result.code < 0:
        raise Exhausted(f"qemu-img check did not come to its end: {result.reason}.", _KILLED)
    # 0 fine, 2 errors, 3 leaks; anything else: the check itself failed (qemu-img(1)).
    if result.code not in {0, 2, 3}:
        return CheckResult(1, 0, result.reason)
    report = _parse(result)
    errors = int(report.get("corruptions", 0)) + int(report.get("check-errors", 0))
    compressed = int(report.get("compressed-clusters", 0))
    return CheckResult(errors, int(report.get("leaks", 0)), compressed=compressed)


def needed_bytes(layers: Sequence[Layer]) -> int:
    """How large a qcow2 file with the contents of a chain becomes, at most and uncompressed.

    Raises:
        QmpBackupError: the chain cannot be read.
    """
    with opened(layers) as source:
        arguments = ["qemu-img", "measure", "-O", "qcow2", "--output=json", source.name]
        result = process.run(arguments, pass_fds=source.fds, writable=())
    if result.code:
        raise failure(result, f"measure {layers[-1].name}")
    return int(_parse(result).get("required", 0))


def snapshot_names(layer: Layer) -> tuple[str, ...]:
    """Names of the internal snapshots of one image, oldest first.

    Raises:
        DamagedError: the image cannot be opened.
    """
    with opened([layer]) as image:
        arguments = ["qemu-img", "info", "--output=json", image.name]
        result = process.run(arguments, pass_fds=image.fds, timeout=_QUICK, writable=())
    if result.code:
        raise failure(result, f"open {layer.name}")
    return tuple(str(each["name"]) for each in _parse(result).get("snapshots", ()))


def held_ranges(layers: Sequence[Layer], ground: int, end: int) -> list[tuple[int, int]]:
    """What these images hold themselves, zeros too, and do not show of what they build on.

    Returns:
        Ranges of the disk up to `end`, as (first byte, byte behind), in order, none touching.

    Raises:
        QmpBackupError: one cannot be read.
    """
    with opened(layers, raw(ground)) as source:
        arguments = ["qemu-img", "map", "--output=json", source.name]
        result = process.run(arguments, pass_fds=source.fds, writable=())
    if result.code:
        raise failure(result, f"read {layers[-1].name}")
    ranges: list[tuple[int, int]] = []
    for line in BytesIO(result.output):  # an object each; there may be millions
        each = _object(line.strip().strip(b"[],"))
        first, behind = each["start"], min(each["start"] + each["length"], end)
        if each["depth"] >= len(layers) or not each["present"] or first >= end:
            continue
        if ranges and ranges[-1][1] == first:
            first = ranges.pop()[0]
        ranges.append((first, behind))
    return ranges


def same_contents(one: Openable, other: Openable) -> bool:
    """Whether two images hold the same bytes, as `qemu-img compare` sees them (sizes may differ
    where the longer one ends in zeros).

    Raises:
        QmpBackupError: one of them cannot be read.
    """
    arguments = ["qemu-img", "compare", "-q", one.name, other.name]
    result = process.run(arguments, pass_fds=[*one.fds, *other.fds], writable=())
    if result.code not in {0, 1}:
        raise failure(result, "compare two images")
    return result.code == 0


def in_use(file: Path) -> bool:
    """Whether a program of QEMU's has this file open, by the locks that all of them hold on images
    (block/file-posix.c); `False` where there is no file, or none that can tell."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, wanted)
    except OSError:  # not every file system has locks
        return False
    finally:
        os.close(fd)
    return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)


def _parse(result: Result) -> dict[str, Any]:
    return _object(result.output)


def _object(text: bytes) -> dict[str, Any]:
    try:
        parsed = bounded_json.load(text, _MOST_MEMORY)
    except ValueError as error:
        raise QmpBackupError(f"qemu-img answered what is no JSON: {error}.") from error
    if not isinstance(parsed, dict):
        raise QmpBackupError("qemu-img answered what is no JSON object.")
    return parsed

# SPDX-License-Identifier: Apache-2.0
"""qemu-img, one function for each thing we ask of it, and the safe way to open a chain of files.

Knows images and descriptors; must not know targets or points. Images that come from a target are
opened by us and handed over as descriptors, with the whole chain spelled out, so that no link inside
an image decides what is read.
"""

import fcntl
import json
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from qmpbackup import bounded_json, process
from qmpbackup.errors import DamagedError, QmpBackupError, StorageError
from qmpbackup.process import Child, Result
from qmpbackup.qemu.qcow2 import Header, read_header

_QUICK = 60.0
"""Seconds after which a question about an image counts as hanging."""

_DEEPEST_SPELLED_OUT = 64
"""Files of a chain up to which it is spelled out as nested JSON, which costs QEMU the cube of the
depth: 0.1 s for 64 files, 9 s for 300."""

_ZSTD = ("-o", "compression_type=zstd")

_PARALLEL = ("-W", "-m", "8")
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
class Layer:
    """An open file of a chain and its name in its folder, as the file above it must call it."""

    fd: int
    name: str


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What `qemu-img check` found. Leaked clusters waste room and are no damage.

    `compressed` is how many clusters are compressed.
    """

    errors: int
    leaks: int
    message: str = ""
    compressed: int = 0


def check_link(layer: Layer, parent: str) -> Header:
    """Read the header of one file, and make sure that it names exactly `parent` (empty: none).

    Raises:
        DamagedError: it names another, or the image needs something outside the chain.
    """
    header = read_header(layer.fd, layer.name)
    _check_header(header, layer.name, parent)
    return header


def virtual_size(layer: Layer) -> int:
    """Bytes of the disk that an image holds.

    Raises:
        DamagedError: it is no qcow2 image.
    """
    return read_header(layer.fd, layer.name).size


def _check_header(header: Header, name: str, parent: str) -> None:
    hint = "The file was changed after the backup; put back an unharmed copy."
    if header.backing != parent:
        found = f"builds on {header.backing!r}" if header.backing else "stands alone"
        wanted = f"build on {parent!r}" if parent else "stand alone"
        raise DamagedError(f"{name} {found}, but should {wanted}.", hint)
    if header.backing and header.backing_format != "qcow2":
        raise DamagedError(f"{name} takes {parent!r} for {header.backing_format or 'any'!r}.", hint)
    if header.external_data or header.encrypted:
        what = "keeps its data in another file" if header.external_data else "is encrypted"
        raise DamagedError(f"{name} {what}, which backups never do.", hint)
    if header.corrupt:
        raise DamagedError(f"{name} is marked as corrupt by QEMU.", hint)


@contextmanager
def opened(layers: Sequence[Layer]) -> Iterator[list[str]]:
    """The arguments by which qemu-img opens the last of `layers`, on top of all the others.

    The descriptors must be passed to the program. `check_link` of each comes first.
    """
    if len(layers) <= _DEEPEST_SPELLED_OUT:
        yield [spelled_out(layers)]
        return
    import tempfile

    # A chain this deep goes by its links, which have been checked; they lead through a folder that
    # holds nothing but our descriptors.
    with tempfile.TemporaryDirectory(prefix="qmpbackup-") as folder:
        for layer in layers:
            (Path(folder) / layer.name).symlink_to(f"/proc/self/fd/{layer.fd}")
        yield ["-f", "qcow2", f"{folder}/{layers[-1].name}"]


def spelled_out(layers: Sequence[Layer], ground: int | None = None) -> str:
    """A name by which QEMU opens these descriptors as one image, the last on top.

    `ground` takes the place of what the first one builds on, see `stand_in`.
    """
    node = None if ground is None else _raw(ground)
    for layer in layers:
        file = {"driver": "file", "filename": f"/dev/fd/{layer.fd}"}
        node = {"driver": "qcow2", "file": file, "backing": node}
    return "json:" + json.dumps(node)


def _raw(fd: int) -> dict[str, Any]:
    return {"driver": "raw", "file": {"driver": "file", "filename": f"/dev/fd/{fd}"}}


@contextmanager
def stand_in(size: int) -> Iterator[int]:
    """The descriptor of a raw image of zeros: in the place of a backing file of this size it shows
    what the images above hold themselves, and lets them be written without touching that file."""
    fd = os.memfd_create("qmpbackup-ground", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


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
        arguments = ["qemu-img", "convert", *_PARALLEL, "-O", format_]
        arguments += ["-n"] if existing else []
        arguments += ["-l", f"snapshot.name={_escaped(snapshot)}"] if snapshot else []
        arguments += ["-c", *_ZSTD] if compress else []
        arguments += ["-r", str(rate)] if rate else []
        fds = [*(layer.fd for layer in layers), output]
        with Child([*arguments, *source, f"/dev/fd/{output}"], pass_fds=fds) as child:
            yield child


def _escaped(value: str) -> str:
    """A value inside QEMU's key=value lists."""
    return value.replace(",", ",,")


def failure(result: Result, action: str) -> QmpBackupError:
    """The error for a qemu-img that failed: whose fault it is, from what it said."""
    said = result.messages.lower()
    if any(sign in said for sign in _STORAGE_SIGNS):
        hint = "Make room there, and run again." if "no space" in said else ""
        return StorageError(f"Cannot {action}: {result.reason}.", hint)
    return DamagedError(f"Cannot {action}: {result.reason}.")


def check(layer: Layer) -> CheckResult:
    """Check the metadata of one image.

    Raises:
        QmpBackupError: qemu-img could not be run.
    """
    name = spelled_out([layer])
    arguments = ["qemu-img", "check", "--output=json", name]
    result = process.run(arguments, pass_fds=[layer.fd])
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
        arguments = ["qemu-img", "measure", "-O", "qcow2", "--output=json", *source]
        result = process.run(arguments, pass_fds=[layer.fd for layer in layers])
    if result.code:
        raise failure(result, f"measure {layers[-1].name}")
    return int(_parse(result).get("required", 0))


def snapshot_names(layer: Layer) -> tuple[str, ...]:
    """Names of the internal snapshots of one image, oldest first.

    Raises:
        DamagedError: the image cannot be opened.
    """
    name = spelled_out([layer])
    arguments = ["qemu-img", "info", "--output=json", name]
    result = process.run(arguments, pass_fds=[layer.fd], timeout=_QUICK)
    if result.code:
        raise failure(result, f"open {layer.name}")
    return tuple(str(each["name"]) for each in _parse(result).get("snapshots", ()))


def create(path: Path, size: int, *, backing: str = "", compress: bool = False) -> None:
    """Create a qcow2 image of `size` bytes; `backing` is only recorded. Into one to `compress` zstd is
    written by whoever compresses.

    Raises:
        StorageError: it could not be created.
    """
    link = ["-u", "-b", backing, "-F", "qcow2"] if backing else []
    options = _ZSTD if compress else ()
    arguments = ["create", "-q", "-f", "qcow2", *link, *options, _plain(path), str(size)]
    _run(arguments, f"create {path}")


def rebase(path: Path, backing: str, *, format_: str = "qcow2") -> None:
    """Change the link of an image to its backing file, and nothing else (`rebase -u`).

    An empty `backing` makes the image stand alone.

    Raises:
        QmpBackupError: it could not be changed.
    """
    link = ["-b", backing, "-F", format_] if backing else ["-b", ""]
    _run(["rebase", "-u", "-f", "qcow2", *link, _plain(path)], f"change the link of {path}")


def apply(layer: Layer, size: int, base: Path, *, rate: int = 0) -> None:
    """Write what an image holds into the image that it builds on, and leave the former alone.

    Args:
        layer: the image, `size` bytes large as a disk; where its link leads does not matter.
        base: the image to write into, which grows to `size`.
        rate: bytes a second at most (0: no limit).

    Raises:
        QmpBackupError: it failed; `base` may hold part of the changes.
    """
    import tempfile

    # qemu-img commits from the top of a chain and wants to write there; so the top is an empty
    # image of our own, and the one that matters lies below it, open for reading only.
    with tempfile.TemporaryDirectory(prefix="qmpbackup-") as folder:
        top = Path(folder) / "top"
        create(top, size)
        into = _plain(base)
        node: dict[str, Any] | None = None
        for filename in (into, f"/dev/fd/{layer.fd}", str(top)):
            file = {"driver": "file", "filename": filename}
            node = {"driver": "qcow2", "file": file, "backing": node}
        limit = ["-r", str(rate)] if rate else []
        arguments = ["qemu-img", "commit", "-q", "-d", *limit, "-b", into]
        result = process.run([*arguments, "json:" + json.dumps(node)], pass_fds=[layer.fd])
    if result.code:
        raise failure(result, f"apply {layer.name}")


def apply_above(
    layer: Layer, base: Layer, ground: int, *, compress: bool = False, rate: int = 0
) -> None:
    """Write what an image holds itself into the one it builds on, which builds on something, too.

    What neither holds stays so, and explicit zeros stay explicit. Only `base` is written to.

    Args:
        layer: the upper image.
        base: the lower one, which becomes as large as a disk as the upper one.
        ground: a `stand_in` of the size of what the lower one builds on.
        compress: compress what is written; only for what the lower one does not hold yet.
        rate: bytes a second at most (0: no limit).

    Raises:
        QmpBackupError: it failed; `base` may hold part of the changes.
    """
    fds = [layer.fd, base.fd, ground]
    size = read_header(layer.fd, layer.name).size
    if size != read_header(base.fd, base.name).size:
        grow = ["qemu-img", "resize", "-q", spelled_out([base], ground), str(size)]
        result = process.run(grow, pass_fds=fds)
        if result.code:
            raise failure(result, f"enlarge {base.name}")
    below = f"/dev/fd/{ground}"
    output = (
        f"driver=qcow2,file.driver=file,file.filename=/dev/fd/{base.fd},"
        f"backing.driver=raw,backing.file.driver=file,backing.file.filename={below}"
    )
    arguments = ["qemu-img", "convert", *_PARALLEL, "-n", "-B", below, "-F", "raw"]
    arguments += ["-c"] if compress else []
    arguments += ["-r", str(rate)] if rate else []
    source = spelled_out([layer], ground)
    result = process.run([*arguments, "--target-image-opts", source, output], pass_fds=fds)
    if result.code:
        raise failure(result, f"apply {layer.name}")


def held_ranges(layers: Sequence[Layer], ground: int, end: int) -> list[tuple[int, int]]:
    """What these images hold themselves, zeros too, and do not show of what they build on.

    Returns:
        Ranges of the disk up to `end`, as (first byte, byte behind), in order, none touching.

    Raises:
        QmpBackupError: one cannot be read.
    """
    arguments = ["qemu-img", "map", "--output=json", spelled_out(layers, ground)]
    result = process.run(arguments, pass_fds=[ground, *(layer.fd for layer in layers)])
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


def take_snapshot(path: Path, name: str) -> None:
    """Keep the current state of an image as an internal snapshot.

    Raises:
        QmpBackupError: it failed.
    """
    _run(["snapshot", "-q", "-c", name, _plain(path)], f"take a snapshot in {path}")


def same_contents(one: str, other: str, *, pass_fds: Sequence[int] = ()) -> bool:
    """Whether two images hold the same bytes, as `qemu-img compare` sees them (sizes may differ
    where the longer one ends in zeros).

    Raises:
        QmpBackupError: one of them cannot be read.
    """
    arguments = ["qemu-img", "compare", "-q", one, other]
    result = process.run(arguments, pass_fds=pass_fds)
    if result.code not in {0, 1}:
        raise failure(result, "compare two images")
    return result.code == 0


def resize(fd: int, format_: str, size: int) -> None:
    """Give an open image another size; what lies beyond is cut off.

    Raises:
        QmpBackupError: it failed.
    """
    arguments = ["qemu-img", "resize", "-q", "--shrink", "-f", format_, f"/dev/fd/{fd}", str(size)]
    result = process.run(arguments, pass_fds=[fd])
    if result.code:
        raise failure(result, "set the size of an image")


def in_use(path: Path) -> bool:
    """Whether a program of QEMU's has this file open, by the locks that all of them hold on images
    (block/file-posix.c); `False` where there is no file, or none that can tell."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
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


def _run(arguments: Sequence[str], action: str) -> None:
    result = process.run(["qemu-img", *arguments])
    if result.code:
        raise failure(result, action)


def _plain(path: Path) -> str:
    """A path that QEMU takes for a path, whatever colons it contains."""
    return os.path.abspath(path)  # noqa: PTH100 - must not follow links


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

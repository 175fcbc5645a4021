# SPDX-License-Identifier: Apache-2.0
"""Write the state of a chain into a new file: `qmprestore merge`. The backup is only read."""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qmpbackup import durable, interrupt
from qmpbackup.durable import make_folders, storage_errors
from qmpbackup.errors import DamagedError, UsageError
from qmpbackup.images.layers import require_unchanged
from qmpbackup.ownership import refuse_planted_links
from qmpbackup.plan.merge import PARTIAL
from qmpbackup.service.rebase import build
from qmpbackup.service.rebase import source as sources
from qmpbackup.service.rebase.merge import refuse_unfinished
from qmpbackup.service.rebase.place import Place
from qmpbackup.service.rebase.source import LINK_HINT, Request, Source

log = logging.getLogger(__name__)


def export(request: Request, output: Path) -> str:
    """Write the state that a request means into a new qcow2 file.

    Folders of `output` that are missing are made.

    Returns:
        The name of the image whose state it is.

    Raises:
        QmpBackupError: there is no file; nothing else was changed.
    """
    place = Place.find(request.folder)
    with interrupt.held(), place.reading(request.lock_wait):
        refuse_unfinished(place)
        _check_output(place, output)
        source = sources.select(place, request)
        _check_links(source)
        with sources.opened(source) as layers:
            if not request.skip_check:
                sources.verify(source, layers)
            needed = build.flat_bytes(layers)
            with _new_file(output) as fd:
                build.require_room(output.parent, needed, "The new image")
                log.info("Merging %s into %s", ", ".join(source.names), output)
                build.flatten(layers, fd, request.rate)
                require_unchanged(layers)
                with storage_errors(f"write {output}"):
                    os.fsync(fd)
                interrupt.check()
    return source.names[-1]


def _check_output(place: Place, output: Path) -> None:
    with storage_errors(f"look at {output}"):
        refuse_planted_links(output.parent)
    if os.path.lexists(output):
        raise UsageError(f"{output} exists already.", "Choose another --targetfile.")
    top = place.target.path if place.target else place.folder
    where = output.parent.resolve()
    if where == top or top in where.parents:
        raise UsageError(
            f"{output} lies in the backup itself, which stays as it is.",
            "Choose a --targetfile elsewhere.",
        )


def _check_links(source: Source) -> None:
    if source.misplaced:
        bond = source.misplaced[0]
        raise DamagedError(
            f"The link of {bond.child} to {bond.parent} leads through another folder.", LINK_HINT
        )
    if source.assumed:
        log.warning(
            "%s has no link; taking the order from the numbers in the names.",
            source.assumed[0].child,
        )


@contextmanager
def _new_file(output: Path) -> Iterator[int]:
    """A file that gets its name at the end of the block, and is gone if that fails."""
    with ExitStack() as stack:
        with storage_errors(f"write to {output.parent}"):
            make_folders(output.parent)
            folder = os.open(output.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, folder)
            temporary = output.name + PARTIAL
            fd = _create(folder, temporary, output)
            stack.callback(os.close, fd)
            stack.callback(_remove, folder, temporary)
        yield fd
        with storage_errors(f"write {output}"):
            _publish(folder, temporary, output)
            durable.sync_folder(folder)


def _create(folder: int, name: str, output: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, 0o600, dir_fd=folder)
    except FileExistsError:
        raise UsageError(
            f"{output}{PARTIAL} exists: another run is writing it, or one that died has left it.",
            "If no other run does, remove it.",
        ) from None


def _publish(folder: int, temporary: str, output: Path) -> None:
    """Give the file its name; a file that has appeared there meanwhile is never replaced."""
    try:
        os.link(temporary, output.name, src_dir_fd=folder, dst_dir_fd=folder)
    except FileExistsError:
        raise UsageError(f"{output} has appeared meanwhile.", "Choose another place.") from None
    except OSError:  # a file system without hard links
        if os.path.lexists(output):
            raise UsageError(f"{output} has appeared meanwhile.", "Choose another place.") from None
        os.rename(temporary, output.name, src_dir_fd=folder, dst_dir_fd=folder)


def _remove(folder: int, name: str) -> None:
    with suppress(OSError):
        os.unlink(name, dir_fd=folder)

# SPDX-License-Identifier: Apache-2.0
"""Write the state of a chain into a new file: `qmprestore merge`. The backup is only read."""

import logging
import os
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.durable import storage_errors
from qmpbackup.errors import UsageError
from qmpbackup.images.layers import require_unchanged
from qmpbackup.ownership import refuse_planted_links
from qmpbackup.service.original.choosing import Request, require_links, select
from qmpbackup.service.original.merge import refuse_unfinished
from qmpbackup.service.original.named_folder import NamedFolder
from qmpbackup.service.restore.place import partial_file
from qmpbackup.targets.folder import chain_files, merged_image

log = logging.getLogger(__name__)


def export(request: Request, output: Path) -> str:
    """Write the state that a request means into a new qcow2 file.

    Folders of `output` that are missing are made.

    Returns:
        The name of the image whose state it is.

    Raises:
        QmpBackupError: there is no file; nothing else was changed.
    """
    place = NamedFolder.find(request.folder)
    with interrupt.held(), place.reading(request.lock_wait):
        refuse_unfinished(place)
        _check_output(place, output)
        source = select(place, request)
        require_links(source, assume=True)
        with chain_files.opened(source) as layers:
            if not request.skip_check:
                chain_files.verify(source, layers)
            needed = merged_image.flat_bytes(layers)
            with partial_file(output, request.lock_wait, "qcow2") as new:
                merged_image.require_room(output.parent, needed, "The new image")
                log.info("Merging %s into %s", ", ".join(source.names), output)
                with new.writing():
                    merged_image.flatten(layers, new.fd, request.rate)
                require_unchanged(layers)
                interrupt.check()
                new.finish(force=False)
    return source.names[-1]


def _check_output(place: NamedFolder, output: Path) -> None:
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

# SPDX-License-Identifier: Apache-2.0
"""The folder of one disk: its images, whether they belong to a target or not."""

from dataclasses import dataclass
from pathlib import Path

from qmpbackup.targets.folder.files import StoredFiles
from qmpbackup.targets.folder.journal import MergeJournal


@dataclass(frozen=True, slots=True)
class DiskFolder:
    """A folder with images of a disk; `target` is what it belongs to, if anything."""

    folder: Path
    target: StoredFiles | None = None

    @property
    def name(self) -> str:
        """The folder's name, as manifests call it."""
        return self.folder.name

    @property
    def journal(self) -> MergeJournal:
        """Where a merge in this folder is written down."""
        return MergeJournal(self.folder, self.target.path if self.target else None)

# SPDX-License-Identifier: Apache-2.0
"""A folder that a user names as a target: how it is opened, and whether it is well."""

import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

from qmpbackup.durable import storage_errors
from qmpbackup.errors import NoSuchTarget, QmpBackupError, UsageError
from qmpbackup.folder import Folder
from qmpbackup.model import Point, VmIdentity
from qmpbackup.plan.finding import Finding, Health
from qmpbackup.plan.sizes import human
from qmpbackup.targets.folder.target import DirectoryTarget
from qmpbackup.targets.folder.vacant import Vacant, tag_of
from qmpbackup.targets.interface import Found, Made, Opening, Wish
from qmpbackup.targets.inventory import Inventory
from qmpbackup.targets.overview import Overview


@dataclass(frozen=True, slots=True)
class FolderEntrance:
    """See `Entrance`."""

    path: Path

    @property
    def chunk(self) -> int:
        """QEMU fills files."""
        return 0

    @property
    def holds_several(self) -> bool:
        """It has one VM."""
        return False

    @property
    def spelled(self) -> str:
        """The path from the root."""
        return str(self.path.absolute())

    def asked(self) -> Self:
        """There is nothing to ask for."""
        return self

    @staticmethod
    def environment() -> Mapping[str, str]:
        """Nothing."""
        return {}

    def handed_on(self) -> tuple[str, Mapping[str, str]]:
        """Its path; no secret of anybody's is in that."""
        return self.spelled, {}

    @contextmanager
    def opened(self, vm: str = "") -> Iterator[DirectoryTarget]:
        """Open it to read from; it has one VM, which no user needs to name."""
        if vm:
            raise UsageError("A folder holds the points of one VM.", "Leave --vm out.")
        yield DirectoryTarget.open(self.path)

    @contextmanager
    def of(self, vm: VmIdentity) -> Iterator[DirectoryTarget]:
        """Open it; whose it is, matters to those who write."""
        del vm
        yield DirectoryTarget.open(self.path)

    def newest(self, vm: str) -> Point | None:
        """The newest point, which must be of the VM that is meant."""
        target = DirectoryTarget.peek(self.path)
        points = target.load().points if target else ()
        if not points:
            return None
        identity = points[-1].vm.identity
        if vm and vm not in {identity.name, identity.uuid}:
            raise UsageError(
                f"The newest point in {self.path} is of another VM, {identity.name}.",
                "Leave --vm out, or use the target of this VM.",
            )
        return points[-1]

    def overview(self, now: datetime) -> Overview:
        """What it holds of its VM, by the newest manifest."""
        from qmpbackup.targets.folder import overview

        return overview.overview(DirectoryTarget.open(self.path), now)

    def advice(
        self, vm: VmIdentity, wait: float, *, strict: bool
    ) -> Generator[Finding, None, Found | None]:
        """Whether it can be written to, what was left half done, and what is damaged."""
        del vm, wait, strict
        path = self.path
        if path.exists() and not path.is_dir():
            todo = "Choose another path for the target."
            yield Finding("target", Health.PROBLEM, f"{path} is not a folder", todo)
            return None
        try:
            target = DirectoryTarget.open(path)
        except NoSuchTarget:
            yield from _writing(path)
            return Found(Vacant(path), Inventory(), earlier=tag_of(path))
        yield from _writing(path)
        stored = yield from _of_target(target, path)
        return Found(target, stored)

    def opening(self, wish: Wish) -> AbstractContextManager[Opening]:
        """Nothing takes time here."""
        from qmpbackup.targets.folder.opening import FolderOpening

        return nullcontext(FolderOpening(self.path, wish))

    def sweep(self, wait: float) -> None:
        """Nothing: files that go, go at once."""
        del wait
        with self.opened() as target:
            target.load()

    def make(self) -> Made:
        """Refuse: the first backup does it."""
        raise UsageError(
            f"{self.path} is a folder, which needs no init: the first backup makes it.",
            f"For a repository in that folder: --target restic:{self.path}",
        )


def _writing(path: Path) -> Iterator[Finding]:
    """Whether backups can be written there, tried with a file that has no name."""
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    try:
        with storage_errors(f"open {there}"), Folder.open(there.resolve()) as folder:
            folder.require_random_access()
    except QmpBackupError as error:
        yield Finding("target", Health.PROBLEM, error.message, error.hint)


def _of_target(target: DirectoryTarget, path: Path) -> Generator[Finding, None, Inventory]:
    for folder in target.interrupted():
        text = f"a merge in {folder} was interrupted, or is under way"
        yield Finding("target", Health.ADVICE, text, target.merge_hint(folder))
    stored = target.load()
    for damage in (*stored.damaged, *stored.marked):
        yield Finding(
            "target",
            Health.PROBLEM,
            f"{damage.path}: {damage.reason}",
            "Run `qmpbackup verify`; the next `auto` starts a new chain where needed.",
        )
    state = os.statvfs(path)
    free = human(state.f_bavail * state.f_frsize)
    yield Finding("target", Health.FINE, f"{path} holds {len(stored.points)} points, {free} free")
    return stored

# SPDX-License-Identifier: Apache-2.0
"""A folder that is to take a point: found or made, and held."""

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from qmpbackup.errors import StorageError
from qmpbackup.model import VmIdentity
from qmpbackup.targets.folder.target import DirectoryTarget
from qmpbackup.targets.folder.vacant import Vacant, tag_of
from qmpbackup.targets.interface import Found, Target, Wish
from qmpbackup.targets.inventory import Inventory

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FolderOpening:
    """See `Opening`."""

    path: Path
    wish: Wish

    @contextmanager
    def found(self, vm: VmIdentity) -> Iterator[Found]:
        """The target where there is one; else the ground for one, with the id that it will have."""
        target = DirectoryTarget.peek(self._place())
        if target is None:
            yield Found(Vacant(self._place(), self._new_id()), Inventory(), earlier=self._earlier())
        elif self.wish.look_only:
            stored = target.load()
            target.require(vm, "" if self.wish.monthly else self.wish.uuid)
            target.require_points(vm, stored)
            yield Found(target, stored)
        else:
            with self._held(vm) as found:
                yield found

    @contextmanager
    def made(self, vm: VmIdentity, new_id: str) -> Iterator[Target]:
        """A new target, with the id that was planned."""
        with self._held(vm, new_id) as found:
            if found.target is None or found.target.id != new_id or found.stored.points:
                raise StorageError(
                    f"The target {found.ground.name} was made by somebody else just now.",
                    "Run again.",
                )
            yield found.target

    @contextmanager
    def _held(self, vm: VmIdentity, new_id: str = "") -> Iterator[Found]:
        target = self._open(vm, new_id)
        with target.writing(self.wish.lock_wait) as cleared:
            for done in cleared:
                log.info("Cleaned up after a run that died: %s.", done)
            stored = target.load()
            target.require_points(vm, stored)
            yield Found(target, stored, target)

    def _open(self, vm: VmIdentity, new_id: str) -> DirectoryTarget:
        uuid = self.wish.uuid
        whole = DirectoryTarget.open_or_create(self.path, vm, uuid=uuid, id_hint=new_id)
        if not self.wish.monthly:
            return whole
        # All months share one id, so that the first full of a month retires last month's bitmaps.
        return DirectoryTarget.open_or_create(self._place(), vm, id_hint=whole.id)

    def _new_id(self) -> str:
        """The id that a new target gets; it begins with a tag of the place, see `_earlier`."""
        whole = DirectoryTarget.peek(self.path) if self.wish.monthly else None
        made = f"{tag_of(self.path)}{secrets.token_hex(4)}"
        return (whole.id if whole else "") or self.wish.uuid or made

    def _earlier(self) -> str:
        """See `Found`."""
        if self.wish.monthly and DirectoryTarget.peek(self.path):
            return ""
        return f"{self.wish.uuid}/" if self.wish.uuid else tag_of(self.path)

    def _place(self) -> Path:
        if not self.wish.monthly:
            return self.path
        return self.path / f"{datetime.now(UTC).astimezone():%Y-%m}"

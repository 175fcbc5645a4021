# SPDX-License-Identifier: Apache-2.0
"""What a repository holds of all VMs, at one look: by its snapshots, and the newest manifest of each.

Of a hundred thousand snapshots only those are read that came since the last look, and which VM each is
of is told by its tags, where they do (`catalog`). What is said of the newest point is read in its
manifest: a snapshot that holds none is no point, whatever it calls itself.

Nothing is locked: who only looks must neither wait for a sweep nor need the right to write.
"""

import json
import threading
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from qmpbackup.errors import DamagedError, StorageError
from qmpbackup.model import Point, VmIdentity
from qmpbackup.restic import snapshot_table
from qmpbackup.restic.repository import Repository
from qmpbackup.restic.snapshot import Snapshot
from qmpbackup.restic.snapshot_table import Tabled
from qmpbackup.restic.storage.interface import Missing
from qmpbackup.restic.storage.location import is_remote
from qmpbackup.targets.inventory import Damage
from qmpbackup.targets.overview import HeldVm, Overview, is_ahead
from qmpbackup.targets.repository import catalog
from qmpbackup.targets.repository.whose import Key, key_of, vm_name

_TABLE = "vms-1"
"""What the table of snapshots is called in the cache; the number is that of what is noted."""


def overview(repository: Repository, now: datetime) -> Overview:
    """What there is of all VMs.

    Raises:
        StorageError: the repository cannot be read.
    """
    reader = _Reader(repository)
    table = snapshot_table.read(repository, _TABLE, reader.note, reader.damaged)
    vms: dict[Key, list[Tabled]] = {}
    identities = [_identity(note) for note in table.notes]
    for row in table.rows:
        identity = identities[row.note]
        if identity is not None:
            vms.setdefault(key_of(identity), []).append(row)
    found = []
    for rows in vms.values():
        rows.sort(key=lambda row: row.micros, reverse=True)
        named = identities[rows[0].note] or VmIdentity()
        found.append(reader.held(named, rows, now))
    name = repository.storage.name
    folder = None if is_remote(name) else Path(name)
    return Overview(tuple(found), tuple(reader.broken), folder)


class _Reader:
    """Reads what has to be read."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._syncing = threading.Lock()
        self._syncs = 0
        self.broken: list[Damage] = []

    def damaged(self, name: str, error: DamagedError) -> None:
        """Take note of a snapshot that cannot be read."""
        self.broken.append(Damage(f"snapshots/{name}", error.message))

    def note(self, snapshot: Snapshot) -> str:
        """The VM that a snapshot is of, or nothing where it is no point.

        Raises:
            DamagedError: it looks like a point and is none.
            StorageError: the storage fails.
        """
        if not catalog.may_be_ours(snapshot):
            return ""
        identity = catalog.hint(snapshot, by_name=True)
        if identity is None:
            point = self._point(snapshot)
            if point is None:
                return ""
            identity = point.vm.identity
        # Without a UUID it is known by the name that paths have, as not all of its tags say another.
        name = identity.name if identity.uuid else vm_name(identity)
        return json.dumps([identity.uuid, name, "", identity.host])

    def held(self, identity: VmIdentity, rows: Sequence[Tabled], now: datetime) -> HeldVm:
        """What there is of a VM, whose snapshots come newest first."""
        ahead = sum(is_ahead(row.time, now) for row in rows)
        damaged = 0
        for snapshot in self._snapshots(rows[ahead:]):
            try:
                point = self._point(snapshot)
            except DamagedError as error:
                self.damaged(snapshot.id, error)
                damaged += 1
                continue
            if point is not None:
                return HeldVm(point.vm.identity, len(rows), point, damaged, ahead)
        return HeldVm(identity, len(rows), None, damaged, ahead)

    def _snapshots(self, rows: Sequence[Tabled]) -> Iterator[Snapshot]:
        for row in rows:
            try:
                yield self._repository.snapshot(row.name.hex())
            except Missing:
                continue  # somebody forgot it meanwhile

    def _point(self, snapshot: Snapshot) -> Point | None:
        """The point that a snapshot holds. One that cannot be read is looked for again, as a sweep may
        have moved it since the index was read."""
        if self._repository.cached(catalog.cache_name(snapshot)) is None:
            self._sync()
        try:
            return catalog.find_point(self._repository, snapshot)
        except StorageError:
            raise
        except DamagedError:
            if not self._sync(most=2):
                raise
            return catalog.find_point(self._repository, snapshot)

    def _sync(self, most: int = 1) -> bool:
        """Read the index, `most` so many times in all; whether it was."""
        with self._syncing:
            if self._syncs >= most:
                return False
            self._syncs += 1
            self._repository.index.sync(self._repository, self._broken_index)
            return True

    def _broken_index(self, name: str, error: DamagedError) -> None:
        damage = Damage(f"index/{name}", error.message)
        if damage not in self.broken:
            self.broken.append(damage)


def _identity(note: str) -> VmIdentity | None:
    return VmIdentity(*json.loads(note)) if note else None

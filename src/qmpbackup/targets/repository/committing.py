# SPDX-License-Identifier: Apache-2.0
"""How a point appears in a repository: trees, packs, indexes, and last of all its snapshot."""

import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime

from qmpbackup import __version__
from qmpbackup.model import Point
from qmpbackup.restic.pack import BlobType
from qmpbackup.restic.snapshot import Snapshot
from qmpbackup.restic.tree import Node
from qmpbackup.restic.tree import encode as encode_tree
from qmpbackup.restic.writer import Writer
from qmpbackup.targets import manifest
from qmpbackup.targets.names import folder_name
from qmpbackup.targets.repository import catalog
from qmpbackup.targets.repository.catalog import MANIFEST, RAW
from qmpbackup.targets.repository.chunk_list import ChunkList
from qmpbackup.targets.repository.points import VmPoints


def commit(points: VmPoints, writer: Writer, point: Point, disks: Mapping[str, ChunkList]) -> Point:
    """Make a point appear: trees, packs, indexes, and last of all its snapshot.

    Raises:
        QmpBackupError: there is no such point, and nothing refers to what was written.
    """
    parent = points.snapshot_called(point.parent or "")
    data = manifest.encode(point)
    manifest_id = writer.add_now(BlobType.DATA, data)
    nodes = [_file(MANIFEST, len(data), manifest_id, point.time)]
    for disk in point.disks:
        contents = disks[disk.id]
        name = disk.name
        nodes.append(_file(name, contents.size, contents.chunks, point.time))
    folder = writer.add_large(BlobType.TREE, lambda: encode_tree(nodes))
    top = [_folder(points.vm, folder, point.time)]
    root = writer.add_large(BlobType.TREE, lambda: encode_tree(top))
    writer.flush()
    points.repository.save_snapshot(
        Snapshot(
            time=point.time.astimezone(),  # restic counts days by it
            tree=root,
            paths=(f"/{points.vm}",),
            hostname=points.identity.host,
            username=_user(),
            uid=os.geteuid(),
            gid=os.getegid(),
            tags=catalog.tags_of(points.identity, point.id),
            parent=parent.id if parent else None,
            program_version=f"qmpbackup {__version__}",
            summary=_summary(point, disks, writer, is_first=parent is None),
        )
    )
    points.repository.cache(f"point-{root.hex()}", data)
    return point


def disk_file(vm: str, disk_id: str) -> str:
    """Where a snapshot has a disk: `<vm>/<disk>.raw`."""
    return f"{vm}/{folder_name(disk_id)}{RAW}"


def _file(name: str, size: int, content: bytes, time: datetime) -> Node:
    return replace(_node(name, time), type="file", mode=0o600, size=size, content=content)


def _folder(name: str, subtree: bytes, time: datetime) -> Node:
    # Go's os.FileMode has the bit of folders at the top (io/fs, ModeDir).
    return replace(_node(name, time), type="dir", mode=(1 << 31) | 0o700, subtree=subtree)


def _node(name: str, time: datetime) -> Node:
    return Node(
        name=name,
        type="file",
        mode=0o600,
        mtime=time,
        atime=time,
        ctime=time,
        uid=os.geteuid(),
        gid=os.getegid(),
        user=_user(),
        group="",
        inode=0,
        device_id=0,
        links=1,
        size=0,
        content=b"",
        subtree=None,
    )


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return ""


def _summary(
    point: Point, disks: Mapping[str, ChunkList], writer: Writer, *, is_first: bool
) -> dict[str, object]:
    """What restic 0.17 and later show of a snapshot (doc/design.rst, "Snapshots")."""
    files = len(disks) + 1
    return {
        "backup_start": point.time,
        "backup_end": datetime.now(point.time.tzinfo),
        "files_new": files if is_first else 0,
        "files_changed": 0 if is_first else files,
        "files_unmodified": 0,
        "dirs_new": 1 if is_first else 0,
        "dirs_changed": 0 if is_first else 1,
        "dirs_unmodified": 0,
        "data_blobs": writer.new_blobs,
        "tree_blobs": 2,
        "data_added": writer.new_bytes,
        "data_added_packed": writer.stored,
        "total_files_processed": files,
        "total_bytes_processed": sum(each.size for each in disks.values()),
    }

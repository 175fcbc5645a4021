# SPDX-License-Identifier: Apache-2.0
"""A chain in the folder of a disk, or neighbours out of one: opened, and verified.

With manifests, or, in a folder that has none, by the links inside the images. Must not know which files
were meant, nor what is done with them.
"""

import logging
import os
from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime

from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError
from qmpbackup.folder import Folder
from qmpbackup.images import qemu_img
from qmpbackup.images.layers import Layer, check_link
from qmpbackup.images.qcow2 import read_header
from qmpbackup.model import Point, StoredDisk
from qmpbackup.plan import chain, lineage
from qmpbackup.plan.chain import Link
from qmpbackup.plan.lineage import Bond, LinkedImage
from qmpbackup.targets.folder import chains
from qmpbackup.targets.folder.disk_folder import DiskFolder
from qmpbackup.targets.folder.files import StoredFiles

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChainFiles:
    """A chain: the names of its files, the full first; or neighbours out of one (`part`).

    `links` and `points` are empty without manifests. `children` are backups that build on files of
    the chain and are not part of it, `strays` other files that do, such as overlays of an owner.
    `assumed` and `misplaced` are as in `Lineage`.
    """

    place: DiskFolder
    names: tuple[str, ...]
    children: tuple[Bond, ...] = ()
    strays: tuple[Bond, ...] = ()
    links: tuple[Link, ...] = ()
    points: tuple[Point, ...] = ()
    assumed: tuple[Bond, ...] = ()
    misplaced: tuple[Bond, ...] = ()

    @property
    def times(self) -> tuple[datetime | None, ...]:
        """The instant of the state that each file holds, as far as it is known."""
        if self.links:
            return tuple(link.point.time for link in self.links)
        # A full may have been merged into since it got its name.
        return (None, *(lineage.time_of(name) for name in self.names[1:]))


def part(place: DiskFolder, points: Sequence[Point], links: Sequence[Link]) -> ChainFiles:
    """Neighbours out of a chain of manifests, the lowest first.

    Raises:
        StorageError: the folder cannot be read.
    """
    names = tuple(link.disk.name for link in links)
    states = {
        disk.name
        for point in points
        for disk in point.disks
        if disk.file.startswith(f"{place.name}/")
    }
    children = tuple(children_of(points, links))
    return ChainFiles(
        place, names, children, strays(place, states, names), tuple(links), tuple(points)
    )


def image_of(folder: Folder, name: str) -> LinkedImage:
    """An image, and what it builds on, as far as it says so."""
    fd = folder.open_file(name)
    try:
        return LinkedImage(name, read_header(fd, name).backing)
    except DamagedError:
        return LinkedImage(name)  # no qcow2: it has no link, and is refused where a chain needs it
    finally:
        os.close(fd)


def children_of(points: Sequence[Point], links: Sequence[Link]) -> Iterator[Bond]:
    """Backups that build on files of a chain and are not part of it."""
    inside = {link.point.id for link in links}
    for link in links:
        for child in chain.children(points, link.point.id, link.disk.id):
            disk = child.disk(link.disk.id)
            if disk is not None and child.id not in inside:
                yield Bond(disk.name, link.disk.name)


def strays(place: DiskFolder, backups: Container[str], names: Sequence[str]) -> tuple[Bond, ...]:
    """Files in the folder that are none of `backups` and build on one of `names`."""
    found: list[Bond] = []
    with storage_errors(f"read {place.folder}"), Folder.open(place.folder) as folder:
        for name in folder.names():
            backing = "" if name in backups else _link_of(folder, name).rpartition("/")[2]
            if backing in names:
                found.append(Bond(name, backing))
    return tuple(found)


def _link_of(folder: Folder, name: str) -> str:
    try:
        return image_of(folder, name).backing
    except (DamagedError, FileNotFoundError):
        return ""  # no plain file, or the unfinished file of a run that has just ended


@contextmanager
def opened(source: ChainFiles) -> Iterator[list[Layer]]:
    """Open the files of a chain and check lengths, headers and links.

    Raises:
        DamagedError: they are not what manifests, or the chain, say.
        StorageError: they cannot be opened.
    """
    if source.links:
        last = source.links[-1]
        with chains.opened(_target(source), source.points, last.point, last.disk) as files:
            yield [file.layer for file in files[-len(source.names) :]]
        return
    chains.allow_open_files(len(source.names))
    with ExitStack() as stack:
        layers = _open_layers(source, stack)
        for layer, parent in zip(layers, ("", *source.names), strict=False):
            check_link(layer, _expected_link(source, layer, parent))
        yield layers


def _expected_link(source: ChainFiles, layer: Layer, parent: str) -> str:
    if any(bond.child == layer.name for bond in source.assumed):
        return ""
    if any(bond.child == layer.name for bond in source.misplaced):
        return layer.header.backing  # to be rewritten, and not followed
    return parent


def _open_layers(source: ChainFiles, stack: ExitStack) -> list[Layer]:
    layers: list[Layer] = []
    with storage_errors(f"read {source.place.folder}"), Folder.open(source.place.folder) as folder:
        for name in source.names:
            fd = folder.open_file(name)
            stack.callback(os.close, fd)
            layers.append(Layer.of(fd, name))
    return layers


def verify(source: ChainFiles, layers: Sequence[Layer]) -> None:
    """Prove the files of a chain: by the digests in manifests, else by QEMU's own check.

    Raises:
        DamagedError: one is damaged.
    """
    if source.links:
        for link, layer in zip(source.links, layers, strict=True):
            log.info("Verifying %s", layer.name)
            chains.check_digest(_target(source), link.disk, layer)
        return
    for layer in layers:
        log.info("Checking %s", layer.name)
        found = qemu_img.check(layer)
        if found.errors:
            said = found.message or f"{found.errors} errors"
            raise DamagedError(
                f"qemu-img check finds {layer.name} damaged: {said}.",
                "Put back an unharmed copy of it.",
            )


@contextmanager
def opened_child(source: ChainFiles, name: str) -> Iterator[tuple[Layer, StoredDisk | None]]:
    """Open an image that builds on the chain; its record is `None` without manifests.

    Raises:
        DamagedError: it is not as long as its manifest says.
    """
    disk = _record_of(source, name)
    with storage_errors(f"open {name}"), Folder.open(source.place.folder) as folder:
        fd = folder.open_file(name)
    try:
        if disk is not None:
            chains.check_length(_target(source), disk, fd)
        with storage_errors(f"read {name}"):
            layer = Layer.of(fd, name)
        yield layer, disk
    finally:
        os.close(fd)


def verify_child(source: ChainFiles, layer: Layer, disk: StoredDisk) -> None:
    """Prove an image that builds on the chain by its digest.

    Raises:
        DamagedError: it is damaged.
    """
    log.info("Verifying %s", disk.file)
    chains.check_digest(_target(source), disk, layer)


def _record_of(source: ChainFiles, name: str) -> StoredDisk | None:
    file = f"{source.place.name}/{name}"
    disks = (disk for point in source.points for disk in point.disks if disk.file == file)
    return next(disks, None)


def _target(source: ChainFiles) -> StoredFiles:
    if source.place.target is None:
        raise ValueError("a chain of manifests outside of a target")
    return source.place.target

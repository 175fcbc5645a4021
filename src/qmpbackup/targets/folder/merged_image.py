# SPDX-License-Identifier: Apache-2.0
"""The merged image: made as a new file beside the full, proved against the chain, made durable.

The files of the chain are only read. Must not know manifests or what happens afterwards.
"""

import logging
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError, StorageError
from qmpbackup.folder import Folder
from qmpbackup.images import merging, qemu_img, qemu_nbd
from qmpbackup.images.digest import digest
from qmpbackup.images.layers import Layer, opened, raw, require_unchanged, stand_in
from qmpbackup.plan.merge import MERGED, PARTIAL, Contents, MergePlan, Tag
from qmpbackup.plan.sizes import human

log = logging.getLogger(__name__)

_SPARE = 4 * 1024 * 1024
"""Bytes beyond the images themselves: manifests, a journal, a folder's growth."""


def require_room(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin what cannot fit.

    Raises:
        StorageError: fewer than `needed` bytes are free in the folder.
    """
    with storage_errors(f"look at {folder}"):
        state = os.statvfs(folder)
    free = state.f_bavail * state.f_frsize
    if free < needed:
        raise StorageError(
            f"{what} needs up to {human(needed)} in {folder}, where {human(free)} are free.",
            "Make room there; or let `qmprestore merge --targetfile` write to another place.",
        )


def needed_bytes(plan: MergePlan, layers: Sequence[Layer]) -> int:
    """The most that the merged image can take, in bytes."""
    if plan.flattens:
        return flat_bytes(layers)
    with storage_errors(f"look at {layers[0].name}"):
        full = os.fstat(layers[0].fd).st_size
        pack = plan.below is not None and any(compressed([layer]) for layer in layers)
        packed = sum(os.fstat(layer.fd).st_size for layer in layers) if pack else 0
    return full + packed + sum(qemu_img.needed_bytes([layer]) for layer in layers[1:]) + _SPARE


def flat_bytes(layers: Sequence[Layer]) -> int:
    """The most that a new image with the contents of a chain can take, in bytes."""
    needed = qemu_img.needed_bytes(layers)
    if compressed(layers):
        # What is compressed again takes about what it took; never more than without.
        needed = min(needed, sum(os.fstat(layer.fd).st_size for layer in layers) * 5 // 4)
    return needed + _SPARE


def compressed(layers: Sequence[Layer]) -> bool:
    """Whether the full is compressed, so that what takes its place should be."""
    return qemu_img.check(layers[0]).compressed > 0


def build(folder: Folder, plan: MergePlan, layers: Sequence[Layer], rate: int) -> Contents:
    """Make the merged image, prove it, and give it its name (`MERGED`), durably.

    Args:
        folder: where the chain is.
        plan: what to make.
        layers: the open files of the chain, the full first.
        rate: bytes a second at most (0: no limit).

    Raises:
        QmpBackupError: it could not be made, or is not right; the caller removes it.
    """
    partial = plan.base + PARTIAL
    with _created(folder, partial) as fd:
        if plan.flattens:
            flatten(layers, fd, rate)
        else:
            _copy_and_apply(folder, fd, plan, layers, rate)
        with storage_errors(f"read {folder.path / partial}"):
            new = Layer.of(fd, partial)
        _prove(new, plan, layers)
        require_unchanged([*layers, new])
        with storage_errors(f"store {folder.path / partial}"):
            _give_away(fd, layers[0].fd)
            os.fsync(fd)
            contents = Contents(os.fstat(fd).st_size, digest(fd))
            folder.require_named(partial, fd)
            folder.rename(partial, plan.base + MERGED)
            folder.sync()
    return contents


def flatten(layers: Sequence[Layer], output: int, rate: int) -> None:
    """Write what a chain shows into an open file, as one qcow2 image.

    Raises:
        QmpBackupError: it failed.
    """
    pack = compressed(layers)
    with qemu_img.converting(layers, output, "qcow2", compress=pack, rate=rate) as child:
        result = child.wait()
    if result.code:
        raise qemu_img.failure(result, f"merge {layers[-1].name}")


@contextmanager
def _created(folder: Folder, name: str) -> Iterator[int]:
    """A new file, ours alone as long as programs parse it; open for the block."""
    with ExitStack() as stack:
        with storage_errors(f"create {folder.path / name}"):
            folder.remove(name)
            fd = folder.create_file(name)
            stack.callback(os.close, fd)
        yield fd


def _give_away(fd: int, like: int) -> None:
    """Give a file that is complete the owner and mode of another."""
    state = os.fstat(like)
    with suppress(PermissionError):
        os.fchown(fd, state.st_uid, state.st_gid)
    os.fchmod(fd, stat.S_IMODE(state.st_mode))


def _copy_and_apply(
    folder: Folder, new: int, plan: MergePlan, layers: Sequence[Layer], rate: int
) -> None:
    """Write down in a copy of the first file what is in the others. What lies below a part of a chain
    is neither read nor shown in the result."""
    if plan.below is None or not any(compressed([layer]) for layer in layers):
        _apply_all(new, plan, layers, rate)
        return
    # QEMU compresses only into room that is free, so all is merged first, then compressed. Until
    # the merge is proved nobody takes the second file for more than half made.
    with _created(folder, plan.base + MERGED) as fd:
        _apply_all(fd, plan, layers, 0)
        with storage_errors(f"read {plan.base}{MERGED}"):
            merged = Layer.of(fd, plan.base + MERGED)
        size, link = merged.header.size, layers[0].header.backing
        merging.create(new, plan.base + PARTIAL, size, backing=link, compress=True)
        merging.apply(merged, new, below=plan.below, compress=True, rate=rate)


def _apply_all(new: int, plan: MergePlan, layers: Sequence[Layer], rate: int) -> None:
    tags = {tag.file: tag for tag in plan.tags}
    merging.copy(layers[0], new)
    _keep(new, tags.get(layers[0].name))
    for layer in layers[1:]:
        interrupt.check()
        log.info("Applying %s", layer.name)
        merging.apply(layer, new, below=plan.below or 0, rate=rate)
        _keep(new, tags.get(layer.name))


def _keep(fd: int, tag: Tag | None) -> None:
    if tag is not None and not tag.exists:
        merging.take_snapshot(fd, tag.name)


def _prove(new: Layer, plan: MergePlan, layers: Sequence[Layer]) -> None:
    """The new image is whole; its state, and that of each snapshot, is what the chain shows.

    Raises:
        DamagedError: it is not.
    """
    log.info("Proving %s", new.name)
    found = qemu_img.check(new)
    if found.errors:
        raise _unproved(f"qemu-img check finds errors in {new.name}", found.message)
    if new.header.size != layers[-1].header.size:
        raise _unproved(f"{new.name} is not as large as {layers[-1].name}")
    if plan.below is not None:
        _prove_above(new, plan.below, layers)
    elif not _same_as_chain(new, layers):
        raise _unproved(f"{new.name} does not hold the state of {layers[-1].name}")
    for tag in plan.tags:
        index = plan.chain.index(tag.file)
        with qemu_nbd.snapshot(new, tag.name) as one, opened(layers[: index + 1]) as other:
            if not qemu_img.same_contents(one, other):
                raise _unproved(f"snapshot {tag.name} does not hold the state of {tag.file}")
    for carried in plan.carried:
        with qemu_nbd.snapshot(new, carried) as one, qemu_nbd.snapshot(layers[0], carried) as other:
            if not qemu_img.same_contents(one, other):
                raise _unproved(f"snapshot {carried} has changed")


def _prove_above(new: Layer, below: int, layers: Sequence[Layer]) -> None:
    """On top of whatever lies below, the new image shows what the part of the chain shows.

    It does if both show the same above zeros, and hold themselves the same ranges of the disk, as far
    as anything lies below.
    """
    with stand_in(below) as ground:
        with opened([new], raw(ground)) as one, opened(layers, raw(ground)) as other:
            same = qemu_img.same_contents(one, other)
        if not same:
            raise _unproved(f"{new.name} does not hold the changes up to {layers[-1].name}")
        found = qemu_img.held_ranges([new], ground, below)
        if found != qemu_img.held_ranges(layers, ground, below):
            raise _unproved(f"{new.name} does not hold the same parts as up to {layers[-1].name}")


def _same_as_chain(new: Layer, layers: Sequence[Layer]) -> bool:
    with opened([new]) as one, opened(layers) as other:
        return qemu_img.same_contents(one, other)


def _unproved(what: str, detail: str = "") -> DamagedError:
    return DamagedError(
        f"The merged image did not come out right: {what}{f' ({detail})' if detail else ''}.",
        "Nothing was changed. Check the storage, and `qmpbackup verify` the target.",
    )

# SPDX-License-Identifier: Apache-2.0
"""The target of a run: found while the VM is looked at, made if it is a new one, and the way into it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from qmpbackup.errors import StorageError
from qmpbackup.machine.pull import Method, method
from qmpbackup.model import Level, Point, Vm
from qmpbackup.plan.names import parse_bitmap
from qmpbackup.service.backup.request import Request
from qmpbackup.service.backup.way import Frame, Way
from qmpbackup.targets import opening
from qmpbackup.targets.interface import Found, Opening, Wish
from qmpbackup.targets.receiver import Arrival, ChunkReceiver, FileReceiver, Receiver


class Destination:
    """A target as it was found: held for the run where it is there, else still to be made."""

    def __init__(self, request: Request, target: Opening, found: Found) -> None:
        self._request = request
        self._opening = target
        self._found = found
        self._distrusted: frozenset[str] = frozenset()
        ground = found.ground
        self.id = ground.id
        self.place = ground.name
        self.stored = found.stored
        self.chunk = ground.chunk
        self.folder: Path | None = ground.folder
        self.stores_plain = ground.stores_plain and not request.compress

    def stages(self, vm: Vm) -> bool:
        """Whether what is copied of this VM goes into a local image beside the scratch first, as far as
        can be told before."""
        return self.chunk > 0 and method(vm) is Method.STAGED

    def obstacle(self, point: Point, disk_id: str) -> str:
        """Why nothing can be built upon a disk of a point; empty if nothing speaks against it."""
        if disk_id in self._distrusted:
            return "an audit found changes since that no change bitmap had recorded"
        ground, points = self._found.ground, self.stored.points
        return ground.obstacle(points, point, disk_id, thorough=self._request.verify_chain)

    def distrust(self, disks: frozenset[str]) -> None:
        """From now on, nothing can be built upon these disks."""
        self._distrusted |= disks

    def claim(self, vm: Vm) -> AbstractContextManager["Destination"]:
        """The target for a run, whose plan is made: now it is made where it was not there."""
        return nullcontext(self) if self._found.target else self._made(vm)

    @contextmanager
    def _made(self, vm: Vm) -> Iterator["Destination"]:
        with self._opening.made(vm.config.identity, self.id) as target:
            found = Found(target, self.stored, target)
            yield Destination(self._request, self._opening, found)

    def way(self, frame: Frame) -> Way:
        """The way of a run into it."""
        receiver = self._receiver(frame)
        match receiver:
            case FileReceiver():
                from qmpbackup.service.backup.pushed import Pushed

                return Pushed(frame, receiver)
            case ChunkReceiver():
                from qmpbackup.service.backup.pulled import Pulled

                return Pulled(frame, receiver)

    def _receiver(self, frame: Frame) -> Receiver:
        if self._found.target is None:
            raise ValueError("a target that was only looked at takes no point")
        disks = [Arrival(plan.disk.id, plan.level, plan.disk.size) for plan in frame.plan.disks]
        point_id, check = frame.plan.point.id, frame.request.check
        return self._found.target.receive(point_id, disks, check=check)


@contextmanager
def named(request: Request, *, look_only: bool) -> Iterator["Named"]:
    """The target that a request names, about to be opened.

    Raises:
        UsageError: it is asked for what it cannot do, or there is no password.
    """
    wish = Wish(
        lock_wait=request.lock_wait,
        look_only=look_only,
        monthly=request.monthly,
        uuid=request.uuid,
        verify_chain=request.verify_chain,
        differential=request.level is Level.DIFF,
        strict=not request.host,
    )
    with opening.entrance(request.target).opening(wish) as target:
        yield Named(request, target)


class Named:
    """A target that is named, and about to be opened."""

    def __init__(self, request: Request, target: Opening) -> None:
        self._request = request
        self._opening = target

    @contextmanager
    def found(self, vm: Vm) -> Iterator[Destination]:
        """What is there, held for the block; nothing is made."""
        with self._opening.found(vm.config.identity) as found:
            if self._request.level is Level.AUTO:
                require_new(found, vm)
            yield Destination(self._request, self._opening, found)


def require_new(found: Found, vm: Vm) -> None:
    """Make nothing anew, unasked, where the VM has change bitmaps of a target that was there: it is a
    place whose file system is not mounted, more often than one that was cleared on purpose.

    Raises:
        StorageError: so it is.
    """
    names = (parse_bitmap(bitmap.name) for disk in vm.disks for bitmap in disk.bitmaps)
    ids = {f"{name.target}/" for name in names if name}
    if found.earlier and any(each.startswith(found.earlier) for each in ids):
        raise StorageError(
            f"There is no target in {found.ground.name}, but the VM has change bitmaps of one that was "
            "there.",
            "See that its file system is mounted. If it was removed on purpose, --level full begins a "
            "new one.",
        )

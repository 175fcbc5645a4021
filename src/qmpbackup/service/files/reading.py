# SPDX-License-Identifier: Apache-2.0
"""A point whose files can be read, for as long as a block lasts.

    find the point ─ a folder that is gone afterwards ─ serve the point ─ overlays ─ the appliance ─ ask it

The target is held for reading meanwhile by the process that serves it, and that dies with us. The
appliance writes to the overlays alone: journals are replayed there.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.durable import storage_errors
from qmpbackup.errors import (
    DamagedError,
    NoSuchTarget,
    QmpBackupError,
    UsageError,
    VmError,
)
from qmpbackup.machine.appliance import running
from qmpbackup.machine.appliance.building import Appliance, appliance
from qmpbackup.machine.confining import hand_over
from qmpbackup.model import Point
from qmpbackup.plan import guest_files
from qmpbackup.plan.guest_files import LUKS, GuestFile, GuestFileSystem
from qmpbackup.service.boot import make_overlays
from qmpbackup.service.boot_folder import Boot, BootedDisk, BootFolder, nodes_of
from qmpbackup.service.boot_keeper import PointServer
from qmpbackup.service.files.serving import WatchedServer
from qmpbackup.service.room import space
from qmpbackup.service.show import chosen_disks, find_point
from qmpbackup.service.throwaway import throwaway_folder
from qmpbackup.targets import opening
from qmpbackup.targets.interface import Address

log = logging.getLogger(__name__)

_LARGEST_OVERLAY = 4 * 1024**3
_MOST_UNREAD = 5
_LONGEST_PASSPHRASE = 64 * 1024


@dataclass(frozen=True, slots=True)
class Request:
    """Which point to read; `passphrase` is a file with what unlocks what is encrypted."""

    target: Address
    point: str
    vm: str = ""
    disks: tuple[str, ...] = ()
    passphrase: Path | None = None
    lock_wait: float = 0.0


@dataclass(frozen=True, slots=True)
class Place:
    """A path on a file system of the guest."""

    system: GuestFileSystem
    path: str

    @property
    def shown(self) -> str:
        """How users write it."""
        return f"{self.system.name}:{self.path}"


class Reading:
    """A point that is being read."""

    def __init__(
        self,
        point: Point,
        disks: Sequence[BootedDisk],
        agent: running.GuestAgent,
        cause_of: Callable[[QmpBackupError], QmpBackupError] = lambda error: error,
    ) -> None:
        self.point = point
        self._cause_of = cause_of
        self._agent = agent
        self._disks = [each.id for each in disks]
        self.systems: list[GuestFileSystem] = []
        """All that was found on the disks."""

    def look(self, passphrase: bytes | None = None) -> None:
        """Find the file systems; with a passphrase, in what it unlocks, too.

        Raises:
            UsageError: it unlocks nothing.
        """
        self.systems = self._scan()
        if passphrase is None:
            return
        locked = [each for each in self.systems if each.type == LUKS]
        ends = [self._agent.told("unlock", each.device, passphrase)[1] for each in locked]
        if all(end.status for end in ends):
            raise self._because(
                UsageError,
                f"The passphrase unlocks nothing of point {self.point.id}"
                + (
                    f": {ends[0].said}"
                    if ends
                    else ", which holds nothing that is encrypted by LUKS"
                )
                + ".",
            )
        self.systems = self._scan()

    def _scan(self) -> list[GuestFileSystem]:
        return guest_files.file_systems(self._agent.told("scan")[0], self._disks)

    def place(self, address: str) -> Place:
        """What an address means. A path alone is looked for on all file systems.

        Raises:
            NoSuchTarget: it is on none of them.
            UsageError: it is on several, or names none that is there.
        """
        try:
            system, path = guest_files.split(address, self.systems)
        except UsageError as error:
            raise self._cause_of(error) from error
        if system is not None:
            _require_readable(system)
            return Place(system, path)
        readable = self.readable()
        found = [each for each in readable if len(readable) == 1 or self._has(each, path)]
        if not found:
            raise self._because(
                NoSuchTarget,
                f"There is no {path} in point {self.point.id}.",
                "`qmpbackup files ls` shows its file systems.",
            )
        if len(found) > 1:
            raise UsageError(
                f"{path} is on several file systems.",
                f"Name one: {', '.join(f'{each.name}:{path}' for each in found)}.",
            )
        return Place(found[0], path)

    def readable(self) -> list[GuestFileSystem]:
        """The file systems that can be opened.

        Raises:
            VmError: there is none.
        """
        found = [each for each in self.systems if each.is_readable]
        if not found:
            notes = [f"{each.name}: {each.type}, {each.note}." for each in self.systems]
            raise VmError(
                f"Point {self.point.id} holds no file system that can be opened.", " ".join(notes)
            )
        return found

    def _has(self, system: GuestFileSystem, path: str) -> bool:
        end = self._agent.told("is_there", system.device, system.type, path)[1]
        if end.status == running.NOT_MOUNTED:
            log.warning("%s cannot be opened: %s", system.name, end.said)
        return end.status == 0

    # What is asked of a place

    def is_folder(self, place: Place) -> bool:
        """Whether it is a folder, or a link to one.

        Raises:
            NoSuchTarget: there is nothing.
        """
        system = place.system
        end = self._agent.told("is_folder", system.device, system.type, place.path)[1]
        if end.status != 1:
            self._require_well(place, end)
        return end.status == 0

    def entries(self, place: Place) -> Iterator[GuestFile]:
        """What is in a folder, or the one file."""
        return self._files(place, self._ask("list", place))

    def search(self, place: Place, tests: Sequence[str]) -> Iterator[GuestFile]:
        """What is below a folder and passes find's tests."""
        return self._files(place, self._ask("search", place, *tests))

    def contents(self, place: Place) -> Iterator[bytes]:
        """The bytes of a file."""
        return self._pieces(place, self._ask("send", place))

    def archive(self, place: Place) -> Iterator[bytes]:
        """A tar archive (pax) of a file or a folder."""
        return self._pieces(place, self._ask("archive", place))

    def subvolumes(self, system: GuestFileSystem) -> list[bytes]:
        """The paths of a btrfs's subvolumes."""
        if system.type != "btrfs":
            return []
        said, end = self._agent.told("subvolumes", system.device)
        if end.status:
            log.warning("%s cannot be opened: %s", system.name, end.said)
        return list(guest_files.subvolumes(said))

    def _ask(self, question: str, place: Place, *words: str) -> running.GuestAnswer:
        system = place.system
        return self._agent.ask(question, system.device, system.type, place.path, *words)

    def _files(self, place: Place, answer: running.GuestAnswer) -> Iterator[GuestFile]:
        rest = b""
        for piece in answer:
            found, rest = guest_files.complete(rest + piece)
            yield from found
        self._require_well(place, answer.end)

    def _pieces(self, place: Place, answer: running.GuestAnswer) -> Iterator[bytes]:
        yield from answer
        self._require_well(place, answer.end)

    def _require_well(self, place: Place, end: running.End) -> None:
        if end.status == 0:
            return
        shown, system = place.shown, place.system
        if end.status == running.NOT_THERE:
            raise self._because(NoSuchTarget, f"There is no {shown} in point {self.point.id}.")
        if end.status == running.NO_FILE:
            raise self._because(
                UsageError, f"{shown} is no file.", "`cp -r` and `tar` take folders."
            )
        if end.status == running.NOT_MOUNTED:
            raise self._because(
                DamagedError,
                f"The file system {system.name} ({system.type}) cannot be opened: {end.said}.",
                "It may have been damaged in the guest already; `qmpbackup verify` says whether the "
                "point is what was backed up.",
            )
        raise self._because(DamagedError, f"Not all of {shown} can be read: {end.said}.")

    def _because(self, kind: type[QmpBackupError], message: str, hint: str = "") -> QmpBackupError:
        """An error, or what it comes from: to a guest's kernel, all that cannot be read is the same."""
        return self._cause_of(kind(message, hint))


def _require_readable(system: GuestFileSystem) -> None:
    if not system.is_readable:
        raise UsageError(f"{system.name} cannot be opened ({system.type}): {system.note}.")


@contextmanager
def reading(request: Request) -> Iterator[Reading]:
    """A point that can be read, for the block.

    Raises:
        DamagedError: the point is damaged, or it was found to be while it was read.
        StorageError: its target could not be read.
        VmError: the appliance cannot be made or started.
    """
    passphrase = _passphrase(request.passphrase)
    with interrupt.held(), ExitStack() as stack:
        request = replace(request, target=opening.entrance(request.target).asked())
        made = appliance()
        point = _point(request)
        folder = stack.enter_context(throwaway_folder("files"))
        boot = _boot(request, point)
        server = PointServer(
            folder, opening.entrance(request.target).environment(), dies_with_us=True
        )
        stack.callback(server.end)
        server.ensure(boot)
        make_overlays(folder, boot)
        machine = running.Machine(
            _within_reach(made, folder),
            [
                ({**each.node, "cache": {"direct": False, "no-flush": True}}, each.below)
                for each in nodes_of(folder, boot)
            ],
            unlocks=passphrase is not None,
            largest_file=_bound(folder.path),
        )
        hand_over(folder.path)
        served = WatchedServer(server, boot, folder)
        # A disk that was withdrawn is asked for again and again by QEMU: nobody need wait for that. A server
        # that was lost is asked for again as well, for as long as it takes to start another.
        stack.enter_context(interrupt.asking(served.see_to))
        try:
            agent = stack.enter_context(running.running(machine))
            found = Reading(point, boot.disks, agent, served.cause_of)
            found.look(passphrase)
            yield found
        except VmError as error:
            raise served.cause_of(error) from error
        server.end()
        server.require_served()
        for each in server.unread()[:_MOST_UNREAD]:
            log.warning("Not all of point %s can be read: %s", point.id, each)


def _point(request: Request) -> Point:
    with (
        opening.entrance(request.target).opened(request.vm) as target,
        target.lock(wait=request.lock_wait),
    ):
        return find_point(target, target.load(), request.point)


def _boot(request: Request, point: Point) -> Boot:
    disks = chosen_disks(point, request.disks)
    return Boot(
        target=opening.entrance(request.target).spelled,
        vm=request.vm,
        point=point.id,
        name=point.vm.identity.name,
        machine="",
        command_line=(),
        disks=tuple(
            BootedDisk(disk.id, disk.source_file, disk.size, number)
            for number, disk in enumerate(disks)
        ),
    )


def _within_reach(made: Appliance, folder: BootFolder) -> Appliance:
    """The appliance where the user may read it whom QEMU is run as."""
    if os.geteuid() != 0:
        return made
    with storage_errors(f"copy the appliance to {folder.path}"):
        copy = Appliance(folder.path)
        shutil.copyfile(made.kernel, copy.kernel)
        shutil.copyfile(made.initramfs, copy.initramfs)
    return copy


def _bound(folder: Path) -> int:
    """How long an overlay may get: journals are replayed into it, and a kernel that was taken over could
    write on."""
    found = space(folder)
    return _LARGEST_OVERLAY if found is None else min(_LARGEST_OVERLAY, max(found.free // 2, 1))


def _passphrase(file: Path | None) -> bytes | None:
    """What is in a file, without a line feed at its end."""
    if file is None:
        return None
    try:
        with file.open("rb") as opened:
            found = opened.read(_LONGEST_PASSPHRASE + 1)
    except OSError as error:
        raise UsageError(f"Cannot read the passphrase in {file}: {error.strerror}.") from error
    found = found.removesuffix(b"\n").removesuffix(b"\r")
    if not found or len(found) > _LONGEST_PASSPHRASE or b"\0" in found:
        raise UsageError(f"{file} holds no passphrase.")
    return found

# SPDX-License-Identifier: Apache-2.0
"""Instant restore: a VM from a point, in seconds, whatever the size of its disks.

    find the point ─ the original must not run ─ rewrite the recorded command line
    ─ overlays, journal ─ a keeper in the background: serves the point, starts QEMU, lets it run

Nothing is copied: what the guest reads is fetched, what it writes goes to the overlays. `settle` moves
it here while it runs; `end` throws it away.
"""

import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.durable import TEMPORARY, storage_errors
from qmpbackup.errors import (
    Locked,
    QmpBackupError,
    StorageError,
    UsageError,
    VmError,
)
from qmpbackup.machine import booting, needed_files
from qmpbackup.model import Point
from qmpbackup.plan.booting import Launch
from qmpbackup.plan.qemu_options import node_names, program_of
from qmpbackup.process import ours, run
from qmpbackup.service.boot_folder import (
    JOURNAL,
    Boot,
    BootedDisk,
    BootFolder,
    point_uri,
)
from qmpbackup.service.boot_keeper import error_of, launch_of, serve_command
from qmpbackup.service.boot_original import signs_of
from qmpbackup.service.booted import end
from qmpbackup.service.show import chosen_disks, find_point
from qmpbackup.state import state_folder
from qmpbackup.targets import opening
from qmpbackup.targets.interface import Address

log = logging.getLogger(__name__)

_READY_SECONDS = 700.0
_END_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Request:
    """What to boot, and where the overlays go (`None`: a folder of the user's state); `original_off`: a
    user says that the original does not run, where that cannot be seen."""

    target: Address
    point: str
    vm: str = ""
    folder: Path | None = None
    network: bool = False
    accelerators: tuple[str, ...] = ()
    lock_wait: float = 0.0
    original_off: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """A VM that can be booted: where, how, and the commands before that by hand."""

    folder: BootFolder
    boot: Boot
    launch: Launch
    obstacles: tuple[str, ...]

    def by_hand(self) -> list[list[str]]:
        """What somebody has to run who starts it without us."""
        overlays = [create_command(self.folder, disk) for disk in self.boot.disks]
        shown = replace(self.boot, target=self.boot.shown_target)
        return [serve_command(self.folder, shown), *overlays, list(self.launch.argv)]


def asked(request: Request) -> Request:
    """The same request; whoever has to type the password of its target, has done so once."""
    return replace(request, target=opening.entrance(request.target).asked())


def prepared(request: Request) -> Prepared:
    """What would be booted, and how; nothing is changed.

    Raises:
        NoSuchTarget: there is no such point.
    """
    found = _planned(request, None)
    signs = _of_the_original(found.boot, request.original_off)
    return replace(found, obstacles=(*found.obstacles, *signs))


def _of_the_original(boot: Boot, known_off: bool) -> tuple[str, ...]:
    """Why the VM that the point is of may still run."""
    images = [(disk.id, disk.source_file) for disk in boot.disks]
    return signs_of(boot.original, images).obstacles(known_off)


def planned(request: Request, folder: BootFolder) -> Prepared:
    """The same in a sandbox and in this folder, whether the original runs or not.

    Raises:
        NoSuchTarget: there is no such point.
    """
    return _planned(request, folder)


def _planned(request: Request, sandbox: BootFolder | None) -> Prepared:
    with (
        opening.entrance(request.target).opened(request.vm) as target,
        target.lock(wait=request.lock_wait),
    ):
        point = find_point(target, target.load(), request.point)
    folder = sandbox or BootFolder(_folder(request, point))
    elsewhere = dict(needed_files.moved(point.vm.files))
    recorded = needed_files.found_again(point.vm.command_line, elsewhere)
    named = node_names(recorded)
    disks = tuple(
        BootedDisk(
            disk.id,
            disk.source_file,
            disk.size,
            number,
            bitmap=disk.bitmap,
            end_mark=disk.end_mark,
            own_node=disk.id if disk.id in named else "",
        )
        for number, disk in enumerate(chosen_disks(point, ()))
    )
    boot = Boot(
        target=opening.entrance(request.target).spelled,
        vm=request.vm,
        point=point.id,
        name=point.vm.identity.name,
        machine=point.vm.machine,
        command_line=_with_program(recorded),
        disks=disks,
        network=request.network,
        accelerators=request.accelerators,
        original=point.vm.identity,
    )
    launch = launch_of(folder, boot, sandbox=sandbox is not None)
    others = tuple(
        f"{each} is another file than when the point was made"
        for each in needed_files.changed(point.vm.files)
        if each in launch.needs
    )
    found = tuple(
        f"{then}, in whose place there is {now}, the same" for then, now in elsewhere.items()
    )
    launch = replace(launch, left_out=(*launch.left_out, *others, *found))
    return Prepared(folder, boot, launch, _lacking(launch))


def boot(request: Request) -> Prepared:
    """Boot a VM from a point, and return when it runs. Where that was begun before, go on with it.

    Raises:
        VmError: it cannot be booted here, or the original still runs.
        QmpBackupError: it does not start; nothing is left behind.
    """
    with interrupt.held():
        request = asked(request)
        found = prepared(request)
        new = not _begun(found)
        environment = opening.entrance(request.target).environment()
        if not new:
            return again(found.folder, environment, original_off=request.original_off)
        require_possible(found)
        try:
            _prepare(found)
            _start_keeper(found.folder, environment)
        except Locked:
            raise  # it is another's
        except BaseException:
            with suppress(QmpBackupError):
                end(found.folder)
            raise
    return found


def again(
    folder: BootFolder,
    environment: Mapping[str, str] | None = None,
    *,
    original_off: bool = False,
) -> Prepared:
    """Have a VM that was booted before run again, or be served and watched again if it runs.

    Raises:
        NoSuchTarget: nothing was booted there.
        VmError: it cannot be started here, or the original runs by now.
    """
    with interrupt.held():
        there = folder.load()
        launch = launch_of(folder, there)
        lacking = _lacking(launch)
        if not booting.is_there(folder.monitor("settle")):
            lacking += _of_the_original(there, original_off)
        found = Prepared(folder, there, launch, lacking)
        require_possible(found)
        if not folder.is_claimed("keeper"):
            _start_keeper(folder, environment or {})
        return found


def _lacking(launch: Launch) -> tuple[str, ...]:
    """Why a VM cannot be started here."""
    missing = [f"The file {each} is not here." for each in launch.needs if not Path(each).exists()]
    return (*launch.obstacles, *missing)


def require_possible(found: Prepared) -> None:
    """Raise `VmError` where something is in the way."""
    if found.obstacles:
        raise VmError(
            f"This point cannot be booted here. {' '.join(found.obstacles)}",
            "`qmpbackup boot --print` shows the command line, to be changed and started by hand.",
        )


def _folder(request: Request, point: Point) -> Path:
    if request.folder is not None:
        return request.folder.absolute()
    name = f"{point.vm.identity.name}-{point.id}" if point.vm.identity.name else point.id
    safe = "".join(each if each.isalnum() or each in "._-" else "-" for each in name)
    return state_folder() / "boots" / safe.lstrip(".")


def _with_program(recorded: tuple[str, ...]) -> tuple[str, ...]:
    """A command line with the QEMU that the VM was run with, or the one of that name here."""
    if not recorded or shutil.which(recorded[0]):
        return recorded
    number = program_of(recorded)
    name = Path(recorded[min(number, len(recorded)) - 1]).name
    return (shutil.which(name) or name, *recorded[number:])


def _begun(found: Prepared) -> bool:
    """Whether this very point was booted there before; not by who was killed before any VM was started.

    Raises:
        UsageError: something else is there.
    """
    folder = found.folder.path
    if not (folder / JOURNAL).exists():
        ours = {"boot.lock", JOURNAL + TEMPORARY}
        if folder.exists() and {each.name for each in folder.iterdir()} - ours:
            raise UsageError(f"{folder} is not empty.", "Choose another folder with --to.")
        return False
    there = found.folder.load()
    if (there.target, there.point) != (found.boot.target, found.boot.point):
        raise UsageError(
            f"In {found.folder.path}, point {there.point} of {there.shown_target} was booted.",
            "Choose another folder with --to, or end that one with --end.",
        )
    return found.folder.was_started


def _prepare(found: Prepared) -> None:
    """Make the folder, the overlays and the journal."""
    folder = found.folder
    with storage_errors(f"make {folder.path}"):
        folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.sockets.mkdir(mode=0o700, exist_ok=True)
    with folder.claimed():
        if folder.was_started:
            raise Locked(f"Somebody else boots in {folder.path} just now.", "Run again.")
        folder.register()
        folder.store(found.boot)
        make_overlays(folder, found.boot)


def make_overlays(folder: BootFolder, boot: Boot) -> None:
    """Make the files for what the guest writes.

    Raises:
        StorageError: one cannot be made.
    """
    for disk in boot.disks:
        done = run(create_command(folder, disk))
        if done.code:
            raise StorageError(f"Cannot make the overlay of disk {disk.id}: {done.reason}.")


def create_command(folder: BootFolder, disk: BootedDisk) -> list[str]:
    """The command that makes an overlay; its header names the point, so that nobody takes it for whole."""
    return [
        *("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", point_uri(folder, disk)),
        *("-F", "raw", str(folder.overlay(disk)), str(disk.size)),
    ]


def keeper_command(folder: BootFolder) -> list[str]:
    """The command that keeps a booted VM."""
    return ours("boot", "--keep", str(folder.path))


def _start_keeper(folder: BootFolder, environment: Mapping[str, str]) -> None:
    """Start the keeper, and wait until the VM runs."""
    journal = folder.keeper_log
    began = journal.stat().st_size if journal.exists() else 0
    told = {**os.environ, **environment}
    child = booting.detached(keeper_command(folder), journal, environment=told)
    try:
        line = booting.first_line(child, _READY_SECONDS)
        if line is None:
            raise VmError("The VM was started and does not run.", f"See {journal}.")
        if line:
            return
    except BaseException:
        booting.end(child.pid, signal.SIGTERM, _END_SECONDS)  # it holds what is to be thrown away
        child.wait()
        raise
    raise _failure(journal, began, child)


def _failure(journal: Path, began: int, child: "subprocess.Popen[bytes]") -> QmpBackupError:
    """What the keeper said last, as an error with its exit code."""
    said: list[str] = []
    with suppress(OSError), journal.open("rb") as file:
        file.seek(began)
        lines = file.read(65536).decode(errors="replace").splitlines()
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    kind = error_of(child.wait(), QmpBackupError)
    return kind(said[0] if said else "The VM does not start.", " ".join(said[1:]))

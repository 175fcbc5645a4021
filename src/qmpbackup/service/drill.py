# SPDX-License-Identifier: Apache-2.0
"""Boot a point in a sandbox, and judge whether it comes up.

    a folder that is gone afterwards ─ serve the point ─ QEMU: the recorded devices, no network, as nobody
    ─ look at agent, serial ports and screen until there is a verdict ─ end all ─ one line of history

The machine under drill writes to its overlays alone. As root it is run as the user `nobody`, in a network
namespace of its own and without new privileges; QEMU confines itself besides (seccomp).
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError, MonitorBusy, StorageError, VmError
from qmpbackup.machine import booting
from qmpbackup.machine.confining import SANDBOX, confined, hand_over
from qmpbackup.machine.knocking import Knocking
from qmpbackup.machine.monitor import Monitor
from qmpbackup.plan.booting import Launch
from qmpbackup.plan.qemu_options import memory_of
from qmpbackup.plan.sizes import human
from qmpbackup.plan.verdict import BootVerdict, Judgement, Ready, judged
from qmpbackup.process import Child, available_memory
from qmpbackup.service.boot import Request as BootRequest
from qmpbackup.service.boot import make_overlays, planned, require_possible
from qmpbackup.service.boot_folder import Boot, BootFolder
from qmpbackup.service.boot_keeper import PointServer
from qmpbackup.service.drill_history import Drilled, note
from qmpbackup.service.drill_looks import Looks
from qmpbackup.service.throwaway import throwaway_folder
from qmpbackup.targets import opening
from qmpbackup.targets.interface import Address

log = logging.getLogger(__name__)

ROOM = 8 * 1024**3
"""Bytes that a machine under drill may write."""

_LOOK_SECONDS = 0.5
_NICE = 10
_OWN_MEMORY = 8 * 1024**3
"""Address space of QEMU's own, of which it takes little: a gibibyte for translated code, stacks, libraries."""

_LARGEST_BROUGHT = 512 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Request:
    """Which point to boot, for how many seconds at most, and the commands that must succeed in it; `room`
    is how many bytes it may write, `ready` by what it is taken for one that came up. At `ports`
    somebody in it must answer by TCP."""

    target: Address
    point: str
    vm: str = ""
    seconds: float = 600.0
    commands: tuple[str, ...] = ()
    accelerators: tuple[str, ...] = ()
    lock_wait: float = 0.0
    room: int = ROOM
    ready: Ready = Ready.ANY
    ports: tuple[int, ...] = ()


def drill(request: Request) -> Drilled:
    """Boot a point, judge it, and note the verdict.

    Raises:
        DamagedError: the point is damaged; noted as a failure, too.
        StorageError: the target cannot be read, so nothing can be said; noted as unknown.
        VmError: it cannot be booted here.
    """
    with interrupt.held(), ExitStack() as stack:
        request = replace(request, target=opening.entrance(request.target).asked())
        folder = stack.enter_context(throwaway_folder("drill"))
        found = planned(
            BootRequest(
                target=request.target,
                point=request.point,
                vm=request.vm,
                accelerators=request.accelerators,
                lock_wait=request.lock_wait,
            ),
            folder,
        )
        boot, began = found.boot, time.monotonic()
        drilled = Drilled(
            boot.shown_target,
            boot.point,
            boot.name,
            f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            BootVerdict.UNKNOWN,
            "it did not come up in time",
            0.0,
        )
        require_possible(found)
        _require_memory(found.launch)
        folder.store(boot)
        server = PointServer(folder, opening.entrance(request.target).environment())
        stack.callback(server.end)
        try:
            server.ensure(boot)
            make_overlays(folder, boot)
            watch = partial(_see_to, server, boot, folder)
            drilled, picture = _judged(request, folder, found.launch, drilled, began, watch)
            server.end()
            server.require_whole()
        except DamagedError as error:
            note(replace(drilled, verdict=BootVerdict.FAIL, reason=error.message))
            raise
        except VmError as error:
            raise server.cause_of(error) from error
        trouble = server.trouble(waiting=drilled.verdict is BootVerdict.UNKNOWN)
    if trouble and drilled.verdict is not BootVerdict.PASS:
        raise _not_read(drilled, picture, trouble)
    return note(drilled, picture)


def _see_to(server: PointServer, boot: Boot, folder: BootFolder) -> None:
    """Serve the point again, where its server was lost.

    Raises:
        DamagedError: the point is damaged.
    """
    if server.ensure(boot):
        hand_over(folder.path)
    server.require_whole()


def _not_read(drilled: Drilled, picture: bytes, trouble: str) -> StorageError:
    """What is said of a machine that had no chance: its disks could not be read."""
    reason = f"the target could not be read: {trouble}"
    note(replace(drilled, verdict=BootVerdict.UNKNOWN, reason=reason), picture)
    return StorageError(
        f"Whether the point boots cannot be said, as {reason}",
        "Drill it again once the target can be read.",
    )


def _judged(
    request: Request,
    folder: BootFolder,
    launch: Launch,
    drilled: Drilled,
    began: float,
    watch: Callable[[], None],
) -> tuple[Drilled, bytes]:
    """Start the VM, look at it until there is a verdict or no time, and end it; also the last picture."""
    argv = [*confined(_bounds(launch)), *_brought(folder, launch), "-sandbox", SANDBOX]
    with Knocking(folder.path, request.ports) as network:
        hand_over(folder.path)
        with (
            Child([*argv, *network.options(argv)]) as child,
            _running(folder, child, watch) as monitor,
            closing(Looks(launch, child, monitor, folder.path)) as looks,
        ):
            deadline = began + request.seconds
            found: Judgement | None = None
            while found is None and time.monotonic() < deadline:
                interrupt.check()
                with suppress(VmError):
                    booting.let_run(monitor)
                watch()
                found = judged(looks.observe(), request.ready)
                found = found or _too_much(folder.path, request.room)
                if found is None:
                    time.sleep(_LOOK_SECONDS)
            verdict, reason = found or (drilled.verdict, f"{drilled.reason}; {looks.shown()}")
            if verdict is BootVerdict.PASS and request.commands:
                verdict, reason = looks.carry_out(request.commands, reason)
            if verdict is BootVerdict.PASS and request.ports:
                verdict, reason = _answering(network, reason, deadline)
            seconds = round(time.monotonic() - began, 1)
            system = looks.system()
            told = replace(drilled, verdict=verdict, reason=reason, seconds=seconds, system=system)
            return told, looks.screen.picture


def _answering(network: Knocking, reason: str, deadline: float) -> Judgement:
    """Wait until the guest has answered at all ports."""
    while network.closed and time.monotonic() < deadline:
        interrupt.check()
        time.sleep(_LOOK_SECONDS)
    if not network.closed:
        return BootVerdict.PASS, f"{reason}, and by TCP as expected"
    ports = ", ".join(f"tcp:{port}" for port in network.closed)
    if not network.segment.guests:
        return BootVerdict.UNKNOWN, f"{reason}, but has shown no address at which {ports} could be"
    return BootVerdict.FAIL, f"{reason}, but nobody answers at {ports}"


def _too_much(folder: Path, room: int) -> Judgement | None:
    """What ends a drill of a machine that fills the disk."""
    written = 0
    for file in folder.iterdir():
        with suppress(OSError):
            written += file.lstat().st_blocks * 512
    if written <= room:
        return None
    return BootVerdict.UNKNOWN, f"it has written {written >> 20} MiB, more than it may (--room)"


def _greeting(folder: BootFolder) -> Monitor | None:
    """Its monitor, which listens before QEMU opens the disks, and greets after."""
    try:
        return booting.reach(folder.monitor("qmp"), 1.0)
    except MonitorBusy:
        return None


@contextmanager
def _running(folder: BootFolder, child: Child, watch: Callable[[], None]) -> Iterator[Monitor]:
    """The monitor of the VM that was started."""
    deadline = time.monotonic() + booting.START_SECONDS
    while (monitor := _greeting(folder)) is None:
        interrupt.check()
        watch()
        if child.ended:
            raise VmError(f"QEMU does not start: {child.end(5.0).reason.rpartition('}: ')[2]}.")
        if time.monotonic() > deadline:
            raise VmError("QEMU was started and does not answer.")
        time.sleep(_LOOK_SECONDS / 10)
    with monitor:
        yield monitor


def _bounds(launch: Launch) -> Sequence[str]:
    """QEMU lets others go first, and has no more memory than its machine needs."""
    most = memory_of(launch.argv)[1] + _OWN_MEMORY
    return ("nice", "-n", str(_NICE), "prlimit", f"--as={most}", "--core=0", "--")


def _require_memory(launch: Launch) -> None:
    """A drill must not have the host run out of memory, for which it would end others.

    Raises:
        VmError: the machine needs more than there is.
    """
    needed, free = memory_of(launch.argv)[0], available_memory()
    if free is not None and needed > free:
        raise VmError(
            f"The machine has {human(needed)} of memory, and this host has {human(free)} left.",
            "Drill it where there is more, or when there is.",
        )


def _brought(folder: BootFolder, launch: Launch) -> list[str]:
    """The command line, with copies of the files that it needs: firmware and kernels of root's are not
    for everybody."""
    argv = list(launch.argv)
    for number, name in enumerate(launch.needs if os.geteuid() == 0 else ()):
        source = Path(name)
        with storage_errors(f"copy {source}"):
            if source.is_file() and source.stat().st_size <= _LARGEST_BROUGHT:
                copy = folder.path / f"needed-{number}"
                shutil.copyfile(source, copy)
                argv = [word.replace(name, str(copy)) for word in argv]
    return argv

# SPDX-License-Identifier: Apache-2.0
"""What stays with a booted VM: serves its point, starts it, and has it run on where it stands still.

    server   `qmpbackup serve` in a process of its own; started anew when it is lost
    VM       a QEMU in a process of its own; stands still (`io-error`) while the point cannot be read,
             and is let run again and again, as QEMU's connection comes back only after a while

Each can be killed by itself: without the keeper VM and server go on, without the server the VM stands
still, and the next keeper finds what is there. The server never offers `base:allocation`: a QEMU that
streams would give the guest wrong data once that connection is lost.
"""

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.durable import storage_errors
from qmpbackup.errors import (
    CommandTimeout,
    ConnectionLost,
    DamagedError,
    Locked,
    NoSuchTarget,
    QmpBackupError,
    StorageError,
    UsageError,
    VmError,
    WrongPassword,
)
from qmpbackup.machine import booting
from qmpbackup.machine.monitor import Monitor
from qmpbackup.nbd.session import IS_DAMAGED, NOT_READ
from qmpbackup.plan.booting import Launch, Setting, launch
from qmpbackup.process import ours
from qmpbackup.service import settle_steps
from qmpbackup.service.boot_folder import MONITORS, Boot, BootFolder, BootPhase, nodes_of
from qmpbackup.targets import opening

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_SERVE_SECONDS = 600.0
"""Longest wait for a server: a repository may be far away."""
_IDLE_SECONDS = 60
"""How long a server without a client goes on, when its keeper has died."""
_AGAIN_SECONDS = 2.0
_WITHDRAWN = ("is served no more: ",)
_DAMAGE = (*_WITHDRAWN, f" {IS_DAMAGED}: ")
"""What `serve` says of a disk with a damaged file, or in which something damaged was asked for."""

_TROUBLE = (f" {NOT_READ}: ", "could not be proved: ")
_WAITS = " Trying again."
"""What it says of a target that cannot be read, or not at once."""

_LOG_BYTES = 256 * 1024


def launch_of(folder: BootFolder, boot: Boot, *, sandbox: bool = False) -> Launch:
    """How the VM is started now."""
    around = Setting(
        sockets=str(folder.sockets),
        logs=str(folder.path),
        monitors=MONITORS,
        network=boot.network,
        accelerators=boot.accelerators,
        is_here=_is_here,
        sandbox=sandbox,
    )
    return launch(boot.record, nodes_of(folder, boot), around)


def _is_here(file: str) -> bool:
    path = Path(file)
    return path.is_absolute() and path.is_file()


def keep(folder: BootFolder, announce: Callable[[], None]) -> None:
    """Serve, start and watch the VM until it has ended; `announce` is told when it runs.

    Raises:
        Locked: somebody keeps it already.
        QmpBackupError: it cannot be served or started.
    """
    with interrupt.held(), folder.claimed("keeper"):
        _note_ourselves(folder)
        server = PointServer(folder)
        try:
            with folder.claimed(wait=_SERVE_SECONDS), server.gone_if_this_fails():
                monitor = _running(folder, server)
            with monitor:
                announce()
                _watch(folder, monitor, server)
        except ConnectionLost:
            log.info("The VM has ended.")
            server.end()
        except VmError as error:
            server.end()
            raise server.cause_of(error) from error
        finally:
            folder.remove_sockets()


def _note_ourselves(folder: BootFolder) -> None:
    """Leave our process id in the lock's file, for who ends us."""
    with storage_errors(f"write to {folder.path}"):
        (folder.path / "keeper.lock").write_text(f"{os.getpid()}\n")


def _running(folder: BootFolder, server: "PointServer") -> Monitor:
    """The VM, which is started if it does not run."""
    with storage_errors(f"make {folder.sockets}"):
        folder.sockets.mkdir(mode=0o700, exist_ok=True)
    boot = folder.load()
    found = booting.reach(folder.monitor("keeper"))
    if found is None and boot.phase in {BootPhase.RESTORED, BootPhase.COMPLETING}:
        boot = folder.enter(BootPhase.LOCAL)
    server.ensure(boot)
    if found is None:
        started = launch_of(folder, boot)
        found = booting.start(started.argv, folder.monitor("keeper"), folder.path / "qemu.log")
    return found


def _watch(folder: BootFolder, monitor: Monitor, server: "PointServer") -> None:
    """Have the VM run, until the connection to it is lost."""
    while True:
        boot = folder.load()
        server.ensure(boot)
        with suppress(CommandTimeout):
            if booting.let_run(monitor) == "paused" and boot.phase is BootPhase.COMPLETING:
                _finish_for_another(folder, monitor)
        monitor.wait_for_event(frozenset({"SHUTDOWN"}), _LOOK_SECONDS)


def _finish_for_another(folder: BootFolder, monitor: Monitor) -> None:
    """A `settle` that was killed while the VM stood still must not leave it so."""
    if not folder.is_claimed("boot"):
        with folder.claimed():
            settle_steps.complete(folder, monitor)


class PointServer:
    """The process that serves the point, for as long as an overlay stands on it."""

    def __init__(
        self,
        folder: BootFolder,
        environment: Mapping[str, str] | None = None,
        *,
        dies_with_us: bool = False,
    ) -> None:
        self._folder = folder
        self._begun_by = ("setpriv", "--pdeathsig", "TERM", "--") if dies_with_us else ()
        self._environment = environment
        self._child: subprocess.Popen[bytes] | None = None
        self._not_before = 0.0
        self._given_up = False
        self._failed = ""
        self._has_served = False

    @contextmanager
    def gone_if_this_fails(self) -> Iterator[None]:
        """End the server that the block has started, unless the block succeeds."""
        try:
            yield
        except BaseException:
            if self._child is not None:
                self._child.terminate()
                self.end()
            raise

    def ensure(self, boot: Boot) -> bool:
        """See that it is there if it is needed, and is not if not; whether it was started.

        Raises:
            DamagedError: the point is damaged, when it is served first.
            QmpBackupError: it cannot be served for another reason, when it is served first.
        """
        if boot.phase not in {BootPhase.POINT, BootPhase.RESTORED}:
            self.end()
            return False
        if self._is_there():
            self._has_served = True
            return False
        if self._given_up or time.monotonic() < self._not_before:
            return False
        first = not self._has_served
        if self._child is not None and self._child.returncode == DamagedError.exit_code:
            self._given_up = True
            log.error("The point is damaged, and is served no more. %s", self._last_words())
            return False
        if not first:
            log.warning("The server of the point was lost; it is started again.")
        self._not_before = time.monotonic() + _AGAIN_SECONDS
        return self._start(boot, first)

    def require_whole(self) -> None:
        """Raise `DamagedError` if the server has found damage: it says so, and may end with that."""
        self._require_none(_DAMAGE)

    def require_served(self) -> None:
        """Raise `DamagedError` if nothing more of a disk can be read; other damage is of what it is in alone."""
        self._require_none(_WITHDRAWN)

    def _require_none(self, damage: Sequence[str]) -> None:
        found = [each for each in self._said("error") if any(word in each for word in damage)]
        if self._child is not None and self._child.poll() == DamagedError.exit_code:
            found = found or [self._last_words()]
        if found:
            raise DamagedError(f"The point is damaged. {found[-1]}")

    def unread(self) -> list[str]:
        """What could not be read of the point so far, each sentence once."""
        words = (*_DAMAGE, *_TROUBLE)
        found = [each for each in self._said("error", "warning") if any(w in each for w in words)]
        return list(dict.fromkeys(found))

    def trouble(self, *, waiting: bool) -> str:
        """Why something of the target could not be read; with `waiting`, or not at once. Empty: all was."""
        words = (*_TROUBLE, _WAITS) if waiting else _TROUBLE
        found = [each for each in self._said("warning") if any(word in each for word in words)]
        return self._failed or (found[-1].removesuffix(_WAITS) if found else "")

    def cause_of(self, error: VmError) -> QmpBackupError:
        """Why a VM does not start: it may wait for what cannot be read."""
        trouble = self.trouble(waiting=True)
        if not trouble:
            return error
        return StorageError(
            f"The VM does not start, as the target could not be read: {trouble}",
            "Try again once the target can be read.",
        )

    def _is_there(self) -> bool:
        if self._child is not None and self._child.poll() is None:
            return True
        return booting.is_there(self._folder.served)

    def _start(self, boot: Boot, first: bool) -> bool:
        told, said = opening.entrance(opening.place(boot.target)).handed_on()
        environment = {**os.environ, **(self._environment or {}), **said}
        command = [*self._begun_by, *serve_command(self._folder, replace(boot, target=told))]
        self._child = booting.detached(command, self._log, environment=environment)
        line = booting.first_line(self._child, _SERVE_SECONDS)
        if line:
            self._has_served, self._failed = True, ""
            return True
        if line is None:
            self._child.kill()
        code = self._child.wait()
        if first:
            raise error_of(code, StorageError)(f"The point cannot be served. {self._last_words()}")
        failed, self._failed = self._failed, self._last_words()
        if failed != self._failed:  # once: what goes on for hours is no news
            log.warning("The point cannot be served. %s", self._failed)
        return False

    @property
    def _log(self) -> Path:
        return self._folder.path / "serve.log"

    def _last_words(self) -> str:
        return " ".join(self._said("error")[-2:])

    def _said(self, *levels: str) -> list[str]:
        """The lines of its log that are not only information."""
        with suppress(OSError), self._log.open("rb") as file:
            file.seek(max(0, self._log.stat().st_size - _LOG_BYTES))
            lines = file.read(_LOG_BYTES).decode(errors="replace").splitlines()
            heads = tuple(f"{level}: " for level in levels)
            return [each.partition(": ")[2] for each in lines if each.startswith(heads)]
        return []

    def end(self) -> None:
        """End it, also one that a keeper of before has started."""
        with suppress(VmError):
            pid = booting.listener(self._folder.served)
            if pid is not None:
                booting.end(pid, signal.SIGTERM, 10.0)
        if self._child is not None:
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(10.0)


def error_of(code: int, other: type[QmpBackupError]) -> type[QmpBackupError]:
    """The kind of error that a command of ours has ended with; `other`, where that has no code of its own."""
    return _KINDS.get(code, other)


_KINDS: Mapping[int, type[QmpBackupError]] = {
    kind.exit_code: kind
    for kind in (
        UsageError,
        VmError,
        StorageError,
        DamagedError,
        NoSuchTarget,
        Locked,
        WrongPassword,
    )
}


def serve_command(folder: BootFolder, boot: Boot) -> list[str]:
    """The command that serves the point: never with `base:allocation`."""
    command = ours("serve", "--target", boot.target)
    command += ["--vm", boot.vm] if boot.vm else []
    return [
        *command,
        *("--point", boot.point, "--socket", str(folder.served), "--json"),
        *("--until-idle", str(_IDLE_SECONDS), "--lock-wait", "60"),
    ]

# SPDX-License-Identifier: Apache-2.0
"""A VM for the length of one use case: locked, connected, of a version we support, looked at."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.errors import CommandError, MonitorBusy, VmError
from qmpbackup.filelock import vm_lock
from qmpbackup.machine import inventory, presence
from qmpbackup.machine.inventory import FoundVm
from qmpbackup.machine.monitor import Monitor
from qmpbackup.model import Vm
from qmpbackup.plan.commands import Command

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Session:
    """An open monitor, what was found behind it, and how to look again."""

    monitor: Monitor
    found: FoundVm
    look: Callable[[], FoundVm]

    @property
    def vm(self) -> Vm:
        """The VM as it was found."""
        return self.found.vm

    def again(self) -> "Session":
        """The same, looked at once more."""
        return replace(self, found=self.look())


@contextmanager
def opened(
    address: str,
    *,
    lock_wait: float = 0.0,
    recover: bool = False,
    look_only: bool = False,
    host: str = "",
) -> Iterator[Session]:
    """Lock and look at the VM; with `recover`, first remove what a run that died left in it.
    `host` is what its host is called, unless as it calls itself.

    Locks are taken on the socket before anything is sent, and on the process behind it, because a
    VM may have two monitor sockets. They spare those who see them a connection; what counts is the
    mark in the VM itself (`presence`), which `look_only` looks for and does not make.

    Raises:
        Locked: another run of ours has the VM.
        VmError: no usable monitor there, or a QEMU that is too old.
    """
    with ExitStack() as stack:
        stack.enter_context(vm_lock(_key(address), lock_wait))
        monitor = stack.enter_context(_connected(address, lock_wait))
        if monitor.peer_pid is not None:
            stack.enter_context(vm_lock(f"pid-{monitor.peer_pid}", lock_wait))
        inventory.require_version(monitor)
        _require_vm(monitor)
        if not look_only:
            stack.enter_context(presence.claimed(monitor, lock_wait))

        def take() -> FoundVm:
            return inventory.take(monitor, host)

        found = _look(monitor, lock_wait, take) if look_only else take()
        if recover and found.needs_recovery:
            from qmpbackup.machine import recovery

            words, level = "after a run that died", logging.WARNING
            if not found.run_died:
                words, level = "after runs that ended while the VM stood still", logging.INFO
            for done in recovery.recover(monitor, found):
                log.log(level, "Cleaned up %s: %s.", words, done)
            found = take()
        yield Session(monitor, found, take)


def _connected(address: str, wait: float) -> Monitor:
    """A connection; a client that holds the monitor may be a run whose locks we do not see."""
    deadline = time.monotonic() + wait
    while True:
        try:
            return Monitor.connect(address)
        except MonitorBusy:
            interrupt.check()
            if time.monotonic() >= deadline:
                raise


def _require_vm(monitor: Monitor) -> None:
    """Name the two kinds of monitor that answer hardly any question.

    Raises:
        VmError: there is no VM behind it, or none yet.
    """
    status, jobs = monitor.execute_each([Command("query-status"), Command("query-jobs")])
    if isinstance(status, CommandError) and status.error_class == "CommandNotFound":
        raise VmError(
            f"At {monitor.address} there is no VM: it is the monitor of qemu-storage-daemon or the "
            "like.",
            "Give the monitor of the VM itself; its disks are backed up where the VM has them.",
        )
    if isinstance(jobs, CommandError) and "machine initialization" in jobs.description:
        raise VmError(
            "The VM is not set up yet: QEMU was started with -preconfig.",
            "Run again after x-exit-preconfig.",
        )


def _look(monitor: Monitor, wait: float, take: Callable[[], FoundVm]) -> FoundVm:
    """Look at a VM that no run has, from before the first look until after it."""
    presence.require_none(monitor, wait)
    found = take()
    while any(mark.lives for mark in presence.marks(monitor)):
        presence.require_none(monitor, wait)
        found = take()
    return found


def _key(address: str) -> str:
    if address.startswith("tcp:"):
        return address
    return str(Path(address.removeprefix("unix:")).resolve())

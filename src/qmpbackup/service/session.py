# SPDX-License-Identifier: Apache-2.0
"""A VM for the length of one use case: locked, connected, of a version we support, looked at."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from qmpbackup.filelock import vm_lock
from qmpbackup.model import Vm
from qmpbackup.qemu import inventory
from qmpbackup.qemu.inventory import Inventory
from qmpbackup.qemu.monitor import Monitor

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Session:
    """An open monitor and what was found behind it."""

    monitor: Monitor
    found: Inventory

    @property
    def vm(self) -> Vm:
        """The VM as it was found."""
        return self.found.vm

    def again(self) -> "Session":
        """The same, looked at once more."""
        return Session(self.monitor, inventory.take(self.monitor))


@contextmanager
def opened(address: str, *, lock_wait: float = 0.0, recover: bool = False) -> Iterator[Session]:
    """Lock and look at the VM; with `recover`, first remove what a run that died left in it.

    The lock is taken on the socket before anything is sent, and on the process behind it, because a
    VM may have two monitor sockets.

    Raises:
        Locked: another run of ours has the VM.
        VmError: no usable monitor there, or a QEMU that is too old.
    """
    with ExitStack() as stack:
        stack.enter_context(vm_lock(_key(address), lock_wait))
        monitor = stack.enter_context(Monitor.connect(address))
        if monitor.peer_pid is not None:
            stack.enter_context(vm_lock(f"pid-{monitor.peer_pid}", lock_wait))
        inventory.require_version(monitor)
        found = inventory.take(monitor)
        if recover and found.needs_recovery:
            from qmpbackup.qemu import recovery

            for done in recovery.recover(monitor, found):
                log.warning("Cleaned up after a run that died: %s.", done)
            found = inventory.take(monitor)
        yield Session(monitor, found)


def _key(address: str) -> str:
    if address.startswith("tcp:"):
        return address
    return str(Path(address.removeprefix("unix:")).resolve())

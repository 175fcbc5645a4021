# SPDX-License-Identifier: Apache-2.0
"""Clients of NBD that only listen while the VM is stopped, so that QEMU loses no interrupt of a disk.

Since 8.2, QEMU counts a request of a disk in an iothread as done a moment before it tells the guest so
(`defer_call_end` in `thread_pool_completion_bh`). Where a `stop`, ours or anybody's, waits for just that
request, it takes away the way by which the guest would be told (`virtio_blk_stop_ioeventfd`), and on a
busy host it can do so within that moment. The guest then waits for ever, and for all that it asks of
this disk later; no drain, no second `stop` and no further request helps. (Seen with 10.0 on a host with
eight busy processes for each core and a guest that writes without pause: once in some 80 stops, without
a run of ours.)

But before it does that, `stop` moves the disk to QEMU's main loop, and waits for what else uses the disk:
each client of NBD has to let go, even one that asks nothing, and does it in the iothread, behind what that
was at. So one client on each disk is enough (seen: 0 in 5,200 stops).

It helps virtio-blk. With virtio-scsi nothing is waited for at that place, and interrupts get lost (seen: once
in 260 stops). Before 9.0 a client of NBD can kill a QEMU with iothreads.
"""

import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from qmpbackup.errors import CommandError
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.nbd_server import NbdServer, ServerTaken
from qmpbackup.model import Vm
from qmpbackup.nbd import protocol
from qmpbackup.plan import commands
from qmpbackup.plan.names import BYSTANDER, RunNames
from qmpbackup.undo import UndoStack

log = logging.getLogger(__name__)

FIRST_SAFE = (9, 0, 0)
"""The first QEMU with iothreads that survives a client of NBD."""

_SECONDS = 10.0
"""For a greeting, which no storage has a part in."""


@contextmanager
def standing_by(
    monitor: Monitor, vm: Vm, names: RunNames, server: NbdServer | None = None
) -> Iterator[None]:
    """A client on each disk inside the block, where it is needed; through a server that is there, or one
    that is there for the block. Where QEMU serves somebody else, or refuses, there is none.
    """
    if not (vm.has_iothreads and vm.running and vm.version >= FIRST_SAFE):
        yield
        return
    undo = UndoStack()
    with ExitStack() as clients:
        try:
            try:
                _begin(monitor, vm, names, server, undo, clients)
            except (ServerTaken, CommandError, OSError) as error:
                log.info("The VM is stopped without a listener at each disk: %r", error)
            yield
        finally:
            # QEMU ends an export itself before its client goes.
            for failure in undo.run():
                log.warning("%s", failure)


def _begin(
    monitor: Monitor,
    vm: Vm,
    names: RunNames,
    server: NbdServer | None,
    undo: UndoStack,
    clients: ExitStack,
) -> None:
    server = server or NbdServer(monitor, names, undo)
    exports = {names.of(BYSTANDER, at): disk.node for at, disk in enumerate(vm.disks)}
    server.export([commands.export_add(name, node) for name, node in exports.items()], undo)
    for name in exports:
        clients.enter_context(_listening(server.path, name))


def _listening(path: str, export: str) -> socket.socket:
    """A connection to an export, past the handshake."""
    with ExitStack() as stack:
        connection = stack.enter_context(socket.socket(socket.AF_UNIX))
        connection.settimeout(_SECONDS)
        connection.connect(path)
        _receive(connection, len(protocol.GREETING))
        connection.sendall(protocol.asking_for(export))
        _receive(connection, protocol.EXPORT_BYTES)
        stack.pop_all()
    return connection


def _receive(connection: socket.socket, length: int) -> None:
    while length:
        received = len(connection.recv(length))
        if not received:
            raise OSError("QEMU closed the connection")
        length -= received

# SPDX-License-Identifier: Apache-2.0
"""Whether the VM of a point may still run: two of it would be one machine twice, for its users and networks.

    sure that it is off   nobody listens at its monitor, no process holds that socket, no image is in use
    sure that it runs     it answers there, keeps us waiting, or has an image open
    neither               we may not connect, something else answers, an image may not be read

Only the first is a reason to boot. Whoever knows better says so, which never counts against the second.
A point of another host tells nothing about this one but by a monitor over TCP.
"""

import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qmpbackup.errors import MonitorBusy, NobodyThere, OutcomeUnknown, UsageError, VmError
from qmpbackup.images import qemu_img
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.reply import Reply
from qmpbackup.machine.sockets import is_held
from qmpbackup.model import VmIdentity
from qmpbackup.plan.commands import Command

_ANSWER_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Signs:
    """What speaks for a VM that runs: what was seen of it, and what could not be seen."""

    runs: tuple[str, ...] = ()
    unclear: tuple[str, ...] = ()

    def obstacles(self, known_off: bool) -> tuple[str, ...]:
        """Why it must not be booted; `known_off`: a user says that the original is off."""
        told = "--original-off says that it is off."
        unclear = () if known_off else tuple(f"{each} {told}" for each in self.unclear)
        return (*self.runs, *unclear)


def signs_of(
    identity: VmIdentity, images: Sequence[tuple[str, str]], *, patience: float = _ANSWER_SECONDS
) -> Signs:
    """The signs of a recorded VM; `images` are its disks' ids, and the files they were on. It has
    `patience` seconds for each answer."""
    here = identity.host in {"", socket.gethostname()}
    runs: list[str] = []
    unclear: list[str] = []
    if identity.address and (here or identity.address.startswith("tcp:")):
        monitor = _at_its_monitor(identity, patience)
        runs += monitor.runs
        unclear += monitor.unclear
    if here:
        runs += [
            f"The image {file} of disk {disk} is in use."
            for disk, file in images
            if file and qemu_img.in_use(Path(file))
        ]
        unclear += _unreadable(images)
    return Signs(tuple(runs), tuple(unclear))


def _unreadable(images: Sequence[tuple[str, str]]) -> Iterator[str]:
    for disk, file in images:
        if file and os.path.exists(file) and not os.access(file, os.R_OK):  # noqa: PTH110
            yield f"Whether the image {file} of disk {disk} is in use cannot be told: it may not be read."


def _at_its_monitor(identity: VmIdentity, patience: float) -> Signs:
    """What is at the recorded address."""
    address = identity.address
    doubt = "Whether the VM of this point still runs cannot be told:"
    try:
        if _answers(identity, patience):
            return Signs(runs=(f"The VM of this point still runs; it answers at {address}.",))
    except NobodyThere:
        if is_held(address):
            said = f"A process still has the socket {address}, whose file is gone."
            return Signs(runs=(f"The VM of this point may still run. {said}",))
    except (MonitorBusy, OutcomeUnknown) as error:
        return Signs(runs=(f"The VM of this point may still run. {error.message}",))
    except (VmError, UsageError) as error:
        return Signs(unclear=(f"{doubt} {error.message}",))
    return Signs()


def _answers(identity: VmIdentity, patience: float) -> bool:
    """Whether that VM, or one that cannot be told from it, answers at the recorded address."""
    with Monitor.connect(identity.address, patience) as monitor:
        uuid = monitor.execute(Command("query-uuid"), patience)
        name = monitor.execute(Command("query-name"), patience)
    if identity.uuid:
        return Reply(uuid, "query-uuid").text("UUID") == identity.uuid
    return Reply(name, "query-name").text("name", "") == identity.name

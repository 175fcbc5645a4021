# SPDX-License-Identifier: Apache-2.0
"""A whole Debian, as `scripts/debian-guest.sh` makes it: GRUB, systemd, the guest agent, several file systems.

It boots in a minute or two under emulation. Inside it are `SYSTEM` (BIOS and UEFI), and three disks of data.
"""

import base64
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lab.disks import Bus, Disk
from lab.guest import accelerators
from lab.patience import PATIENCE
from lab.qemu import Qemu
from lab.qmp import JsonSocket

SCRIPT = Path(__file__).parents[2] / "scripts" / "debian-guest.sh"
CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")

BUSES: dict[str, Bus] = {
    "system": "virtio-blk",
    "data": "virtio-scsi",
    "fat": "ide",
    "ntfs": "nvme",
}
FOLDERS = ("/root", "/srv", "/data", "/fat", "/ntfs")
"""One in each file system: ext4, xfs on LVM, btrfs, FAT, NTFS."""

BOOT_SECONDS = 4 * PATIENCE


def images(folder: Path) -> dict[str, Path]:
    """Disks of a Debian that nobody has booted yet, as images of their own."""
    done = subprocess.run([SCRIPT], stdout=subprocess.PIPE, text=True, check=True)
    built = Path(done.stdout.strip())
    copies = {name: folder / f"{name}.qcow2" for name in BUSES}
    for name, copy in copies.items():
        shutil.copyfile(built / name, copy)
    return copies


class Debian(Qemu):
    """A VM with a Debian, which starts to boot. `agent_socket` is its guest agent's."""

    def __init__(
        self,
        folder: Path,
        disks: dict[str, Path],
        *,
        uefi: bool = False,
        agent: bool = True,
        paused: bool = False,
    ) -> None:
        firmware: Sequence[str] = ()
        if uefi:
            variables = folder / "variables.fd"
            shutil.copyfile(VARIABLES, variables)
            firmware = (
                *("-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={CODE}"),
                *("-drive", f"if=pflash,format=raw,unit=1,id=variables,file={variables}"),
            )
        super().__init__(
            [
                Disk(name, image, bus=BUSES[name], device=("bootindex=0",) * (name == "system"))
                for name, image in disks.items()
            ],
            firmware="seabios",
            memory="768M",
            name="debian",
            accelerators=accelerators(),
            paused=paused,
            args=(
                *firmware,
                *("-smp", "2", "-device", "VGA", "-serial", "file:/dev/null"),
                *("-device", "virtio-serial-pci", "-device", "virtio-rng-pci"),
                *("-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net"),
            ),
        )
        self.agent_socket = self.folder / "agent"
        chardev = f"socket,id=agent,path={self.agent_socket},server=on,wait=off"
        port = "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"
        self.argv += ["-chardev", chardev, "-device", port] if agent else []


@contextmanager
def agent(socket: Path) -> Iterator[JsonSocket]:
    """The guest agent, once it answers."""
    deadline = time.monotonic() + BOOT_SECONDS
    while True:
        with suppress(OSError), JsonSocket(socket, 20.0) as found:
            found.command("guest-ping")
            yield found
            return
        assert time.monotonic() < deadline, f"no guest agent answers at {socket}"
        time.sleep(0.5)


def run(found: JsonSocket, command: str) -> str:
    """Carry out a shell command, which must succeed; what it prints."""
    told = {"path": "/bin/sh", "arg": ["-ec", command], "capture-output": True}
    pid = found.command("guest-exec", told)["pid"]
    while not (state := found.command("guest-exec-status", {"pid": pid}))["exited"]:
        time.sleep(0.1)
    said, errors = (
        base64.b64decode(state.get(name, "")).decode() for name in ("out-data", "err-data")
    )
    assert state.get("exitcode") == 0, f"{command}: {said}{errors}"
    return said


def write(found: JsonSocket, name: str, size: int = 3_000_000) -> None:
    """Write a file into each file system, and a list of their digests beside each; all of it for good."""
    for folder in FOLDERS:
        run(found, f"head -c {size} /dev/urandom >{folder}/{name}")
        run(found, f"cd {folder} && sha256sum {name} >{name}.sum")
    run(found, "sync")


def check(names: Sequence[str]) -> str:
    """The command that succeeds where all those files are as they were written."""
    sums = " ".join(f"{name}.sum" for name in names)
    return " && ".join(f"(cd {folder} && sha256sum -c {sums})" for folder in FOLDERS)


def is_possible() -> bool:
    """Whether there can be one here: it takes root's rights to make it."""
    return os.geteuid() == 0

# SPDX-License-Identifier: Apache-2.0
"""Drills of machines that show nothing, or whose points are damaged. Those of a Linux are in `guest/`."""

import os
import struct
from contextlib import suppress
from pathlib import Path

import pytest

from lab import cli
from lab.backups import back_up
from lab.booted import kill, listener, point_that_halts
from lab.disks import MIB, Disk, create, pattern
from lab.http_proxy import Fate, HttpProxy, Request
from lab.patience import wait_until
from lab.qemu import HALT, Firmware, Qemu
from lab.qmp import Monitor as QmpMonitor
from lab.repositories import Repository, Target, environment_of
from lab.rest_server import RestServer
from qmpbackup.machine.knocking import Knocking
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.screen import Screen, look
from stock.repositories import made as made_there
from stock.repositories import repository

RESET = HALT[:-16] + b"\xb0\xfe\xe6\x64\xf4\xeb\xfd" + HALT[:9]
"""A ROM that resets the machine by its keyboard controller."""

FLOOD = HALT[:-16] + b"\xba\xf8\x03\xb0x\xee\xeb\xfd" + HALT[:8]
"""A ROM that writes to the serial port, without an end."""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A point of a VM that shows nothing, which still runs no more."""
    return point_that_halts(tmp_path)


def drill(target: Target, *more: cli.Argument) -> cli.Result:
    """A drill of the newest point."""
    folder = target.folder if isinstance(target, Repository) else target.parent
    told = {**environment_of(target), "XDG_STATE_HOME": str(folder / "state")}
    return cli.run("drill", "--target", str(target), "--json", *more, env={**os.environ, **told})


def folder_of(target: Target) -> Path | None:
    """The folder of a drill of this target."""
    for journal in Path("/var/tmp").glob("qmpb-drill-*/boot.json"):
        with suppress(OSError):
            if str(target) in journal.read_text():
                return journal.parent
    return None


def processes(folder: Path) -> list[Path]:
    """What runs (in /proc) for a drill, but for servers, which end by themselves when nobody is there."""
    found = []
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            words = (process / "cmdline").read_bytes()
            if os.fsencode(folder) in words and b"serve" not in words.split(b"\0"):
                found.append(process)
    return found


def environment_of_the_machine(folder: Path) -> bytes:
    """What the machine of a drill is told; empty while there is none, or only what it is started by."""
    for process in processes(folder):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"-sandbox" in words and words[0] not in {b"env", b"unshare", b"setpriv"}:
                return (process / "environ").read_bytes()
    return b""


def made(folder: Path, *args: str, firmware: Firmware | None = None) -> Path:
    """A point of a VM that is started so, with an empty disk."""
    disk = Disk("vda", create(folder / "vda", 4 * MIB))
    with Qemu([disk], args=args, firmware=firmware) as vm:
        back_up(vm, folder / "target")
    return folder / "target"


def test_a_machine_that_resets_itself_again_and_again_fails(tmp_path: Path) -> None:
    rom = tmp_path / "rom"
    rom.write_bytes(HALT)
    target = made(tmp_path, "-bios", str(rom), "-no-reboot")
    rom.write_bytes(RESET)
    found = drill(target).check(1).objects[0]
    assert "reset itself" in found["reason"]


def test_a_machine_without_a_system_fails_and_its_screen_is_kept(tmp_path: Path) -> None:
    target = made(tmp_path, "-device", "VGA", firmware="seabios")
    found = drill(target).check(1).objects[0]
    assert "No bootable device" in found["reason"]
    assert Path(found["screenshot"]).read_bytes().startswith(b"\x89PNG")
    assert Path(found["screenshot"]).stat().st_mode & 0o777 == 0o600


def test_a_machine_writes_no_more_than_it_may(target: Path) -> None:
    found = drill(target, "--room", "1").check(3).objects[0]
    assert "more than it may" in found["reason"]


def test_a_machine_that_says_more_and_more_is_ended(tmp_path: Path) -> None:
    rom = tmp_path / "rom"
    rom.write_bytes(HALT)
    target = made(tmp_path, "-bios", str(rom), "-serial", "stdio")
    rom.write_bytes(FLOOD)
    found = drill(target, "--room", "2M").check(3).objects[0]
    assert "more than it may" in found["reason"]


def test_a_vm_that_shows_nothing_is_unknown_and_nothing_is_left(target: Path) -> None:
    found = drill(target, "--within", "1").check(3).objects[0]
    assert found["verdict"] == "unknown"
    (noted,) = drill(target, "--history").check().objects
    assert noted == found
    assert folder_of(target) is None


def test_a_machine_that_somebody_kills_is_unknown(target: Path) -> None:
    env = {"XDG_STATE_HOME": str(target.parent / "state")}
    with cli.start("drill", "--target", target, "--json", env=env) as running:
        wait_until(running.unless_over(lambda: folder_of(target)), "its folder")
        folder = folder_of(target)
        assert folder
        wait_until(running.unless_over(lambda: listener(folder / "settle")), "its monitors")
        with QmpMonitor(folder / "settle") as monitor:
            monitor.poll(lambda: monitor("query-status")["running"])  # so it has been looked at
        machine = listener(folder / "settle")
        assert machine
        kill(machine)
        found = running.wait().check(3).objects[0]
    assert "killed QEMU" in found["reason"]


def test_a_drill_that_is_killed_leaves_no_machine_and_is_cleared_up(target: Path) -> None:
    env = {"XDG_STATE_HOME": str(target.parent / "state"), "RESTIC_PASSWORD": "not-for-guests"}
    with cli.start("drill", "--target", target, env=env) as running:
        wait_until(running.unless_over(lambda: folder_of(target)), "its folder")
        folder = folder_of(target)
        assert folder
        told = running.unless_over(lambda: environment_of_the_machine(folder))
        wait_until(told, "the machine")
        assert b"not-for-guests" not in told()
    wait_until(lambda: not processes(folder), "the end of the machine")
    assert folder.exists()
    drill(target, "--within", "1").check(3)
    assert not folder.exists()


def test_a_damaged_point_is_no_success(target: Path) -> None:
    (file,) = (target / "vda").glob("FULL-*")
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size - 1000)
        opened.write(b"damage")
    result = drill(target).check(8)
    assert "damaged" in result.err
    (noted,) = drill(target, "--history").check().objects
    assert noted["verdict"] == "fail"


def reading(folder: Path, target: Repository) -> list[Path]:
    """A point in a repository of a VM that reads its boot sector; the packs with what is on its disk."""
    disk = Disk("vda", create(folder / "vda", 4 * MIB, contents=pattern(4 * MIB, 1)))
    with Qemu([disk], firmware="seabios") as vm:
        back_up(vm, target)
    return [each for each in folder.glob("**/data/*/*") if each.stat().st_size > MIB]


def test_a_damaged_chunk_that_the_machine_reads_is_damage(tmp_path: Path) -> None:
    target = repository(tmp_path)
    for pack in reading(tmp_path, target):
        damaged = bytearray(pack.read_bytes())
        for at in range(0, len(damaged) * 9 // 10, 1000):
            damaged[at] ^= 1
        pack.chmod(0o600)
        pack.write_bytes(damaged)
    assert "blob" in drill(target).check(8).err.lower()
    (noted,) = drill(target, "--history").check().objects
    assert noted["verdict"] == "fail"


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["403", "503"], ids=["refused", "tried again"])
def test_a_target_that_cannot_be_read_is_said(tmp_path: Path, fate: Fate) -> None:
    with RestServer(tmp_path / "served") as server, HttpProxy(server.url) as proxy:
        target = made_there(Repository(f"rest:{proxy.url}/", tmp_path))
        packs = {each.name for each in reading(tmp_path, target)}
        assert packs

        def hook(request: Request) -> Fate:
            folder = folder_of(target)  # what finds and serves the point reads from them as well
            is_served = folder is not None and any(folder.glob("*.overlay.qcow2"))
            return fate if is_served and request.path.rpartition("/")[2] in packs else "pass"

        proxy.hook = hook
        assert "target could not be read" in drill(target, "--within", "90").check(7).err


def test_a_picture_of_a_real_screen(tmp_path: Path) -> None:
    splash = tmp_path / "splash.bmp"
    pixels = bytes(
        v for y in range(480) for x in range(640) for v in (x % 256, y % 256, x * y % 256)
    )
    head = struct.pack(
        "<2sIIIIiiHHIIiiII", b"BM", 54 + len(pixels), 0, 54, 40, 640, 480, 1, 24, *[0] * 6
    )
    splash.write_bytes(head + pixels)
    boot = f"menu=on,splash={splash},splash-time=60000"
    with Qemu(args=("-device", "VGA", "-boot", boot), firmware="seabios") as vm:

        def shown() -> Screen:
            with Monitor.connect(str(vm.socket)) as monitor:
                return look(monitor, tmp_path / "screen")

        wait_until(lambda: shown().pixels.is_colourful, "a picture full of colours")
        assert shown().pixels.is_like(shown().pixels)
        assert shown().size == (640, 480)


def test_a_network_card_finds_us_and_an_address_in_the_closed_network() -> None:
    card = ["-netdev", "hubport,id=net,hubid=1", "-device", "virtio-net-pci,netdev=net,bootindex=0"]
    vm = Qemu(args=card, firmware="seabios")  # whose card asks by itself what to boot
    with Knocking(vm.folder, [22]) as network:
        vm.argv += network.options(vm.argv)
        with vm:
            wait_until(lambda: network.segment.guests, "an address")
        assert set(network.segment.guests.values()) == {bytes((10, 0, 2, 15))}
        assert network.closed == [22]

# SPDX-License-Identifier: Apache-2.0
"""Backups of a VM that is off: from its images, with the change bitmaps that its QEMU stored in them."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab import cli
from lab.aftermath import assert_clean
from lab.backups import assert_restores, back_up, levels
from lab.disks import CLUSTER, MIB, Disk, contents, create, pattern
from lab.qemu import StartQemu
from lab.repositories import Target, environment_of
from stock.repositories import repository

SIZE = 16 * MIB
USAGE, NO_INCREMENTAL, VM = 2, 4, 6
UUID = "5c2f7a44-0d52-4a3e-9c5b-5f2b7d1c9e10"


@pytest.fixture(params=["folder", "repository"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Target]:
    """Each kind of target; a repository is without fault at the end of every test."""
    if request.param == "folder":
        yield tmp_path / "target"
        return
    made = repository(tmp_path / "target")
    yield made
    made.assert_whole(read_data=True)


def disk(folder: Path, name: str = "vda", seed: int = 1) -> Disk:
    """A disk that stores bitmaps, with contents."""
    return Disk(name, create(folder / f"{name}.qcow2", SIZE, contents=pattern(SIZE, seed)))


def start(target: Target, level: str, *more: cli.Argument) -> tuple[cli.Argument, ...]:
    """The command line of a backup of a VM that is off."""
    return ("backup", "--offline", "--level", level, "--target", str(target), *more)


def run(target: Target, level: str = "auto", *more: cli.Argument) -> cli.Result:
    """A backup of a VM that is off, however it ends."""
    return cli.run(*start(target, level, "--json", *more), env=environment_of(target))


def made(result: cli.Result) -> dict[str, object]:
    """The point of a run that must have made one."""
    point: dict[str, object] = json.loads(result.check().out)["point"]
    return point


def offline_write(image: Path, offset: int, byte: int) -> None:
    """What somebody writes into an image while the VM is off, as `guestfish` does."""
    write = f"write -P {byte} {offset} {CLUSTER}"
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", write, str(image)], check=True)


def wait_until_free(image: Path) -> None:
    """Wait until no QEMU has an image open; one whose parent was killed takes a moment to end."""
    deadline = time.monotonic() + 180
    command = ["qemu-img", "info", str(image)]
    while subprocess.run(command, capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline, "the image stays open"
        time.sleep(0.01)


def test_incrementals_go_on_from_running_to_off_and_back(
    tmp_path: Path, start_qemu: StartQemu, target: Target
) -> None:
    disks = [disk(tmp_path, "vda", 1), disk(tmp_path, "vdb", 2)]
    vm = start_qemu(disks, name="sleeper", uuid=UUID)
    back_up(vm, target)
    vm.write("vda", 0, CLUSTER, 1)
    vm.quit()
    for each in disks:
        offline_write(each.image, 3 * CLUSTER, 2)
    point = made(run(target, "inc"))
    assert set(levels(point).values()) == {"inc"}
    live = {each.id: contents(each.image, "qcow2") for each in disks}
    assert_restores(target, str(point["id"]), live, tmp_path)
    vm.start()
    vm.write("vdb", 5 * CLUSTER, CLUSTER, 3)
    last = back_up(vm, target, "inc")
    assert_restores(target, last["id"], {each.id: vm.contents(each.id) for each in disks}, tmp_path)
    assert_clean(vm, target)


def test_its_points_say_what_the_running_vm_said(
    tmp_path: Path, start_qemu: StartQemu, target: Target
) -> None:
    vm = start_qemu([disk(tmp_path)], name="sleeper", uuid=UUID)
    before = back_up(vm, target)
    vm.quit()
    point: dict[str, Any] = made(run(target))
    told, ran = dict(point["vm"]), dict(before["vm"])
    # Which process it was tells what may have happened meanwhile; this was another one.
    assert told.pop("process") != ran.pop("process")
    assert told == ran
    assert point["consistency"] == "paused"


def test_a_first_backup_names_vm_and_images(tmp_path: Path, target: Target) -> None:
    image = disk(tmp_path).image
    named = ("--image", f"vda={image},format=qcow2", "--vm", "sleeper")
    point = made(run(target, "auto", *named))
    assert levels(point) == {"vda": "full"}
    offline_write(image, 0, 7)
    point = made(run(target, "inc"))
    assert levels(point) == {"vda": "inc"}
    assert_restores(target, str(point["id"]), {"vda": contents(image, "qcow2")}, tmp_path)


def test_raw_images_and_devices_are_read_whole(tmp_path: Path, target: Target) -> None:
    image = create(tmp_path / "disk, with=signs.raw", SIZE, "raw", contents=pattern(SIZE, 3))
    named = ("--image", f"root:disk={image},format=raw", "--vm", "sleeper")
    point = made(run(target, "auto", *named))
    assert_restores(target, str(point["id"]), {"root%3Adisk": image.read_bytes()}, tmp_path)
    run(target, "inc").check(NO_INCREMENTAL)


def test_images_that_a_vm_has_open_are_refused(
    tmp_path: Path, start_qemu: StartQemu, target: Target
) -> None:
    vm = start_qemu([disk(tmp_path)], name="sleeper", uuid=UUID)
    back_up(vm, target)
    result = run(target).check(VM)
    assert str(tmp_path / "vda.qcow2") in result.err
    assert "--socket" in result.err
    back_up(vm, target, "inc")
    assert_clean(vm, target)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "--vm"),
        (("--vm", "x"), "--image"),
        (("--vm", "x", "--image", "vda=/nowhere.qcow2,format=qcow2"), "not there"),
        (("--vm", "x", "--image", "vda={image}"), "format"),
        (("--vm", "x", "--image", "{image}"), "ID=PATH"),
        (("--vm", "x", *("--image", "vda={image},format=qcow2") * 2), "each disk once"),
        (("--quiesce",), "agent"),
    ],
)
def test_what_cannot_be_told_is_asked_for(tmp_path: Path, more: tuple[str, ...], said: str) -> None:
    image = disk(tmp_path).image
    result = run(tmp_path / "target", "auto", *(each.format(image=image) for each in more))
    assert said in result.check(USAGE).err
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("other", ["../{folder}/link", "hard"])
def test_two_disks_of_one_image_are_refused(tmp_path: Path, other: str) -> None:
    image = create(tmp_path / "a.qcow2", SIZE)
    (tmp_path / "link").symlink_to("a.qcow2")
    (tmp_path / "hard").hardlink_to(image)
    second = f"{tmp_path}/{other.format(folder=tmp_path.name)}"
    named = ("--image", f"vda={image},format=qcow2", "--image", f"vdb={second},format=qcow2")
    result = run(tmp_path / "target", "auto", "--vm", "x", *named).check(USAGE)
    assert "Disks vda and vdb have one image" in result.err
    assert not (tmp_path / "target").exists()


def test_an_image_of_another_format_is_refused(tmp_path: Path) -> None:
    image = create(tmp_path / "a.raw", SIZE, "raw")
    named = ("--vm", "x", "--image", f"vda={image},format=qcow2")
    result = run(tmp_path / "target", "auto", *named).check(VM)
    assert "not in qcow2 format" in result.err


def test_images_options_need_a_vm_that_is_off(tmp_path: Path) -> None:
    arguments = ("backup", "--level", "auto", "--target", tmp_path, "--image", "a=b,format=raw")
    assert "--offline" in cli.run("--socket", "/nowhere", *arguments).check(USAGE).err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_ended_lets_go_of_the_images(
    tmp_path: Path, start_qemu: StartQemu, target: Target, number: signal.Signals
) -> None:
    vm = start_qemu([disk(tmp_path)], name="sleeper", uuid=UUID)
    back_up(vm, target)
    for block in range(64):
        vm.write("vda", block * CLUSTER, CLUSTER, 3)
    vm.quit()
    with under_way(target) as running:
        running.signal(number)
        running.process.wait(60)
    image = tmp_path / "vda.qcow2"
    wait_until_free(image)
    # A QEMU whose parent was killed may have to be killed, too, and then has not stored its bitmaps.
    point = made(run(target, "inc" if number == signal.SIGTERM else "auto"))
    assert_restores(target, str(point["id"]), {"vda": contents(image, "qcow2")}, tmp_path)


_STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(); time.sleep(600)"
)
_DIES = """
import os, subprocess, sys, time
from qmpbackup.machine.launching import never_left_behind
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.read(1)
with never_left_behind(child.pid, 0.1):
    print(child.pid, flush=True)
    time.sleep(600)
"""


def test_a_process_that_does_not_end_when_its_run_was_killed_is_killed() -> None:
    command = [sys.executable, "-c", _DIES, _STUBBORN]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pidfd = os.pidfd_open(int(process.stdout.readline()))
        process.kill()
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(60_000), "it is still there"
    os.close(pidfd)


@contextmanager
def under_way(target: Target) -> Iterator[cli.Running]:
    """A slow incremental that has begun."""
    slow = start(target, "inc", "--speed-limit", "10000")
    with cli.start(*slow, env=environment_of(target)) as running:
        assert running.process.stderr is not None
        assert any("Disk vda: inc" in line for line in running.process.stderr)
        yield running

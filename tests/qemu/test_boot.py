# SPDX-License-Identifier: Apache-2.0
"""A VM runs from a point, and is moved to local storage; what is killed on the way costs nothing.

Without an operating system: what a guest would read and write goes through the monitor.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from lab import cli
from lab.backups import assert_restores, back_up, levels
from lab.booted import Booted, booted, kill, listener
from lab.disks import MIB, Bus, Disk, contents, create, first_difference, pattern
from lab.patience import wait_until
from lab.qemu import HALT, Qemu
from lab.qmp import Monitor
from lab.repositories import Target, environment_of
from lab.scripted import FakeMonitor, ScriptedServer
from qmpbackup.service.boot_folder import BootFolder
from stock.repositories import repository

SIZE = 9 * MIB
BUSES: dict[str, Bus] = {"vda": "virtio-blk", "hd1": "ide"}
DISKS = tuple(BUSES)
KILLED = 77


class Scene:
    """A VM that is no more, a point of it, and what that holds."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.target: Target = repository(folder) if kind == "repository" else folder / "target"
        self.environment = {
            **os.environ,
            **environment_of(self.target),
            "XDG_STATE_HOME": str(folder / "state"),
        }
        (folder / "rom").write_bytes(HALT)
        self.expected = {disk: bytearray(pattern(SIZE, n)) for n, disk in enumerate(DISKS)}
        disks = [
            Disk(disk, create(folder / disk, SIZE, contents=bytes(self.expected[disk])), bus=bus)
            for disk, bus in BUSES.items()
        ]
        serial = ("-serial", "stdio", "-bios", str(folder / "rom"), "-name", "worst,,day")
        with Qemu(disks, args=serial, firmware=None) as vm:
            back_up(vm, self.target)
            self.refusal = self.boot("--to", folder / "booted").check(6).err
        assert not (folder / "booted").exists()
        for disk in DISKS:
            (folder / disk).unlink()

    def boot(self, *more: cli.Argument) -> cli.Result:
        """`qmpbackup boot` of the point."""
        return self.run("boot", "--target", str(self.target), *more)

    def run(self, *arguments: cli.Argument) -> cli.Result:
        """A command with what it needs to know."""
        return cli.run(*arguments, env=self.environment)

    @contextmanager
    def booted(self, *more: cli.Argument) -> Iterator[Booted]:
        """The VM, from the point."""
        folder = ("--to", self.folder / "booted")
        with booted("--target", str(self.target), *folder, *more, env=self.environment) as vm:
            yield vm

    def write(self, vm: Booted, disk: str, number: int) -> None:
        """What a guest writes, for good."""
        offset, value = (number * 5 % 8) * MIB + number * 4096, number + 1
        vm.write(disk, offset, 4096, value)
        vm.flush(disk)
        self.expected[disk][offset : offset + 4096] = bytes([value]) * 4096

    @property
    def contents(self) -> dict[str, bytes]:
        """What is on the disks."""
        return {disk: bytes(expected) for disk, expected in self.expected.items()}

    def assert_incremental(self, vm: Booted) -> None:
        """An incremental is possible, and has all."""
        vm.disconnect()  # the monitor takes one
        point = back_up(vm, self.target, "inc")
        assert_restores(self.target, point["id"], self.contents, self.folder)

    def assert_backed_up(self, vm: Booted) -> set[str]:
        """A copy of the target takes a point with all, of the levels that are told."""
        vm.disconnect()
        copy = self.folder / "copy"
        shutil.copytree(self.folder / "target", copy)
        point = back_up(vm, copy)
        assert_restores(copy, point["id"], self.contents, self.folder)
        shutil.rmtree(copy)
        return set(levels(point).values())

    def assert_seen(self, vm: Booted) -> None:
        """What the guest reads at places that were written, and at some that were not."""
        for disk, expected in self.expected.items():
            for offset in range(0, SIZE, MIB):
                value = expected[offset]
                if expected[offset : offset + 4096] == bytes([value]) * 4096:
                    vm.qemu_io(disk, f"read -P {value} {offset} 4096")

    def assert_disks(self, vm: Booted) -> None:
        """The disks that are left, with nothing below or above them."""
        for disk, expected in self.expected.items():
            image = vm.folder / f"{disk}.qcow2"
            assert not first_difference(contents(image, "qcow2"), bytes(expected)), disk
            information = subprocess.run(
                ["qemu-img", "info", "-U", "--output", "json", str(image)],
                capture_output=True,
                check=True,
            )
            assert "backing-filename" not in json.loads(information.stdout)
        assert not list(vm.folder.glob("*.overlay.qcow2"))


@pytest.fixture(params=["folder", "repository"])
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Scene:
    """A point in each kind of target."""
    return Scene(tmp_path, request.param)


@pytest.fixture
def in_folder(tmp_path: Path) -> Scene:
    """A point in a folder."""
    return Scene(tmp_path, "folder")


def test_booted_used_settled_and_free_of_the_backup(scene: Scene) -> None:
    assert "still runs" in scene.refusal
    assert "is in use" in scene.refusal
    with scene.booted() as vm:
        vm.await_running()
        # There may be a password in a location; and a guest's QEMU knows none of the target's.
        assert not any("restic:/" in each for each in vm.processes())
        assert b"RESTIC" not in Path(f"/proc/{vm.pid}/environ").read_bytes()
        scene.assert_seen(vm)
        for number, disk in enumerate(DISKS * 2):
            scene.write(vm, disk, number)
        scene.assert_seen(vm)
        assert "worst" in str(vm.qmp("query-name"))
        (seen,) = scene.run("boot", "--list", "--json").check().objects
        assert (seen["phase"], seen["status"], seen["kept"]) == ("point", "running", True)
        settled = scene.run("settle", "--json").check().objects[0]
        assert set(settled["disks"]) == set(DISKS)
        wait_until(lambda: vm.server is None, "the end of the server")
        scene.write(vm, "vda", 9)
        scene.assert_seen(vm)
        assert not any("boot" in each["id"] for each in vm.qmp("query-jobs"))
        assert "settled" in scene.run("boot", "--end").check(2).err
        scene.assert_incremental(vm)  # to the point that it came from
        scene.write(vm, "hd1", 10)
        vm.quit()
        assert not vm.sockets.exists()
        scene.assert_disks(vm)
        scene.run("boot", "--to", vm.folder).check()  # without the target
        scene.assert_seen(vm)
        scene.write(vm, "vda", 11)
        scene.assert_incremental(vm)


def test_no_base_allocation_is_offered_and_what_is_thrown_away_leaves_nothing(
    in_folder: Scene,
) -> None:
    # With it, QEMU 7.2 and 10.0 give a guest wrong data when a job streams and the server is lost.
    import nbd

    with in_folder.booted() as vm:
        in_folder.write(vm, "vda", 1)
        for disk in DISKS:
            client = nbd.NBD()
            client.add_meta_context("base:allocation")
            client.connect_uri(f"nbd+unix:///{disk}?socket={vm.sockets / 'point'}")
            assert not client.can_meta_context("base:allocation")
            client.shutdown()
        vm.disconnect()
        damaged = in_folder.folder / "damaged"
        damaged.mkdir()
        (damaged / "boot.json").write_text("{")
        link = in_folder.folder / "state" / "qmpbackup" / "booted" / "boot-0"
        link.symlink_to(damaged)
        listed = in_folder.run("boot", "--list").check(8)
        assert (str(vm.folder) in listed.out, str(damaged) in listed.err) == (True, True)
        link.unlink()
        in_folder.run("boot", "--end").check()
        vm.assert_gone()
    assert in_folder.run("boot", "--list").check().out == ""


def test_servers_and_keepers_and_vms_that_are_killed(in_folder: Scene) -> None:
    scene = in_folder
    with scene.booted() as vm:
        scene.write(vm, "vda", 1)
        server, keeper = vm.server, vm.keeper
        assert server
        assert keeper
        kill(server)
        wait_until(lambda: vm.server not in {None, server}, "another server")
        scene.assert_seen(vm)  # QEMU waits for it
        kill(keeper)
        scene.write(vm, "hd1", 2)
        scene.assert_seen(vm)
        scene.boot("--to", vm.folder).check()
        assert vm.keeper not in {None, keeper}
        scene.write(vm, "vda", 3)
        vm.kill()
        wait_until(lambda: vm.server is None, "the end of the server")
        scene.run("boot", "--to", vm.folder).check()
        scene.assert_seen(vm)
        scene.run("settle").check()
        vm.kill()
        scene.assert_disks(vm)


def test_a_vm_that_is_off_is_settled_too(in_folder: Scene) -> None:
    with in_folder.booted() as vm:
        in_folder.write(vm, "vda", 1)
        vm.kill()
        with original_again(vm):
            assert "it answers at" in in_folder.run("boot", "--to", vm.folder).check(6).err
        in_folder.run("settle").check()
        in_folder.assert_disks(vm)
        assert vm.processes() == []
        in_folder.run("boot", "--to", vm.folder).check()
        for pid in (vm.keeper, vm.pid):
            assert pid
            kill(pid)
        assert vm.sockets.exists()
        assert " off " in in_folder.run("boot", "--list").check().out
        assert not vm.sockets.exists()


@contextmanager
def original_again(vm: Booted) -> Iterator[None]:
    """The VM that a point is of runs again."""
    original = json.loads((vm.folder / "boot.json").read_text())["original"]
    path = Path(original["address"])
    path.parent.mkdir()
    try:
        said = {"return": {"UUID": original["uuid"], "name": original["name"]}}
        with ScriptedServer(path, FakeMonitor(lambda _: said).serve):
            yield
    finally:
        shutil.rmtree(path.parent)


def test_an_original_that_cannot_be_asked_is_no_reason_to_boot(tmp_path: Path) -> None:
    target, booted_in = tmp_path / "target", tmp_path / "booted"
    (tmp_path / "rom").write_bytes(HALT)
    disk = Disk("vda", create(tmp_path / "vda", MIB))

    def refused() -> str:
        return cli.run("boot", "--target", target, "--to", booted_in).check(6).err

    with Qemu([disk], args=("-bios", str(tmp_path / "rom")), firmware=None) as vm, ExitStack() as s:
        back_up(vm, target)
        s.enter_context(Monitor(vm.socket))
        assert "did not greet" in refused()
        for _ in range(3):  # QEMU's queue has room for a few
            waiting = s.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            with suppress(BlockingIOError):
                waiting.connect(str(vm.socket))
        assert "may still run" in refused()
        vm.socket.unlink()
        assert "may still run" in refused()
    assert not booted_in.exists()


def test_a_disk_that_only_its_node_names_is_known_again(tmp_path: Path) -> None:
    # As the variables of UEFI firmware are, which the machine has and no device.
    contents = {"vars": pattern(SIZE, 5)}
    image = create(tmp_path / "vars.img", SIZE, contents=contents["vars"])
    (tmp_path / "rom").write_bytes(HALT)
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    node = f"qcow2,node-name=vars,file.driver=file,file.filename={image}"
    words = ("-blockdev", node, "-device", "virtio-blk-pci,drive=vars", "-name", "x")
    target = tmp_path / "target"
    with Qemu(args=(*words, "-bios", str(tmp_path / "rom")), firmware=None) as vm:
        back_up(vm, target)
    for number in range(2):  # the second time out of a point of the VM that had been settled
        folder = ("--target", str(target), "--to", tmp_path / f"vm{number}")
        with booted(*folder, "--settle", env=environment) as again:
            assert levels(back_up(again, target)) == {"vars": "inc"}
            again.quit()
            cli.run("boot", "--to", again.folder, env=environment).check()
            point = back_up(again, target)
            assert levels(point) == {"vars": "inc"}
            assert_restores(target, point["id"], contents, tmp_path)


def test_firmware_that_is_elsewhere_is_found(tmp_path: Path) -> None:
    kept, target = Path("/usr/share/seabios/bios-256k.bin"), tmp_path / "target"
    recorded = tmp_path / "firmware"
    shutil.copyfile(kept, recorded)
    disk = Disk("vda", create(tmp_path / "vda", MIB))
    with Qemu([disk], args=("-bios", str(recorded)), firmware=None) as vm:
        back_up(vm, target)
    recorded.unlink()
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    shown = cli.run("boot", "--print", "--target", target, env=env).check().out
    assert "is not here" not in shown
    assert f"-bios {kept.parent}" in shown
    assert f"{recorded}, in whose place there is" in shown
    with booted("--target", target, "--to", tmp_path / "vm", env=env) as again:
        again.await_running()


SCRIPT = """
import os, sys
from pathlib import Path
from qmpbackup.cli import main
from qmpbackup.machine.monitor import Monitor
from qmpbackup.service.boot_folder import BootFolder

execute, store = Monitor.execute, BootFolder.store
left = int(sys.argv.pop(1))

def done(step):
    global left
    left -= 1
    if not left:
        print(step, flush=True)
        os._exit(77)

def executed(self, command, *rest):
    result = execute(self, command, *rest)
    if not command.name.startswith(("query-", "x-debug")):
        done(command.name)
    return result

def stored(self, boot):
    store(self, boot)
    done(boot.phase.value)

Monitor.execute, BootFolder.store = executed, stored
sys.exit(main.run(lambda: main._parser(sys.argv[1:]), sys.argv[1:]))
"""


def settle_once(scene: Scene, folder: Path, steps: int = 1) -> tuple[int, str]:
    """Settle until so many steps are done, and be killed; the exit code, and what was done last."""
    command = [sys.executable, "-c", SCRIPT, str(steps), "settle", "--to", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=scene.environment
    )
    assert done.returncode in {0, KILLED}, done.stderr
    return done.returncode, done.stdout.strip()


def steps_of_settling(scene: Scene, vm: Booted) -> Iterator[str]:
    """Kill `settle` after its first step, again and again, until it is through."""
    for _ in range(60):
        code, step = settle_once(scene, vm.folder)
        if code == 0:
            return
        yield step
    raise AssertionError("it does not come to an end")


@pytest.mark.parametrize(
    "kept", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["kept", "alone"]
)
def test_settle_is_killed_after_each_of_its_steps(in_folder: Scene, kept: bool) -> None:
    with in_folder.booted() as vm:
        if vm.keeper and not kept:
            kill(vm.keeper)
        done = []
        for number, step in enumerate(steps_of_settling(in_folder, vm)):
            done.append(step)
            if kept:
                vm.await_running()  # also where it had been stopped
            if vm.qmp("query-status")["running"]:
                in_folder.write(vm, DISKS[number % 2], number + 1)
            in_folder.assert_seen(vm)
        vm.await_running()
        expected = {"restored", "blockdev-reopen", "local", "block-commit", "completing", "stop"}
        assert expected < set(done), done
        assert kept or {"job-complete", "settled"} < set(done), done
        in_folder.write(vm, "vda", 70)
        assert in_folder.assert_backed_up(vm) == {"inc"}
        vm.kill()
        in_folder.assert_disks(vm)


def kill_settle_and_vm(scene: Scene, steps: int) -> bool:
    """Kill `settle` after so many steps, and the VM before it does anything more, then go on; false if
    there are not so many."""
    with scene.booted() as vm:
        scene.write(vm, "vda", steps)
        if vm.keeper:
            kill(vm.keeper)
        code, _ = settle_once(scene, vm.folder, steps)
        was_killed = code == KILLED
        if vm.qmp("query-status")["running"]:
            scene.write(vm, "hd1", steps + 1)
        vm.kill()
        scene.run("boot", "--to", vm.folder).check()
        vm.await_running()
        scene.assert_seen(vm)
        scene.write(vm, "vda", steps + 2)
        scene.run("settle").check()
        scene.write(vm, "hd1", steps + 3)
        scene.assert_backed_up(vm)
        vm.kill()
        scene.assert_disks(vm)
        for number, disk in enumerate(DISKS):
            scene.expected[disk] = bytearray(pattern(SIZE, number))
        shutil.rmtree(vm.folder)
        return was_killed


def test_settle_and_the_vm_are_killed_around_the_move(in_folder: Scene) -> None:
    assert kill_settle_and_vm(in_folder, 12)  # one disk is moved, which only QEMU knows


@pytest.mark.slow
def test_settle_and_the_vm_are_killed_after_any_step(in_folder: Scene) -> None:
    steps = 1
    while kill_settle_and_vm(in_folder, steps):
        steps += 1
    assert steps > 15


def test_a_boot_that_cannot_be_leaves_nothing(in_folder: Scene) -> None:
    def refused(code: int, *more: cli.Argument) -> str:
        result = in_folder.boot("--to", in_folder.folder / "booted", *more).check(code)
        assert not (in_folder.folder / "booted").exists()
        return result.err

    assert "does not start" in refused(6, "--accel", "nonsense")
    rom = in_folder.folder / "rom"
    assert "Left out" not in in_folder.boot("--print").check().out
    rom.write_bytes(HALT + HALT)
    assert f"{rom} is another file than when" in in_folder.boot("--print").check().out
    rom.unlink()
    assert "is not here" in refused(6)
    shown = in_folder.boot("--print").check().out
    assert "In the way" in shown
    assert "base:allocation" not in shown
    assert "qmpbackup serve" in shown
    assert in_folder.run("boot", "--list").check().out == ""
    folder = in_folder.folder / "mine"
    folder.mkdir()
    (folder / "file").write_text("mine")
    assert "is not empty" in in_folder.boot("--to", folder).check(2).err
    assert [each.name for each in folder.iterdir()] == ["file"]


def prompts_of(scene: Scene, *arguments: cli.Argument) -> int:
    """How often a command asks for the password, at a terminal."""
    environment = {k: v for k, v in scene.environment.items() if "RESTIC_PASSWORD" not in k}
    secret = scene.environment["RESTIC_PASSWORD"]
    master, terminal = os.openpty()
    command = [sys.executable, "-m", "qmpbackup", *map(str, arguments)]
    with subprocess.Popen(
        command, stdin=terminal, stderr=subprocess.PIPE, env=environment, start_new_session=True
    ) as process:
        os.close(terminal)
        assert process.stderr
        prompts, said = 0, b""
        while piece := os.read(process.stderr.fileno(), 4096):
            said += piece
            if said.lower().rstrip().endswith(b":") and b"password" in said.lower():
                prompts, said = prompts + 1, b""
                os.write(master, secret.encode() + b"\n")
    os.close(master)
    assert process.returncode == 0, said
    return prompts


def test_a_password_is_typed_once(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "repository")
    folder = tmp_path / "booted"
    try:
        assert (
            prompts_of(scene, "boot", "--target", str(scene.target), "--to", folder, "--settle")
            == 1
        )
        (seen,) = scene.run("boot", "--list", "--json").check().objects
        assert seen["phase"] == "settled"
    finally:
        if pid := listener(BootFolder(folder).monitor("settle")):
            kill(pid)


def running_with(word: bytes) -> list[bytes]:
    """Processes with a word in their command line."""
    found = []
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if word in words:
                found.append(b" ".join(words))
    return found


@pytest.mark.parametrize("step", ["boot.json", "serve.log", "qemu.log"])
def test_interrupted_it_leaves_nothing(in_folder: Scene, step: str) -> None:
    folder = in_folder.folder / "booted"
    folder.mkdir()
    (folder / "boot.lock").touch()  # of a run that was killed as it began
    arguments = ("boot", "--target", str(in_folder.target), "--to", folder)
    with cli.start(*arguments, env=in_folder.environment) as running:
        wait_until(running.unless_over((folder / step).exists), f"its {step}")
        running.signal(signal.SIGTERM)
        code = running.wait().code
    vm_runs = folder.exists()
    assert vm_runs == (code == 0)  # it was through already
    if vm_runs:
        in_folder.run("boot", "--end").check()
    assert listener(folder / "x") is None
    assert not folder.exists()
    assert running_with(os.fsencode(str(in_folder.target))) == []

# SPDX-License-Identifier: Apache-2.0
"""A repository in a folder that is full, read-only, or stuck; a scratch that runs full; signals
while a run waits: the run fails with a sentence, leaves no snapshot and no lock, and the next one goes
on incrementally."""

import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import cli
from lab.aftermath import assert_clean, manifests
from lab.backups import leftovers
from lab.disks import CLUSTER, MIB
from lab.patience import wait_until
from lab.proxy import Place, Proxy
from lab.repositories import Repository
from lab.small import fill, needs_root, small_folder
from qmpbackup import interrupt
from qmpbackup.errors import Interrupted
from stock.pulling import Puller
from stock.repositories import held_alone, repository
from stock.scene import Scene, scene

STORAGE, VM, DAMAGED, LOCKED = 7, 6, 8, 11


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Scene]:
    with scene(tmp_path, "repository") as stage:
        yield stage


@needs_root
def test_a_full_repository_costs_the_run_and_nothing_else(stage: Scene, tmp_path: Path) -> None:
    with small_folder(tmp_path / "small", 48 * MIB) as folder:
        stage.repository = made = repository(folder)
        stage.run("full").check()
        filler = fill(folder)
        # Text does not fill anything: what is written must be new, and must not be compressible.
        for block in range(8):
            stage.vm.qemu_io("vda", f"write -s /dev/urandom {block * MIB} 1M")
        for level in ("inc", "full", "auto"):
            failed = stage.run(level).check(STORAGE)
            assert "No space left" in failed.err
            assert len(manifests(made)) == 1
            assert leftovers(stage.vm) == []
        filler.unlink()
        assert_clean(stage.vm, made)
        stage.make_good("inc")
        made.assert_whole(read_data=True)


@needs_root
def test_not_even_room_for_a_lock(stage: Scene, tmp_path: Path) -> None:
    with small_folder(tmp_path / "small", 48 * MIB) as folder:
        stage.repository = made = repository(folder)
        stage.run("full").check()
        fill(folder)
        with (
            (folder / "rest").open("wb", buffering=0) as rest,
            pytest.raises(OSError, match="space"),
        ):
            while True:
                rest.write(bytes(4096))
        stage.write()
        stage.run("inc").check(STORAGE)
        for each in ("filler", "rest"):
            (folder / each).unlink()
        assert_clean(stage.vm, made)
        stage.make_good("inc")


@needs_root
def test_a_repository_that_is_read_only(stage: Scene, tmp_path: Path) -> None:
    with small_folder(tmp_path / "small", 48 * MIB) as folder:
        stage.repository = made = repository(folder)
        stage.run("full").check()
        stage.write()
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        stage.run("inc").check(STORAGE)
        assert leftovers(stage.vm) == []
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        assert_clean(stage.vm, made)
        stage.make_good("inc")


@needs_root
def test_a_scratch_that_runs_full_breaks_the_run_and_no_guest_write(
    stage: Scene, tmp_path: Path
) -> None:
    stage.renew("inc")
    with small_folder(tmp_path / "scratch", 4 * MIB) as folder:
        for block in range(8):
            stage.vm.write("vda", block * MIB, CLUSTER, 5)
        written: list[int] = []

        def overwrite(_proxy: Proxy, at: Place) -> None:
            if at.command == "stop" and at.when == "before":
                (folder / "others").write_bytes(bytes(3 * MIB))
            if at.command == "cont" and at.when == "after":
                for block in range(8):
                    stage.vm.write("vda", block * MIB, MIB, 77)
                    written.append(block)

        path = stage.vm.folder / "proxy"
        with Proxy(path, stage.vm.socket, overwrite):
            failed = stage.run("inc", "--scratch", folder, socket=path)
        assert failed.code in {VM, STORAGE}, failed
        assert "--scratch" in failed.err
        assert len(written) == 8
        assert len(manifests(stage.place)) == 1
        assert [path.name for path in folder.iterdir()] == ["others"]
    stage.make_good("inc")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_signal_ends_the_reading_in_order(
    stage: Scene, number: signal.Signals, code: int
) -> None:
    stage.renew("inc")
    with long_read(stage) as running:
        running.signal(number)
        result = running.wait().check(code)
    assert "Interrupted" in result.err
    assert len(manifests(stage.place)) == 1
    assert_clean(stage.vm, stage.place)
    stage.make_good("inc")


def test_restic_that_asks_whether_a_run_lives_does_not_end_it(stage: Scene) -> None:
    """`restic unlock` sends SIGHUP to the processes whose locks it finds."""
    stage.renew("inc")
    with long_read(stage) as running:
        for _ in range(3):
            of(stage).restic("unlock")
        assert of(stage).restic("list", "locks").out
        stage.vm.quit()
        assert "Interrupted" not in running.wait(60).check(VM).err


def long_read(stage: Scene) -> cli.Running:
    """A run that has begun to read and would go on for minutes."""
    for block in range(10):
        stage.vm.write("vda", block * MIB, CLUSTER, 3)
    arguments = stage.arguments("inc", stage.vm.socket)
    running = cli.start(*arguments, "--speed-limit", "10000", env=stage.environment)
    stage.vm.qmp.poll(running.unless_over(lambda: bool(stage.vm.qmp("query-block-exports"))))
    return running


def test_a_connection_given_up_while_it_begins_does_not_hold_up_the_vm(
    stage: Scene, tmp_path: Path
) -> None:
    """QEMU 7.2 waits, and its guest with it, for an NBD client that has not said what it wants."""
    with Puller(stage.vm, tmp_path) as puller:
        puller.take()
        with pytest.raises(Interrupted) as kept, interrupt.held():
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            with puller.pull.open(puller.seats[0]):
                pass
    assert stage.vm.qmp("query-status")["running"]
    assert kept.value.signal_number == signal.SIGTERM


def test_a_signal_ends_the_wait_for_a_lock(stage: Scene, tmp_path: Path) -> None:
    stage.renew("inc")
    made, logged = of(stage), tmp_path / "log"
    arguments = ("-L", logged, *stage.arguments("inc", stage.vm.socket), "--lock-wait", "100")
    with held_alone(made), cli.start(*arguments, env=made.environment) as running:
        wait_until(lambda: logged.exists() and "Waiting" in logged.read_text())
        running.signal(signal.SIGTERM)
        running.wait().check(143)
    assert_clean(stage.vm, made)
    stage.make_good("inc")


def test_a_second_run_waits_until_the_repository_is_free(stage: Scene) -> None:
    stage.renew("inc")
    made = of(stage)
    arguments = stage.arguments("inc", stage.vm.socket)
    with held_alone(made):
        stage.run("inc", "--lock-wait", "0.5").check(LOCKED)
        patient = cli.start(*arguments, "--lock-wait", "600", env=made.environment)
    with patient:
        patient.wait().check()
    stage.make_good("inc")


def test_qemu_dies_while_it_is_read(stage: Scene) -> None:
    stage.renew("inc")
    with long_read(stage) as running:
        stage.vm.kill()
        running.wait().check(VM)
    made = of(stage)
    made.assert_whole()
    assert len(made.snapshots()) == 1
    stage.vm.start()
    stage.run("inc").check(4)
    stage.run("auto").check()
    stage.make_good("inc")


def test_a_damaged_index_is_named_and_a_rebuilt_one_read(stage: Scene) -> None:
    stage.renew("inc")
    made = of(stage)
    spoil(next(Path(made.location).glob("index/*")))
    # What was read once and checked need not be read again.
    shutil.rmtree(made.environment["RESTIC_CACHE_DIR"])
    stage.write()
    result = stage.run("inc")
    assert result.code in {4, DAMAGED}, str(result)
    assert "index/" in result.err
    made.restic("rebuild-index")
    stage.make_good("inc")
    made.assert_whole(read_data=True)


def test_a_damaged_lock_keeps_everybody_out_until_it_is_removed(stage: Scene) -> None:
    stage.renew("inc")
    made = of(stage)
    lock = Path(made.location) / "locks" / ("0" * 64)
    lock.write_bytes(b"nonsense" * 30)
    assert "lock" in stage.run("inc").check(DAMAGED).err
    made.restic("unlock", "--remove-all")
    lock.unlink(missing_ok=True)
    stage.make_good("inc")


def spoil(path: Path) -> None:
    """Change a byte of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


def of(stage: Scene) -> Repository:
    """The repository of a scene that has one."""
    assert stage.repository
    return stage.repository

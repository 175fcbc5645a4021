# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup doctor` finds what matters, says what to do, and changes nothing."""

import subprocess
from pathlib import Path
from typing import Any

from lab import cli
from lab.backups import back_up, bitmaps
from lab.disks import MIB, Disk, create
from lab.qemu import Qemu, StartQemu

SIZE = 16 * MIB


def findings(vm: Qemu, *more: cli.Argument, code: int = 0) -> list[dict[str, Any]]:
    """What the doctor finds."""
    return cli.run("--socket", vm.socket, "doctor", "--json", *more).check(code).objects


def texts(found: list[dict[str, Any]], about: str) -> str:
    """All findings about one thing."""
    return " · ".join(each["text"] for each in found if each["about"] == about)


def test_a_healthy_vm_has_no_problems_and_is_left_alone(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    vm = start_qemu([Disk("vda", create(tmp_path / "a.qcow2", SIZE))])
    found = findings(vm, "--target", tmp_path / "target")
    assert {each["health"] for each in found} <= {"fine", "advice"}
    assert "after a restart" in texts(found, "vda")
    assert not (tmp_path / "target").exists()
    assert bitmaps(vm) == set()


def test_disks_that_lose_their_bitmaps_are_named_with_a_way_out(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    raw = create(tmp_path / "a.raw", SIZE, "raw")
    vm = start_qemu([Disk("vda", raw, "raw")])
    (finding,) = (each for each in findings(vm) if "until QEMU restarts" in each["text"])
    assert finding["about"] == "vda"
    assert "data file" in finding["todo"]


def test_it_says_when_the_next_backup_is_a_full(tmp_path: Path, start_qemu: StartQemu) -> None:
    raw = create(tmp_path / "a.raw", SIZE, "raw")
    vm = start_qemu([Disk("vda", raw, "raw")])
    target = tmp_path / "target"
    back_up(vm, target)
    assert "is a full" not in texts(findings(vm, "--target", target), "vda")
    vm.restart()
    assert "is a full" in texts(findings(vm, "--target", target), "vda")


def test_a_target_that_was_there_is_not_taken_for_a_new_one(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    vm = start_qemu([Disk("vda", create(tmp_path / "a.qcow2", SIZE))])
    target, away = tmp_path / "target", tmp_path / "away"
    assert "the first run makes it" in texts(findings(vm, "--target", target), "target")
    back_up(vm, target)
    target.rename(away)
    target.mkdir()  # the mount point, with nothing mounted
    found = findings(vm, "--target", target, code=1)
    (finding,) = (each for each in found if each["health"] == "problem")
    assert finding["about"] == "target"
    assert "change bitmaps of one that was there" in finding["text"]
    assert "is mounted" in finding["todo"]
    assert "the first run makes it" not in texts(found, "target")
    elsewhere = findings(vm, "--target", tmp_path / "other")
    assert "the first run makes it" in texts(elsewhere, "target")
    target.rmdir()
    away.rename(target)
    assert findings(vm, "--target", target)


def test_an_agent_that_is_not_there_is_a_problem(tmp_path: Path, start_qemu: StartQemu) -> None:
    vm = start_qemu([Disk("vda", create(tmp_path / "a.qcow2", SIZE))])
    agent = ("--agent-socket", tmp_path / "nothing")
    result = cli.run("--socket", vm.socket, *agent, "doctor", "--json").check(1)
    (finding,) = (each for each in result.objects if each["health"] == "problem")
    assert finding["about"] == "guest agent"
    assert finding["todo"]


def test_leftovers_of_a_dead_run_are_a_problem_until_the_next_run(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    vm = start_qemu([Disk("vda", create(tmp_path / "a.qcow2", SIZE))])
    node = {"driver": "null-co", "node-name": "qmpbackup-abcdef-scratch0", "size": SIZE}
    vm.qmp("blockdev-add", **node)
    found = findings(vm, code=1)
    assert "qmpbackup-abcdef-scratch0" in texts(found, "leftovers")
    back_up(vm, tmp_path / "target")
    assert not texts(findings(vm), "leftovers")


def test_encrypted_disks_are_pointed_out(tmp_path: Path, start_qemu: StartQemu) -> None:
    image = tmp_path / "a.luks"
    hidden = ("--object", "secret,id=s,data=passphrase")

    create_command = ["qemu-img", "create", "-q", *hidden, "-f", "luks", "-o", "key-secret=s"]
    # qemu-img measures its hash first, and fails where that takes less than a tick of the clock.
    create_command += ["-o", "hash-alg=sha512,iter-time=10", str(image), str(SIZE)]
    subprocess.run(create_command, check=True)
    disk = Disk("vda", image, "luks", options={"key-secret": "s"})
    vm = start_qemu(args=("-object", "secret,id=s,data=passphrase", *disk.arguments()))
    assert "plain text" in texts(findings(vm), "vda")


def test_what_is_known_of_the_target_is_told(tmp_path: Path, start_qemu: StartQemu) -> None:
    vm = start_qemu([Disk("vda", create(tmp_path / "a.qcow2", SIZE))])
    target = tmp_path / "target"
    back_up(vm, target)
    (full,) = (target / "vda").glob("FULL-*")
    whole = full.read_bytes()
    full.write_bytes(whole[:-1] + b"!")
    cli.run("verify", "--target", target).check(8)
    assert full.name in texts(findings(vm, "--target", target, code=1), "target")
    full.write_bytes(whole)
    cli.run("verify", "--target", target).check()
    (target / "points" / "vda.merge").write_text("a journal")
    (finding,) = (each for each in findings(vm, "--target", target) if "merge" in each["text"])
    assert "qmprestore commit" in finding["todo"]

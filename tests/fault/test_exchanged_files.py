# SPDX-License-Identifier: Apache-2.0
"""Somebody who may write where backups lie exchanges heads and names while we work: nothing of the host
gets into what we write, nothing outside is written to, and we do not call it a success."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from lab import cli
from lab.devices import loop_device
from lab.disks import Disk, create
from lab.exchanging import SECRET, attacking, flipping, forged_head, secret_file
from lab.proxy import Place, Proxy
from lab.qemu import StartQemu
from qmpbackup import landlock
from qmpbackup.model import Level
from qmpbackup.service.verify import Request as VerifyRequest
from qmpbackup.service.verify import verify
from stock.stored import MIB, Stored, Write, run

STORAGE = 7
DISK = "hd0"
MERGES: dict[str, tuple[str, ...]] = {
    "qmprebase": ("qmprebase", "rebase"),
    "commit": ("qmprestore", "commit"),
    "snapshotrebase": ("qmprestore", "snapshotrebase"),
    "prune": ("qmpbackup", "prune", "--keep-last", "1"),
    "prune a part": ("qmpbackup", "prune", "--keep-daily", "2"),
    "prune compressed": ("qmpbackup", "prune", "--keep-daily", "2"),
}


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return make(tmp_path)


def make(tmp_path: Path, *, compress: bool = False) -> Stored:
    """A full and, a day later, three incrementals of one disk."""
    stored = Stored(tmp_path / "target", compress=compress)
    full = stored.add(Level.FULL, {DISK: [Write(1, 0, 2 * MIB)]})
    stored.target.replace_manifest(replace(full, time=full.time - timedelta(days=1)))
    for number in (2, 3, 4):
        stored.add(Level.INC, {DISK: [Write(number, number * 65536, 65536)]})
    return stored


def files(stored: Stored) -> list[Path]:
    return [stored.file(point, DISK) for point in stored.points]


def being_written(stored: Stored) -> list[Path]:
    folder = stored.path / DISK
    return [*folder.glob("*.partial"), *folder.glob("*.merged")]


def holds_secret(folder: Path) -> list[Path]:
    """Files below a folder that hold anything of the secret, read as images too."""
    return [each for each in folder.rglob("*") if each.is_file() and SECRET in each.read_bytes()]


def merge(kind: str, stored: Stored, env: Mapping[str, str]) -> cli.Result:
    program, *arguments = MERGES[kind]
    if program == "qmpbackup":
        place = ["--target", str(stored.path)]
    else:
        place = ["--dir", str(stored.path / DISK)]
    return cli.run(*arguments, *place, program=program, env=env)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "device"
    file.write_bytes(bytes(4 * MIB))
    with loop_device(file) as device:
        yield device


@pytest.mark.parametrize("format_", ["qcow2", "raw"])
@pytest.mark.parametrize("which", [0, -1])
def test_a_restore_reads_no_file_that_an_exchanged_head_names(
    stored: Stored, tmp_path: Path, format_: str, which: int
) -> None:
    secret = secret_file(tmp_path / "secret", 4 * MIB)
    attack = flipping([files(stored)[which]], secret)
    out = tmp_path / "out"
    arguments: list[cli.Argument] = [
        "restore",
        "--target",
        stored.path,
        "--output",
        out,
        "--format",
        format_,
    ]
    with attack as env:
        refused = cli.run(*arguments, env=env)
    assert refused.code in {STORAGE, 8}, refused
    assert not out.exists()
    cli.run(*arguments).check()
    assert holds_secret(out) == []


def test_nor_does_one_to_a_block_device(stored: Stored, tmp_path: Path, device: Path) -> None:
    secret = secret_file(tmp_path / "secret", 4 * MIB)
    attack = flipping(files(stored), secret)
    arguments: list[cli.Argument] = ["restore", "--target", stored.path, "--output-file", device]
    with attack as env:
        refused = cli.run(*arguments, env=env).check(STORAGE)
    assert "was changed while it was read" in refused.err
    assert "holds only part" in refused.err
    assert SECRET not in device.read_bytes()
    cli.run(*arguments).check()
    assert device.read_bytes() == stored.expected[stored.points[-1].id, DISK]


def test_a_verification_notices_and_reads_none_either(stored: Stored, tmp_path: Path) -> None:
    secret = secret_file(tmp_path / "secret", 4 * MIB)
    attack = flipping(files(stored), secret)
    with attack as env:
        refused = cli.run("verify", "--target", stored.path, env=env)
    assert refused.code in {1, STORAGE, 8}, refused
    assert "was changed while it was read" in refused.out + refused.err
    cli.run("verify", "--target", stored.path).check()


@pytest.mark.parametrize("kind", MERGES)
def test_a_merge_reads_no_file_that_an_exchanged_head_names(tmp_path: Path, kind: str) -> None:
    stored = make(tmp_path, compress=kind == "prune compressed")
    secret = secret_file(tmp_path / "secret", 4 * MIB)
    before = secret.read_bytes()
    attack = flipping(files(stored), secret)
    with attack as env:
        refused = merge(kind, stored, env)
    assert refused.code in {STORAGE, 8}, refused
    assert holds_secret(stored.path) == []
    assert secret.read_bytes() == before
    assert verify(VerifyRequest(stored.path)).whole
    merge(kind, stored, {}).check()
    assert verify(VerifyRequest(stored.path)).whole


def test_an_export_reads_no_file_that_an_exchanged_head_names(
    stored: Stored, tmp_path: Path
) -> None:
    secret = secret_file(tmp_path / "secret", 4 * MIB)
    attack = flipping(files(stored), secret)
    out = tmp_path / "out" / "merged"
    arguments: list[cli.Argument] = ["merge", "--dir", stored.path / DISK, "--targetfile", out]
    with attack as env:
        refused = cli.run(*arguments, program="qmprestore", env=env)
    assert refused.code in {STORAGE, 8}, refused
    assert not out.exists()
    cli.run(*arguments, program="qmprestore").check()
    assert holds_secret(out.parent) == []


@pytest.mark.parametrize("kind", MERGES)
def test_a_link_in_the_place_of_the_merged_file_is_not_followed(tmp_path: Path, kind: str) -> None:
    stored = make(tmp_path, compress=kind == "prune compressed")
    victim = tmp_path / "image-of-another-vm"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(victim), str(stored.size))
    before = victim.read_bytes()

    def plant() -> None:
        for name in being_written(stored):
            if name.is_file():
                name.unlink()
                name.symlink_to(victim)

    with attacking(plant) as env:
        refused = merge(kind, stored, env)
    assert refused.code in {STORAGE, 8}, refused
    assert victim.read_bytes() == before
    assert verify(VerifyRequest(stored.path)).whole
    merge(kind, stored, {}).check()
    assert verify(VerifyRequest(stored.path)).whole
    assert victim.read_bytes() == before


@pytest.mark.skipif(not landlock.is_there(), reason="a kernel without Landlock")
@pytest.mark.parametrize("kind", MERGES)
def test_a_server_that_changes_the_file_being_written_has_nothing_else_written_to(
    tmp_path: Path, kind: str
) -> None:
    """The head of an image that is written is parsed as it is: behind it may be a share's other side."""
    stored = make(tmp_path, compress=kind == "prune compressed")
    secret = secret_file(tmp_path / "secret", 4 * MIB)
    before = secret.read_bytes()
    forged = forged_head(files(stored)[0], secret)

    def exchange() -> None:
        for name in being_written(stored):
            if name.stat().st_size:
                with name.open("r+b") as file:
                    file.write(forged)

    with attacking(exchange) as env:
        refused = merge(kind, stored, env)
    assert refused.code in {STORAGE, 8}, refused
    assert secret.read_bytes() == before
    assert holds_secret(stored.path) == []
    merge(kind, stored, {}).check()
    assert verify(VerifyRequest(stored.path)).whole


def test_a_backup_whose_new_file_is_exchanged_writes_no_data_elsewhere(
    start_qemu: StartQemu, tmp_path: Path
) -> None:
    image = tmp_path / "vda.qcow2"
    create(image, 4 * MIB, "qcow2")
    vm = start_qemu([Disk("vda", image)])
    target, secret = tmp_path / "target", secret_file(tmp_path / "secret", 4 * MIB)
    before = secret.read_bytes()

    def exchange(_: Proxy, place: Place) -> None:
        if place.when == "before" and place.command == "blockdev-add":
            for each in target.glob("vda/*.partial"):
                if each.read_bytes()[:4] == b"QFI\xfb":
                    forged = forged_head(each, secret)
                    with each.open("r+b") as file:
                        file.write(forged)

    with Proxy(tmp_path / "proxy", vm.socket, exchange) as proxy:
        arguments = ("--socket", proxy.path, "backup", "--target", target)
        refused = cli.run(*arguments).check(STORAGE)
    assert "names another file for its data" in refused.err
    assert secret.read_bytes() == before
    with Proxy(tmp_path / "proxy", vm.socket, lambda *_: None) as proxy:
        cli.run("--socket", proxy.path, "backup", "--target", target).check()
    assert verify(VerifyRequest(target)).whole

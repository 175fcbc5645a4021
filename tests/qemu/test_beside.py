# SPDX-License-Identifier: Apache-2.0
"""Scratch goes beside an image that QEMU writes to, and into no other folder that it names."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab.disks import MIB, Disk, create
from lab.proxy import Place, Proxy
from lab.qemu import StartQemu
from qmpbackup.machine import scratch
from qmpbackup.machine.beside import is_image_folder
from qmpbackup.service import session


@contextmanager
def holder(path: Path, mode: str) -> Iterator[int]:
    """A process that has a file open."""
    code = "import sys; f = open(sys.argv[1], sys.argv[2]); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "images" / "vm.raw"
    path.parent.mkdir()
    path.write_bytes(bytes(65536))
    return path


def test_beside_what_the_process_writes_to(image: Path) -> None:
    with holder(image, "r+b") as pid:
        assert is_image_folder(image, pid)
    assert not is_image_folder(image, pid)


def test_not_beside_what_it_only_reads_or_has_not_open(image: Path) -> None:
    with holder(image, "rb") as pid:
        assert not is_image_folder(image, pid)
        assert not is_image_folder(image, None)
    assert not is_image_folder(image, os.getpid())


def test_not_in_a_folder_that_only_a_link_leads_out_of(image: Path) -> None:
    """The room is taken where the image is named; that must be the image's own file system."""
    with holder(image, "r+b") as pid:
        shm = Path("/dev/shm") / f"qmpbackup-test-{os.getpid()}"
        shm.symlink_to(image)
        try:
            assert not is_image_folder(shm, pid)
        finally:
            shm.unlink()


def test_a_lock_of_qemus_programs_will_do_where_images_can_lie(
    start_qemu: StartQemu, tmp_path: Path
) -> None:
    disk = tmp_path / "vda.qcow2"
    create(disk, MIB, "qcow2")
    start_qemu([Disk("vda", disk)])
    assert is_image_folder(disk, None)
    assert is_image_folder(disk, os.getpid())


@pytest.mark.parametrize("name", ["not-its-own", "/etc/passwd", "/boot/vmlinuz", "/nowhere/x"])
def test_a_qemu_that_names_another_file_gets_no_room_beside_it(
    start_qemu: StartQemu, tmp_path: Path, name: str
) -> None:
    disk = tmp_path / "vda.qcow2"
    create(disk, MIB, "qcow2")
    vm = start_qemu([Disk("vda", disk)])
    theirs = tmp_path / "of-another-user"
    theirs.mkdir(mode=0o700)
    (theirs / "not-its-own").write_bytes(bytes(MIB))
    claimed = str(theirs / name)  # an absolute name stays as it is

    def lie(proxy: Proxy, place: Place) -> None:
        if place.when == "after":
            proxy.answer = lambda answer: claim(answer, str(disk), claimed)

    for address, expected in ((vm.socket, tmp_path), (tmp_path / "proxy", scratch.FALLBACK)):
        with (
            Proxy(tmp_path / "proxy", vm.socket, lie),
            session.opened(str(address), look_only=True) as opened,
        ):
            (found,) = opened.vm.disks
            assert scratch.folder_for(found, None, opened.monitor.peer_pid) == expected


def claim(answer: dict[str, Any], real: str, claimed: str) -> bytes:
    text = json.dumps(answer).replace(json.dumps(real)[1:-1], json.dumps(claimed)[1:-1])
    return text.encode() + b"\r\n"

# SPDX-License-Identifier: Apache-2.0
"""Booted VMs as they are told of, and as they are found again."""

import json
import threading
from pathlib import Path

import pytest

from lab.scripted import ScriptedServer
from qmpbackup import documents
from qmpbackup.errors import ConnectError, DamagedError
from qmpbackup.machine import booting
from qmpbackup.plan.booting import Launch
from qmpbackup.service.boot import Prepared
from qmpbackup.service.boot_folder import Boot, BootFolder
from qmpbackup.service.boot_keeper import PointServer
from qmpbackup.service.booted import Seen
from qmpbackup.service.throwaway import throwaway_folder

TARGET = "restic:rest:http://user:Sesame@host/r"


def test_no_password_of_a_location_is_shown() -> None:
    boot = Boot(TARGET, "", "p", "vm", "q35", ("qemu-system-x86_64",), ())
    folder = BootFolder(Path("/f"))
    found = Prepared(folder, boot, Launch(("qemu-system-x86_64",)), ())
    shown = [found.by_hand(), documents.bootable(found), documents.booted(found)]
    shown += [documents.seen(Seen(folder, boot, "off", kept=False))]
    assert "Sesame" not in json.dumps(shown)
    assert "host/r" in json.dumps(shown)


def test_a_vm_that_cannot_be_reached_may_run(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    assert booting.reach(path) is None
    assert booting.listener(path) is None
    path.touch()  # which no VM can be behind, but neither has one ended
    with pytest.raises(ConnectError):
        booting.reach(path, patience=0.0)
    with pytest.raises(ConnectError):
        booting.listener(path)


def test_a_vm_that_ends_as_it_is_reached_runs_no_more(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    seen = []

    def closes_at_once(_: object) -> None:
        seen.append(True)
        if len(seen) == 2:
            path.unlink()

    with ScriptedServer(path, closes_at_once):
        assert booting.reach(path) is None
    assert len(seen) == 2


def test_runs_leave_the_folders_of_each_other_alone() -> None:
    failed: list[BaseException] = []

    def use_folders() -> None:
        try:
            for _ in range(40):
                with throwaway_folder("drill") as folder:
                    (folder.path / "file").touch()
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=use_folders) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_what_a_server_says_of_its_target(tmp_path: Path) -> None:
    server = PointServer(BootFolder(tmp_path))
    log = tmp_path / "serve.log"
    server.require_whole()
    assert server.trouble(waiting=True) == ""
    log.write_text("Disk vda is proved: all is well.\nwarning: It answers 503. Trying again.\n")
    assert server.trouble(waiting=False) == ""
    assert server.trouble(waiting=True) == "It answers 503."
    log.write_text("warning: vda could not be read: It answers 403.\n")
    assert server.trouble(waiting=False) == "vda could not be read: It answers 403."
    server.require_whole()
    for said in ("vda is damaged: Blob 1 is not.", "Disk vda is served no more: File 1 is not."):
        log.write_text(f"error: {said}\nerror: something else\n")
        with pytest.raises(DamagedError, match="1 is not"):
            server.require_whole()


def test_what_a_killed_removal_has_left_is_removed() -> None:
    with throwaway_folder("drill") as folder:
        left = folder.path.with_name(f"{folder.path.name}-left")
        left.mkdir()
        (left / "boot.json").touch()
        (left / "link").symlink_to("/")
        with throwaway_folder("drill"):
            assert folder.path.exists()
            assert not left.exists()

# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup config check --live` looks at all VMs and targets of a configuration, and changes nothing."""

import json
from pathlib import Path

from lab import cli
from lab.backups import bitmaps
from lab.disks import MIB, Disk, create
from lab.qemu import StartQemu


def test_all_vms_and_targets_are_looked_at(tmp_path: Path, start_qemu: StartQemu) -> None:
    vm = start_qemu([Disk("vda", create(tmp_path / "a.qcow2", 16 * MIB))])
    password, repository = tmp_path / "password", tmp_path / "repository"
    password.write_text("right")
    opened = {"RESTIC_PASSWORD_FILE": str(password)}
    for each in (repository, tmp_path / "cold"):
        cli.run("init", "--target", f"restic:{each}", env=opened).check()
    file = tmp_path / "config.toml"
    file.write_text(
        f"""
        [vm.on]
        socket = {json.dumps(str(vm.socket))}
        targets = ["main", "offsite"]
        [vm.away]
        socket = "/nowhere/away.qmp"
        targets = ["cold"]
        [target.main]
        location = "{tmp_path}/points/{{vm}}"
        [target.offsite]
        location = "restic:{repository}"
        password = {{ file = "{password}" }}
        [target.cold]
        location = "restic:{tmp_path}/cold"
        password = {{ file = "{password}" }}
        """
    )
    found = cli.run("config", "check", "--live", "--json", "--config", file).check().objects
    looked = {(each["vm"], each["target"]): each for each in found if each["type"] == "looked"}
    assert set(looked) == {("on", "main"), ("on", "offsite"), ("away", "cold"), ("", "cold")}
    assert all(each["well"] for each in looked.values()), looked
    assert all(each["off"] is (vm == "away") for (vm, _), each in looked.items())
    assert "QEMU" in {each["about"] for each in looked["on", "main"]["findings"]}
    password.write_text("wrong")
    told = cli.run("config", "check", "--live", "--config", file).check(1)
    assert "on → main: nothing would keep a backup from working" in told.out
    assert "on → offsite: problem: target:" in told.out
    assert "\ncold: " in told.out
    assert bitmaps(vm) == set()
    assert not (tmp_path / "points").exists()

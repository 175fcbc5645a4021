# SPDX-License-Identifier: Apache-2.0
"""A Linux under drill: it comes up, a command in it fails, or it panics."""

import os
from pathlib import Path

import pytest

from lab import cli
from lab.backups import back_up
from lab.disks import MIB, Disk, create
from lab.guest import Guest

pytestmark = pytest.mark.guest


def test_a_drill_tells_whether_a_linux_comes_up(tmp_path: Path) -> None:
    target = tmp_path / "target"
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}

    def drill(code: int, *more: cli.Argument) -> dict[str, object]:
        result = cli.run("drill", "--target", target, "--json", *more, env=env).check(code)
        return dict(result.objects[0])

    disk = Disk("vda", create(tmp_path / "disk", 64 * MIB))
    with Guest([disk], boot="install") as guest:
        guest.sync()
    with Guest([disk], boot="disk") as guest:
        point = back_up(guest, target)["id"]
        guest.run("rm /init; sync")
        back_up(guest, target)
    found = drill(0, "--point", point, "--exec", "test -e /init", "--exec", "true")
    assert found["verdict"] == "pass"
    assert "2 commands" in str(found["reason"])
    assert "exit 5" in str(drill(1, "--point", point, "--exec", "exit 5")["reason"])
    broken = drill(1)
    assert broken["verdict"] == "fail"
    verdicts = cli.run("drill", "--history", env=env).check().out
    assert [line.split()[0] for line in verdicts.splitlines()] == ["PASS", "FAIL", "FAIL"]

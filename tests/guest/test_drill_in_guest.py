# SPDX-License-Identifier: Apache-2.0
"""A Linux under drill: it comes up, a command in it fails, or it panics."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from lab import cli
from lab.backups import back_up
from lab.booted import kill, listener
from lab.disks import MIB, Disk, create
from lab.guest import Guest
from lab.patience import wait_until

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
    lose_the_server(target, str(point), env)
    assert "exit 5" in str(drill(1, "--point", point, "--exec", "exit 5")["reason"])
    broken = drill(1)
    assert broken["verdict"] == "fail"
    verdicts = cli.run("drill", "--history", env=env).check().out
    assert [line.split()[0] for line in verdicts.splitlines()] == ["PASS", "PASS", "FAIL", "FAIL"]


def lose_the_server(target: Path, point: str, env: dict[str, str]) -> None:
    """A drill of a point whose server is killed, and which comes up all the same."""
    with cli.start("drill", "--target", target, "--point", point, env=env) as running:
        wait_until(running.unless_over(lambda: overlays_of(target)), "what the machine writes to")
        (overlay,) = overlays_of(target)
        server = listener(overlay.parent / "point")
        assert server
        kill(server)
        running.wait().check()


def overlays_of(target: Path) -> list[Path]:
    """What the machine under drill writes to, once its point is served."""
    found = []
    for overlay in Path("/var/tmp").glob("qmpb-drill-*/*.overlay.qcow2"):
        with suppress(FileNotFoundError):  # of another drill that ends just now
            if str(target) in (overlay.parent / "boot.json").read_text():
                found.append(overlay)
    return found

# SPDX-License-Identifier: Apache-2.0
"""A whole Debian under drill: wrecked in some ways, and without an agent."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lab import cli, debian
from lab.backups import back_up
from lab.debian import Debian

pytestmark = [
    pytest.mark.guest,
    pytest.mark.slow,
    pytest.mark.skipif(not debian.is_possible(), reason="only root can make a Debian"),
]


def drilled(tmp_path: Path, images: dict[str, Path], *, agent: bool = True) -> dict[str, Any]:
    """What a drill finds of a Debian with these disks, which nobody has booted since."""
    target = tmp_path / "target"
    with Debian(tmp_path, images, agent=agent, paused=True) as vm:
        back_up(vm, target)
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    within = ("--within", str(debian.BOOT_SECONDS), "--json")
    with cli.start("drill", "--target", str(target), *within, env=env) as running:
        return dict(running.wait(2 * debian.BOOT_SECONDS).objects[0])


WRECKS = {
    "boot sector": ("0 446", "Booting from Hard Disk"),
    "super block of the system": ("66M 1M", "grub rescue>"),
}
"""Where zeros are written on the disk with the system (tests/guest/debian/install), and what is seen then."""


@pytest.mark.parametrize(("zeros", "seen"), WRECKS.values(), ids=WRECKS)
def test_a_wrecked_debian_fails(tmp_path: Path, zeros: str, seen: str) -> None:
    images = debian.images(tmp_path)
    command = ["qemu-io", "-f", "qcow2", "-c", f"write -q -z {zeros}", str(images["system"])]
    subprocess.run(command, check=True)
    found = drilled(tmp_path, images)
    assert found["verdict"] == "fail"
    assert re.search(seen, found["reason"]), found["reason"]


def test_a_debian_without_an_agent_shows_a_login_prompt(tmp_path: Path) -> None:
    found = drilled(tmp_path, debian.images(tmp_path), agent=False)
    assert found["verdict"] == "pass"
    assert "login prompt" in found["reason"]

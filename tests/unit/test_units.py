# SPDX-License-Identifier: Apache-2.0
"""The units of systemd that are given out: systemd itself finds nothing wrong with them."""

import re
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "dist" / "systemd"
EXPOSED = {"qmpbackup.service": 3.0, "qmpbackup-failed@.service": 3.7}
"""What `systemd-analyze security` may find at most, of 10."""


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """systemd's opinion; it need not run."""
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, check=False
    )


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with a program that is there in place of ours."""
    for unit in UNITS.glob("qmpbackup*.*"):
        text = unit.read_text().replace("/usr/bin/qmpbackup", "/bin/true")
        (tmp_path / unit.name).write_text(text)
    return tmp_path


def test_systemd_understands_each_line(units: Path) -> None:
    found = analyze("verify", "--man=no", *sorted(units.iterdir()))
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


@pytest.mark.parametrize("unit", EXPOSED)
def test_little_is_exposed(unit: str, units: Path) -> None:
    threshold = str(int(EXPOSED[unit] * 10))
    found = analyze("security", "--offline=yes", f"--threshold={threshold}", units / unit)
    assert found.returncode == 0, found.stdout


def test_what_else_holds_them_together() -> None:
    service = (UNITS / "qmpbackup.service").read_text()
    timer = (UNITS / "qmpbackup.timer").read_text()
    # Without it, locks of a run by hand go with the folder when the unit ends.
    assert "RuntimeDirectoryPreserve=yes" in service
    # The watchdog, which thaws guests, has to survive a stop.
    assert not re.search(r"^KillMode=", service, re.MULTILINE)
    assert "OnFailure=qmpbackup-failed@%n.service" in service
    # CAP_SYS_PTRACE is for looking into /proc alone.
    assert "SystemCallFilter=~@debug process_vm_readv process_vm_writev" in service
    assert re.search(r"^Persistent=yes$", timer, re.MULTILINE)

# SPDX-License-Identifier: Apache-2.0
"""What `qmpbackup.service` leaves of root's power is enough for a QEMU of another user."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from lab.disks import MIB, Disk, create, pattern
from lab.qemu import Qemu, StartQemu
from lab.repositories import Target, environment_of
from lab.small import needs_root
from stock.repositories import repository

UNIT = Path(__file__).parents[2] / "dist" / "systemd" / "qmpbackup.service"
SIZE = 16 * MIB

SANDBOX = """
mount --make-rprivate /
mkdir -p -m 700 /run/qmpbackup
for each in $WRITABLE /run/qmpbackup; do mount --bind $each $each; done
mount -o remount,bind,ro /
! touch /usr/.qmpbackup-test 2>/dev/null
exec setpriv --no-new-privs --inh-caps=-all --bounding-set="$BOUNDING" -- "$@"
"""
"""A system that is read-only but for some folders, and a few capabilities, as systemd gives them."""


def _bounding() -> str:
    found = re.search(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)
    assert found
    names = found[1].lower().replace("cap_", "+").split()
    return ",".join(["-all", *names])


def _back_up(vm: Qemu, target: Target, writable: str | Path, *more: str | Path) -> list[str]:
    """Levels of the disks of a point that is made inside; the first folder is the unit's own, too."""
    own = str(writable).partition(" ")[0]
    command = [sys.executable, "-m", "qmpbackup", "--socket", vm.socket, "backup", "--json"]
    command += ["--target", target, *more]
    inside = {"WRITABLE": str(writable), "BOUNDING": _bounding()}
    inside |= {"TMPDIR": own, "RESTIC_CACHE_DIR": f"{own}/cache"}
    made = subprocess.run(
        ["unshare", "--mount", "--", "sh", "-ec", SANDBOX, "sh", *map(str, command)],
        env={**os.environ, **environment_of(target), **inside},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    assert "warning" not in made.stderr
    return [disk["level"] for disk in json.loads(made.stdout)["point"]["disks"]]


@needs_root
def test_what_the_unit_may_do_is_enough(
    tmp_path: Path, open_folder: Path, start_qemu: StartQemu
) -> None:
    image = create(open_folder / "vda.qcow2", SIZE, contents=pattern(SIZE, 1))
    image.chmod(0o600)
    os.chown(image, open_folder.stat().st_uid, -1)
    open_folder.chmod(0o700)
    vm = start_qemu([Disk("vda", image)], user="nobody")
    vm.folder.chmod(0o700)
    writable = tmp_path / "writable"
    writable.mkdir(mode=0o700)
    (writable / "scratch").mkdir()
    chosen = ("--scratch", writable / "scratch")
    # Beside the disk nothing can be written, in the folder of the target it can.
    assert _back_up(vm, writable / "folder", writable, *chosen) == ["full"]
    vm.write("vda", 0, MIB, 7)
    assert _back_up(vm, writable / "folder", writable, *chosen) == ["inc"]
    made = repository(writable / "repository")
    assert _back_up(vm, made, writable, *chosen) == ["full"]
    # And where the disks' folder is one of those that may be written into, beside the disk.
    assert _back_up(vm, writable / "folder", f"{writable} {open_folder}") == ["inc"]
    assert [each.name for each in open_folder.iterdir()] == ["vda.qcow2"]

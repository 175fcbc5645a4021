# SPDX-License-Identifier: Apache-2.0
"""Makes points with the version that is installed, for later versions to be tried on.

    PYTHONPATH=tests .venv/bin/python scripts/earlier-points.py tests/earlier/points-NAME.tar.xz

One VM with two disks, backed up into a folder and into a repository, and then ended. The archive holds

    images/        its disks as they are at last, with changes that no point holds
    folder/        a folder target: full, inc, diff, copy, and compressed inc
    repository/    a restic repository: full, inc, copy
    expected.json  SHA-256 of each disk of each point, and of the disks at last, read by qemu-img

`tests/qemu/test_earlier_versions.py` lists, verifies, restores, continues and prunes all archives.
"""

import hashlib
import json
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from lab.backups import back_up
from lab.disks import CLUSTER, MIB, Disk, create
from lab.qemu import Qemu
from stock.repositories import repository

SIZE = 9 * MIB
NAME, UUID = "earlier", "3f0c8a52-9a70-4a4e-8d0c-1c5e8e2f7b11"


def main() -> int:
    """Make the archive that the command line names."""
    if len(sys.argv) != 2:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    archive = Path(sys.argv[1]).resolve()
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="earlier-") as name:
        folder = Path(name)
        (folder / "expected.json").write_text(json.dumps(_make(folder), indent=1))
        with tarfile.open(archive, "w:xz") as tar:
            for part in ("expected.json", "images", "folder", "repository"):
                tar.add(folder / part, part)
    return 0


def _make(folder: Path) -> dict[str, dict[str, str]]:
    (folder / "images").mkdir()
    disks = [
        Disk("vda", create(folder / "images" / "vda.qcow2", SIZE)),
        Disk("vdb", create(folder / "images" / "vdb.raw", SIZE + 512, "raw"), "raw"),
    ]
    made = repository(folder)
    expected: dict[str, dict[str, str]] = {}
    with Qemu(disks, name=NAME, uuid=UUID) as vm:
        number = 0

        def change() -> None:
            nonlocal number
            for disk in ("vda", "vdb"):
                for block in range(number, 100, 7 + number):
                    vm.write(disk, block * CLUSTER, CLUSTER // 2, number * 20 + block % 20 + 1)
            number += 1

        runs = ("full", "inc", "diff", "copy", "inc")
        for at, level in enumerate(runs):
            change()
            more = ("--compress",) if at == len(runs) - 1 else ()
            point = back_up(vm, folder / "folder", level, *more)
            expected[point["id"]] = _digests(vm)
        for level in ("full", "inc", "copy"):
            change()
            point = back_up(vm, made, level)
            expected[point["id"]] = _digests(vm)
        change()
        expected["at last"] = _digests(vm)
        vm.quit()
    shutil.rmtree(made.folder / "cache", ignore_errors=True)
    return expected


def _digests(vm: Qemu) -> dict[str, str]:
    return {each.id: hashlib.sha256(vm.contents(each.id)).hexdigest() for each in vm.disks}


if __name__ == "__main__":
    sys.exit(main())

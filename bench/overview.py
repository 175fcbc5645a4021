# SPDX-License-Identifier: Apache-2.0
"""How long `status --target` takes for a repository with the points of a whole data centre.

    python -m bench.overview [VMs, 300] [points of each, 400]

The repository is made first, which takes minutes. "Cold" has no cache of ours; the kernel's is warm.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from stock.data_centre import DataCentre


def main() -> None:
    vms, points = (int(each) for each in (*sys.argv[1:], "300", "400")[:2])
    with tempfile.TemporaryDirectory(prefix="qmpbackup-bench-") as name:
        centre = DataCentre(Path(name), vms, points, datetime.now(UTC))
        environment = {**os.environ, **centre.make()}
        print(f"{vms} VMs with {points} points each")
        for what in ("cold", "warm"):
            if what == "cold":
                shutil.rmtree(environment["RESTIC_CACHE_DIR"], ignore_errors=True)
            seconds, mib = _measured(f"restic:{centre.location}", environment)
            print(f"{what}: {seconds:.1f} s, {mib:.0f} MiB")


def _measured(target: str, environment: dict[str, str]) -> tuple[float, float]:
    """Seconds and MiB that a look takes."""
    program = Path(sys.executable).with_name("qmpbackup")
    began = time.monotonic()
    with subprocess.Popen(
        [program, "status", "--target", target], env=environment, stdout=subprocess.DEVNULL
    ) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"status ended with {process.returncode}")
    return time.monotonic() - began, used.ru_maxrss / 1024


if __name__ == "__main__":
    main()

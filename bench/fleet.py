# SPDX-License-Identifier: Apache-2.0
"""What many VMs of one host, and all of a data centre, cost.

    PYTHONPATH=tests python -m bench.fleet [--vms 300] [--real 20] [--points 400] [--disk DIR]

A host has so many VMs, of which a few are real QEMUs and the others monitors that answer as one of those did.
Measured are runs with nothing changed: what all of them take, what each VM takes, and the most memory of
the run itself. A repository holds so many points of each of as many VMs; `status` looks at it without and with
our cache (the kernel's is warm).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench.machine import QMPBACKUP

from lab.disks import MIB, Disk, create
from lab.qemu import Qemu
from lab.replayed import replayed
from stock.data_centre import DataCentre

SOME_FAILED = 14


@dataclass(frozen=True)
class Used:
    """What a command took: seconds, seconds of processor time with its children's, and its own MiB."""

    seconds: float
    processor: float
    mib: float

    def row(self, what: str, vms: int = 0) -> str:
        """A line of the table."""
        each = f"{self.seconds * 1000 / vms:>7.0f} ms" if vms else f"{'':>10}"
        return f"{what:<44} {self.seconds:>7.2f} s {self.processor:>7.2f} s {self.mib:>5.0f} MiB {each}"


def main() -> None:
    """Measure everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vms", type=int, default=300)
    parser.add_argument("--real", type=int, default=20, help="of these are real QEMUs")
    parser.add_argument("--points", type=int, default=400, help="of each VM in the repository")
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"), help="a folder on a disk")
    options = parser.parse_args()
    head = f"{'what':<44} {'time':>9} {'processor':>9} {'memory':>9} {'each VM':>10}"
    print(head, flush=True)
    with tempfile.TemporaryDirectory(dir=options.disk) as scratch:
        for row in _host(Path(scratch), options.vms, options.real):
            print(row, flush=True)
        if options.points:
            for row in _data_centre(Path(scratch) / "centre", options.vms, options.points):
                print(row, flush=True)


def _host(folder: Path, vms: int, real: int) -> Iterator[str]:
    (folder / "config.toml").write_text(_CONFIGURATION.format(folder=folder))
    environment = {
        **os.environ,
        "XDG_STATE_HOME": str(folder / "state"),
        "QMPBACKUP_CONFIG": str(folder / "config.toml"),
    }
    (folder / "s").mkdir()
    with ExitStack() as stack:
        for number in range(real):
            name = f"real{number}"
            disk = Disk("vda", create(folder / f"{name}.qcow2", 64 * MIB))
            vm = stack.enter_context(Qemu([disk], name=name))
            (folder / "s" / f"{name}.qmp").symlink_to(vm.socket)
        others = [folder / "s" / f"other{number}.qmp" for number in range(vms - real)]
        if others:
            stack.enter_context(replayed(vm.qmp, others))
        names = [f"real{number}" for number in range(real)]
        yield _used(("run",), environment, {0, SOME_FAILED}).row("run: all for the first time", vms)
        yield _used(("run",), environment).row("run: nothing is due", vms)
        yield _used(("run", *names), environment).row("run: real VMs, nothing changed", real)
        yield _used(("status",), environment).row("status", vms)
        yield _used(("config", "check"), environment, {0, 2}).row("config check", vms)


_CONFIGURATION = """
[group.all]
sockets = "{folder}/s/*.qmp"
[defaults]
limits = {{ pause = "1h" }}
retry = {{ times = 0 }}
[target.main]
location = "{folder}/backup/{{vm}}"
verify = {{ every = "" }}
"""


def _data_centre(folder: Path, vms: int, points: int) -> Iterator[str]:
    folder.mkdir()
    centre = DataCentre(folder, vms, points, datetime.now(UTC))
    environment = {**os.environ, **centre.make()}
    words = ("status", "--target", f"restic:{centre.location}")
    shutil.rmtree(environment["RESTIC_CACHE_DIR"], ignore_errors=True)
    yield _used(words, environment).row(f"status of {vms} VMs x {points} points, no cache")
    yield _used(words, environment).row("the same, once more")


def _used(
    words: tuple[str, ...], environment: Mapping[str, str], codes: Collection[int] = (0,)
) -> Used:
    """What one of our commands takes."""
    with tempfile.TemporaryFile() as said:
        began = time.monotonic()
        process = subprocess.Popen(
            [*QMPBACKUP, *words], env=environment, stdout=subprocess.DEVNULL, stderr=said
        )
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in codes:
            said.seek(0)
            sys.exit(f"{words} ended with {process.returncode}: {said.read().decode()[-3000:]}")
    return Used(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Measure backups into restic repositories against restic, borg and qemu-img, in one run.

    python -m bench.repository [--megabytes 4096] [--runs 3] [--disk DIR] [--tmpfs DIR]

A disk full of this machine's own files is backed up for the first time, with nothing changed, and
with 1 % of it overwritten at random; restores: `bench.restore`. Ours reads a VM that runs; the peers read
the same bytes from a raw file, on the disk and warm in the page cache, whose time is new each time, as that of a VM that runs
is. Whole processes, ours and the peers in turn; times and
memory are medians, CPU is user and system time of the process and its children. QEMU's own CPU, which
our side needs to read, is the column `QEMU`.
"""

import argparse
import random
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.machine import (
    PASSWORD,
    QMPBACKUP,
    Cost,
    call,
    make_repository,
    measure,
    real_files,
    size_of,
    vm,
    write,
)

MIB = 1024 * 1024


@dataclass(frozen=True)
class Command:
    """A way to do a job: its name, what to do before (not measured), and its command line."""

    name: str
    before: Callable[[], object]
    argv: list[str]


def main() -> None:
    """Measure everything and print a table."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Ended; nothing is left."))
    print(f"{'what':<34} {'who':<22} {'time':>8} {'CPU':>8} {'QEMU':>7} {'memory':>9}  ours/peer")
    with tempfile.TemporaryDirectory(dir=options.disk) as real:
        image = Path(real) / "vda.qcow2"
        real_files(image, options.megabytes)
        for place, folder in (("tmpfs", options.tmpfs), ("disk", options.disk)):
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _Measurement(place, Path(scratch), image, options.runs).all()
                (Path(real) / "vda.raw").unlink()
    with tempfile.TemporaryDirectory(dir=options.tmpfs) as scratch:
        _sparse(Path(scratch))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=4096, help="real files on the disk")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side (default: 3)")
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"), help="a folder on a disk")
    parser.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"), help="a folder on tmpfs")
    return parser.parse_args()


class _Measurement:
    """All jobs with the repositories in one place."""

    def __init__(self, place: str, folder: Path, image: Path, runs: int) -> None:
        self._place = place
        self._folder = folder
        self._runs = runs
        self._disk = folder / "vda.qcow2"
        shutil.copyfile(image, self._disk)
        self._raw = image.with_suffix(".raw")
        call(["qemu-img", "convert", "-O", "raw", str(self._disk), str(self._raw)])
        self._size = self._raw.stat().st_size
        self._ours, self._restic, self._borg = (
            folder / name for name in ("ours", "restic", "borg")
        )

    def all(self) -> None:
        """Every job in turn."""
        with vm(self._folder, [self._disk]) as qmp:
            ours = [*QMPBACKUP, "--socket", str(qmp), "backup", "--target", f"restic:{self._ours}"]
            restic = ["restic", "--repo", str(self._restic), "--quiet", "backup", str(self._raw)]
            self._report("first backup", *self._firsts(ours, restic))
            self._report(
                "nothing changed",
                Command("qmpbackup", _nothing, [*ours, "--level", "inc"]),
                Command("restic", self._raw.touch, restic),
                Command("borg", self._raw.touch, self._borg_create()),
            )
            self._report(
                "1 % changed",
                Command("qmpbackup", lambda: self._scribble(qmp), [*ours, "--level", "inc"]),
                Command("restic", _nothing, restic),
                Command("borg", _nothing, self._borg_create()),
            )

    def _firsts(self, ours: list[str], restic: list[str]) -> list[Command]:
        compressed = self._folder / "peer.qcow2"
        convert = ["qemu-img", "convert", "-W", "-m", "16", "-c", "-O", "qcow2"]
        convert += ["-o", "compression_type=zstd", str(self._raw), str(compressed)]
        return [
            Command("qmpbackup", lambda: self._fresh(self._ours), [*ours, "--level", "full"]),
            Command("restic", lambda: self._fresh(self._restic), restic),
            Command("borg", self._fresh_borg, self._borg_create()),
            Command("qemu-img -c (zstd)", lambda: compressed.unlink(missing_ok=True), convert),
        ]

    def _report(self, what: str, *commands: Command) -> None:
        costs: dict[str, list[Cost]] = {command.name: [] for command in commands}
        for _ in range(self._runs):
            for command in commands:
                command.before()
                costs[command.name].append(measure(command.argv))
            (self._folder / "peer.qcow2").unlink(missing_ok=True)
        ours = statistics.median(cost.time for cost in costs["qmpbackup"])
        for name, measured in costs.items():
            time_, cpu, memory, qemu = (
                statistics.median(getattr(cost, each) for cost in measured)
                for each in ("time", "cpu", "memory", "qemu")
            )
            ratio = "" if name == "qmpbackup" else f"{ours / time_:>8.3f}"
            print(
                f"{f'{what} ({self._place})':<34} {name:<22} {time_:>7.2f}s {cpu:>7.2f}s "
                f"{qemu:>6.2f}s {memory:>5.0f} MiB {ratio}",
                flush=True,
            )

    def _fresh(self, repository: Path) -> None:
        shutil.rmtree(repository, ignore_errors=True)
        make_repository(repository)

    def _fresh_borg(self) -> None:
        shutil.rmtree(self._borg, ignore_errors=True)
        call(["borg", "init", "--encryption", "repokey", str(self._borg)], PASSWORD)

    def _borg_create(self) -> list[str]:
        chunks = ["--compression", "zstd,1", "--chunker-params", "fixed,1048576"]
        return ["borg", "create", *chunks, f"{self._borg}::{{now:%s.%f}}", str(self._raw)]

    def _scribble(self, qmp: Path) -> None:
        """Overwrite 1 % of the disk, in pieces of 64 KiB, in the VM and in the peers' file."""
        chance = random.Random(self._size)
        pieces = self._size // 65536
        with self._raw.open("r+b") as raw:
            commands = []
            for number in chance.sample(range(pieces), pieces // 100):
                raw.seek(number * 65536)
                raw.write(bytes([number % 255 + 1]) * 65536)
                commands.append(f"write -P {number % 255 + 1} {number * 65536} 65536")
        write(qmp, "vda", commands)


def _nothing() -> None:
    pass


def _sparse(folder: Path) -> None:
    """A disk of 1 TiB with 100 changed chunks."""
    disk, repository = folder / "vda.qcow2", folder / "repository"
    call(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "1T"])
    make_repository(repository)
    with vm(folder, [disk]) as qmp:
        ours = [*QMPBACKUP, "--socket", str(qmp), "backup", "--target", f"restic:{repository}"]
        _line("1 TiB sparse, first backup", measure([*ours, "--level", "full"]), repository)
        chance = random.Random(1)
        places = chance.sample(range(1024 * 1024), 100)
        write(qmp, "vda", [f"write -P 7 {place * MIB} 4096" for place in places])
        before = size_of(repository)
        cost = measure([*ours, "--level", "inc"])
        _line("1 TiB sparse, 100 chunks changed", cost, repository, before)


def _line(what: str, cost: Cost, repository: Path, before: int = 0) -> None:
    added = (size_of(repository) - before) / MIB
    print(
        f"{what:<34} {'qmpbackup':<22} {cost.time:>7.2f}s {cost.cpu:>7.2f}s {cost.qemu:>6.2f}s "
        f"{cost.memory:>5.0f} MiB  {added:.1f} MiB written",
        flush=True,
    )


if __name__ == "__main__":
    main()

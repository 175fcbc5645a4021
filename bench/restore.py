# SPDX-License-Identifier: Apache-2.0
"""Measure restores against `restic restore`, `qemu-img convert` and what the machine can do at all.

    python -m bench.restore [--megabytes 1024 4096] [--runs 5] [--disk DIR] [--tmpfs DIR]

A disk full of this machine's own files is backed up by us into a repository and as a chain of four into a
folder, and by restic into a repository of its own; then it is restored, in turn, on a disk and in memory,
and 256 MiB of it from a REST server 50 ms away (`bench.delay`). Whole processes are timed; times and ratios
are those of the fastest runs, as other work on the machine only ever makes a run slower. Ours ends with
fsync, restic's does not; so there is a row with `sync` behind it, too. `limit` is `bench.limit`.

All is made on the disk. In memory lies only what is read there, and one copy at a time, which is removed
when it has been measured: little more than twice --megabytes.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.delay import far
from bench.machine import PASSWORD, QMPBACKUP, call, make_repository, measure, real_files, vm, write

MILLISECONDS = 50
INCREMENTALS = 3
OVER_REST = 256


@dataclass(frozen=True)
class Peer:
    """What ours is measured against: its name, the ratio to reach, and how it restores to a place."""

    name: str
    bar: float | None
    argv: Callable[[Path], list[str]]


def main() -> None:
    """Measure everything and print a table."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Ended; nothing is left."))
    print(f"{'what':<34} {'ours':>8} {'peer':>8} {'ratio':>6} {'bar':>5}  peer", flush=True)
    for megabytes in options.megabytes:
        with _made(options.disk, megabytes) as made:
            for place, folder in (("tmpfs", options.tmpfs), ("disk", options.disk)):
                _local(made, folder, f"{megabytes} MiB, {place}", options.runs)
    with (
        _made(options.disk, OVER_REST) as made,
        tempfile.TemporaryDirectory(dir=options.tmpfs) as scratch,
    ):
        _over_rest(made, Path(scratch), options.runs)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--megabytes", type=int, nargs="*", default=[1024, 4096], help="real files on the disk"
    )
    parser.add_argument("--runs", type=int, default=5, help="runs of each side (default: 5)")
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"), help="a folder on a disk")
    parser.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"), help="a folder on tmpfs")
    return parser.parse_args()


@dataclass(frozen=True)
class _Made:
    """Our repository, restic's, and a chain in a folder, all of one disk."""

    ours: Path
    restic: Path
    chain: Path


@contextmanager
def _made(folder: Path, megabytes: int) -> Iterator[_Made]:
    """Make all that is restored."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        here = Path(scratch)
        made = _Made(here / "ours", here / "restic", here / "chain")
        disk, raw = here / "vda.qcow2", here / "vda.raw"
        real_files(disk, megabytes)
        make_repository(made.ours)
        make_repository(made.restic)
        with vm(here, [disk]) as qmp:
            backup = [*QMPBACKUP, "--socket", str(qmp), "backup", "--target"]
            call([*backup, f"restic:{made.ours}"], PASSWORD)
            call([*backup, str(made.chain)])
            for number in range(INCREMENTALS):
                _scribble(qmp, megabytes, number)
                call([*backup, str(made.chain)])
        call(["qemu-img", "convert", "-O", "raw", str(disk), str(raw)])
        disk.unlink()
        call(["restic", "--repo", str(made.restic), "--quiet", "backup", str(raw)], PASSWORD)
        raw.unlink()
        yield made


@contextmanager
def _copied(folder: Path, *originals: Path) -> Iterator[list[Path]]:
    """Copies in a folder, warm in the cache as the originals would be, and room for an output."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        copies = [Path(scratch) / original.name for original in originals]
        for original, copy in zip(originals, copies, strict=True):
            shutil.copytree(original, copy)
        yield copies


def _clear(output: Path) -> None:
    """Remove what was restored."""
    if output.is_dir():
        shutil.rmtree(output)
    output.unlink(missing_ok=True)


def _scribble(qmp: Path, megabytes: int, seed: int) -> None:
    """Overwrite 1 % of the disk, in pieces of 64 KiB."""
    chance = random.Random(seed)
    places = chance.sample(range(megabytes * 16), megabytes * 16 // 100)
    write(qmp, "vda", [f"write -P {seed + 1} {place * 65536} 65536" for place in places])


def _ours(target: str, format_: str) -> Callable[[Path], list[str]]:
    command = [*QMPBACKUP, "restore", "--target", target, "--format", format_, "--output"]
    return lambda output: [*command, str(output)]


def _restic(repository: str, after: str = "") -> Callable[[Path], list[str]]:
    def argv(output: Path) -> list[str]:
        command = ["restic", "--repo", repository, "--quiet", "restore", "latest", "--target"]
        if after:
            return ["sh", "-c", f"{' '.join(command)} {output} && {after} {output}"]
        return [*command, str(output)]

    return argv


def _local(made: _Made, folder: Path, what: str, runs: int) -> None:
    with _copied(folder, made.ours, made.restic) as (ours, restic):
        limit = [sys.executable, "-m", "bench.limit", str(ours)]
        peers = [
            Peer("restic restore", 0.7, _restic(str(restic))),
            Peer("restic restore, then sync", None, _restic(str(restic), "sync --file-system")),
            Peer("limit", 1.25, lambda output: [*limit, str(output)]),
        ]
        _report(ours, f"repository, {what}", _ours(f"restic:{ours}", "raw"), peers, runs)
    with _copied(folder, made.chain) as (chain,):
        newest = max((chain / "vda").iterdir(), key=lambda each: each.name.rpartition("-")[2])
        fast = ["qemu-img", "convert", "-W", "-m", "16", "-O", "qcow2", str(newest)]
        synced = f"{' '.join(fast)} {{0}} && sync {{0}}"
        peers = [
            Peer("qemu-img convert -W -m 16", 1.1, lambda output: [*fast, str(output)]),
            Peer("the same, then sync", None, lambda output: ["sh", "-c", synced.format(output)]),
        ]
        _report(chain, f"folder, {what}", _ours(str(chain), "qcow2"), peers, runs)


def _over_rest(made: _Made, scratch: Path, runs: int) -> None:
    """Both repositories from one server, far away."""
    with far(made.ours.parent, MILLISECONDS) as address:
        ours = _ours(f"restic:rest:{address}/ours/", "raw")
        peers = [Peer("restic restore", 0.7, _restic(f"rest:{address}/restic/"))]
        what = f"repository, {OVER_REST} MiB, REST {MILLISECONDS} ms"
        _report(scratch / "from", what, ours, peers, runs)


def _report(
    source: Path,
    what: str,
    ours: Callable[[Path], list[str]],
    peers: Sequence[Peer],
    runs: int,
) -> None:
    """Restore beside the source: all in turn, after one turn that does not count; the fastest count."""
    output = source.parent / "output"
    times: dict[str, float] = {}
    for number in range(runs + 1):
        for name, argv in (("", ours), *((peer.name, peer.argv) for peer in peers)):
            _clear(output)
            os.sync()  # what the one before has left for the kernel to write is not this one's
            taken = measure(argv(output)).time
            if number:
                times[name] = min(taken, times.get(name, taken))
    _clear(output)
    for peer in peers:
        us, them = times[""], times[peer.name]
        bar = f"{peer.bar:.2f}" if peer.bar else "-"
        print(
            f"{what:<34} {us:>7.2f}s {them:>7.2f}s {us / them:>6.2f} {bar:>5}  {peer.name}",
            flush=True,
        )


if __name__ == "__main__":
    main()

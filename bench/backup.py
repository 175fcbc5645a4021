# SPDX-License-Identifier: Apache-2.0
"""Measure backups into a folder against `qemu-img`, as ratios in one run; restores: `bench.restore`.

Whole processes are timed, ours and the peer's in turn, and the ratio is that of the medians. Storage
caches are treated alike: both read a warm source; our side includes fsync and digests, which the
peer does not do, so a second row gives the peer followed by `sync` of its output. Each copy is removed
when it has been measured.

    python -m bench.backup [--megabytes 2048] [--runs 5] [--disk DIR] [--tmpfs DIR]
"""

import argparse
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.machine import QMPBACKUP, call, real_files, vm


@dataclass(frozen=True)
class Bar:
    """One comparison: what ran, the ratio to reach, and how to run both sides once."""

    name: str
    bar: float | None
    ours: Callable[[], object]
    peer: Callable[[], object]
    peer_name: str
    clear: Callable[[], object] = lambda: None


def main() -> None:
    """Measure everything and print a table."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Ended; nothing is left."))
    print(f"{'what':<36} {'ours':>8} {'peer':>8} {'ratio':>6} {'bar':>5}  peer", flush=True)
    for row in _rows(options):
        print(row, flush=True)


def _rows(options: argparse.Namespace) -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir=options.tmpfs) as scratch:
        yield from _incrementals(Path(scratch), options.runs)
    with tempfile.TemporaryDirectory(dir=options.disk) as real:
        image = Path(real) / "vda.qcow2"
        real_files(image, options.megabytes)
        for place, folder in (("disk", options.disk), ("tmpfs", options.tmpfs)):
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                disk = Path(scratch) / "vda.qcow2"
                shutil.copyfile(image, disk)
                yield from _copies(disk, place, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=2048, help="real files on the disk")
    parser.add_argument("--runs", type=int, default=5, help="runs of each side (default: 5)")
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"), help="a folder on a disk")
    parser.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"), help="a folder on tmpfs")
    return parser.parse_args()


def _copies(disk: Path, place: str, options: argparse.Namespace) -> Iterator[str]:
    """Fulls of a disk with real files, against `qemu-img convert`."""
    folder = disk.parent
    target, peer = folder / "target", folder / "peer.qcow2"
    plain = ["qemu-img", "convert", "-U", "-O", "qcow2", str(disk), str(peer)]
    fast = [*plain[:2], "-W", "-m", "16", *plain[2:]]
    with vm(folder, [disk]) as qmp:

        def ours() -> None:
            call([*QMPBACKUP, "--socket", str(qmp), *_backup("copy", target)])

        def convert(command: Sequence[str], sync: bool = False) -> Callable[[], None]:
            def run() -> None:
                call(command)
                if sync:
                    call(["sync", str(peer)])

            return run

        def clear() -> None:
            shutil.rmtree(target, ignore_errors=True)
            peer.unlink(missing_ok=True)

        what, is_disk = f"full on {place}", place == "disk"
        for bar in (
            Bar(what, 1.1 if is_disk else None, ours, convert(plain), "plain", clear),
            Bar(
                what,
                1.15 if is_disk else 1.3,
                ours,
                convert(plain, sync=True),
                "plain, then sync",
                clear,
            ),
            Bar(what, None if is_disk else 2.5, ours, convert(fast), "-W -m 16", clear),
        ):
            yield _measure(bar, options.runs)


def _incrementals(folder: Path, runs: int) -> Iterator[str]:
    """Whole processes of incrementals with nothing changed."""
    small = _idle_incremental(folder / "small", "1G")
    large = _idle_incremental(folder / "large", "1T")
    with small as of_small, large as of_large:
        start = [sys.executable, "-c", "import qemu.qmp"]
        yield _measure(
            Bar("incremental, 4 idle disks", 4.0, of_small, lambda: call(start), "import qemu.qmp"),
            runs * 3,
        )
        yield _measure(
            Bar("incremental, 4 idle disks of 1 TiB", 1.3, of_large, of_small, "1 GiB"), runs * 3
        )


@contextmanager
def _idle_incremental(folder: Path, size: str) -> Iterator[Callable[[], None]]:
    folder.mkdir()
    disks = [folder / f"vd{letter}.qcow2" for letter in "abcd"]
    for disk in disks:
        call(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), size])
    with vm(folder, disks) as qmp:
        command = [*QMPBACKUP, "--socket", str(qmp)]
        call([*command, *_backup("full", folder / "target")])
        yield lambda: call([*command, *_backup("inc", folder / "target")])


def _backup(level: str, target: Path) -> list[str]:
    return ["backup", "--level", level, "--target", str(target)]


def _measure(bar: Bar, runs: int) -> str:
    """Run both sides in turn, after one turn that does not count."""
    ours: list[float] = []
    peer: list[float] = []
    for number in range(runs + 1):
        for run, times in ((bar.ours, ours), (bar.peer, peer)):
            started = time.monotonic()
            run()
            if number:
                times.append(time.monotonic() - started)
            bar.clear()
    us, them = statistics.median(ours), statistics.median(peer)
    shown = f"{bar.bar:.2f}" if bar.bar else "-"
    return f"{bar.name:<36} {us:>7.2f}s {them:>7.2f}s {us / them:>6.2f} {shown:>5}  {bar.peer_name}"


if __name__ == "__main__":
    main()

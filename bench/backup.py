# SPDX-License-Identifier: Apache-2.0
"""Measure backups and restores of a directory target against `qemu-img`, as ratios in one run.

Whole processes are timed, ours and the peer's in turn, and the ratio is that of the medians. Storage
caches are treated alike: both read a warm source; our side includes fsync and digests, which the
peer does not do, so a second column gives the peer followed by `sync` of its output.

    python bench/backup.py [--size 2G] [--runs 5] [--disk DIR] [--tmpfs DIR]
"""

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

QMPBACKUP = [str(Path(sys.executable).with_name("qmpbackup"))]


@dataclass(frozen=True)
class Bar:
    """One comparison: what ran, the ratio to reach, and how to run both sides once."""

    name: str
    bar: float | None
    ours: Callable[[], object]
    peer: Callable[[], object]
    peer_name: str


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
        _real_files(image, options.megabytes)
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
    """Full and restore of a disk with real files, against `qemu-img convert`."""
    folder = disk.parent
    target, peer = folder / "target", folder / "peer.qcow2"
    plain = ["qemu-img", "convert", "-U", "-O", "qcow2", str(disk), str(peer)]
    fast = [*plain[:2], "-W", "-m", "16", *plain[2:]]
    with _vm(folder, [disk]) as qmp:

        def ours() -> None:
            shutil.rmtree(target, ignore_errors=True)
            _run([*QMPBACKUP, "--socket", str(qmp), *_backup("copy", target)])

        def convert(command: Sequence[str], sync: bool = False) -> Callable[[], None]:
            def run() -> None:
                peer.unlink(missing_ok=True)
                _run(command)
                if sync:
                    _run(["sync", str(peer)])

            return run

        bars = [
            Bar(
                f"full on {place}", 1.1 if place == "disk" else None, ours, convert(plain), "plain"
            ),
            Bar(f"full on {place}", None, ours, convert(plain, sync=True), "plain, then sync"),
            Bar(
                f"full on {place}",
                2.5 if place == "tmpfs" else None,
                ours,
                convert(fast),
                "-W -m 16",
            ),
        ]
        for bar in bars:
            yield _measure(bar, options.runs)
        shutil.rmtree(target, ignore_errors=True)
        _run([*QMPBACKUP, "--socket", str(qmp), *_backup("full", target)])
        yield _measure(_restore_bar(folder, target, place), options.runs)


def _restore_bar(folder: Path, target: Path, place: str) -> Bar:
    output, peer = folder / "restored", folder / "converted.qcow2"
    (image,) = (target / "vda").glob("FULL-*")

    def ours() -> None:
        shutil.rmtree(output, ignore_errors=True)
        _run([*QMPBACKUP, "restore", "--target", str(target), "--output", str(output)])

    def convert() -> None:
        peer.unlink(missing_ok=True)
        _run(["qemu-img", "convert", "-W", "-m", "8", "-O", "qcow2", str(image), str(peer)])
        _run(["sync", str(peer)])

    return Bar(f"restore on {place}", None, ours, convert, "-W -m 8, then sync")


def _incrementals(folder: Path, runs: int) -> Iterator[str]:
    """Whole processes of incrementals with nothing changed."""
    small = _idle_incremental(folder / "small", "1G")
    large = _idle_incremental(folder / "large", "1T")
    with small as of_small, large as of_large:
        start = [sys.executable, "-c", "import qemu.qmp"]
        yield _measure(
            Bar("incremental, 4 idle disks", 4.0, of_small, lambda: _run(start), "import qemu.qmp"),
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
        _run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), size])
    with _vm(folder, disks) as qmp:
        command = [*QMPBACKUP, "--socket", str(qmp)]
        _run([*command, *_backup("full", folder / "target")])
        yield lambda: _run([*command, *_backup("inc", folder / "target")])


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
    us, them = statistics.median(ours), statistics.median(peer)
    shown = f"{bar.bar:.1f}" if bar.bar else "-"
    return f"{bar.name:<36} {us:>7.2f}s {them:>7.2f}s {us / them:>6.2f} {shown:>5}  {bar.peer_name}"


SMALLEST_FILE = 32 * 1024


def _real_files(image: Path, megabytes: int) -> None:
    """A qcow2 image with an ext4 file system full of this machine's own files."""
    raw, tree = image.with_suffix(".raw"), image.parent / "tree"
    tree.mkdir()
    left = megabytes << 20
    for number, (source, size) in enumerate(_files(("/usr", "/opt", "/var", "/root"))):
        if left <= 0:
            break
        left -= size
        shutil.copyfile(source, tree / str(number))
    _run(["mkfs.ext4", "-q", "-d", str(tree), str(raw), f"{megabytes + megabytes // 4 + 64}M"])
    _run(["qemu-img", "convert", "-O", "qcow2", str(raw), str(image)])
    raw.unlink()
    shutil.rmtree(tree)


def _files(tops: Sequence[str]) -> Iterator[tuple[Path, int]]:
    """Files that are worth copying one by one, and their sizes."""
    for top in tops:
        for path, _, names in os.walk(top):
            for name in names:
                source = Path(path) / name
                size = 0 if source.is_symlink() or not source.is_file() else source.stat().st_size
                if size >= SMALLEST_FILE:
                    yield source, size


@contextmanager
def _vm(folder: Path, disks: Sequence[Path]) -> Iterator[Path]:
    """A QEMU with these disks that runs no guest code; yields its monitor's socket."""
    qmp = folder / "qmp"
    command = ["qemu-system-x86_64", "-S", "-accel", "tcg", "-nodefaults", "-display", "none"]
    command += ["-qmp", f"unix:{qmp},server=on,wait=off"]
    for disk in disks:
        file = {"driver": "file", "filename": str(disk)}
        drive = {"driver": "qcow2", "node-name": disk.stem, "discard": "unmap", "file": file}
        command += ["-blockdev", json.dumps(drive)]
        command += ["-device", f"virtio-blk-pci,drive={disk.stem},id={disk.stem}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        _wait_for(qmp, process)
        yield qmp
    finally:
        process.terminate()
        process.wait()


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise SystemExit("QEMU did not start.")


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()

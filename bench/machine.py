# SPDX-License-Identifier: Apache-2.0
"""What all measurements need: real files on a disk, a VM with it, and our own command."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

QMPBACKUP = [str(Path(sys.executable).with_name("qmpbackup"))]

PASSWORD = {"RESTIC_PASSWORD": "measured", "BORG_PASSPHRASE": "measured"}

SMALLEST_FILE = 32 * 1024


def real_files(image: Path, megabytes: int) -> None:
    """A qcow2 image with an ext4 file system full of this machine's own files."""
    raw, tree = image.with_suffix(".raw"), image.parent / "tree"
    tree.mkdir()
    left = megabytes << 20
    for number, (source, size) in enumerate(_files(("/usr", "/opt", "/var/lib", "/var/cache"))):
        if left <= 0:
            break
        left -= size
        shutil.copyfile(source, tree / str(number))
    call(["mkfs.ext4", "-q", "-d", str(tree), str(raw), f"{megabytes + megabytes // 4 + 64}M"])
    call(["qemu-img", "convert", "-O", "qcow2", str(raw), str(image)])
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
def vm(folder: Path, disks: Sequence[Path]) -> Iterator[Path]:
    """A QEMU with these disks that runs no guest code; yields its monitor's socket."""
    qmp = folder / "qmp"
    command = ["qemu-system-x86_64", "-S", "-accel", "tcg", "-nodefaults", "-display", "none"]
    command += ["-qmp", f"unix:{qmp},server=on,wait=off"]
    for disk in disks:
        file = {"driver": "file", "filename": str(disk)}
        drive = {"driver": "qcow2", "node-name": disk.stem, "discard": "unmap", "file": file}
        command += ["-blockdev", json.dumps(drive)]
        command += ["-device", f"virtio-blk-pci,drive={disk.stem},id={disk.stem}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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


def write(qmp: Path, device: str, commands: Sequence[str]) -> None:
    """Have QEMU write to a disk itself, as a guest would; the commands are those of qemu-io."""
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rw") as lines:
        connection.connect(str(qmp))
        _greet(lines)
        for command in commands:
            _execute(lines, f'qemu-io -d /machine/peripheral/{device}/virtio-backend "{command}"')


def _greet(lines: TextIO) -> None:
    lines.readline()
    lines.write('{"execute": "qmp_capabilities"}\n')
    lines.flush()
    lines.readline()


def _execute(lines: TextIO, command: str) -> None:
    message = {"execute": "human-monitor-command", "arguments": {"command-line": command}}
    lines.write(json.dumps(message) + "\n")
    lines.flush()
    while '"return"' not in (answer := lines.readline()):
        if '"error"' in answer or not answer:
            raise SystemExit(f"{command} failed: {answer}")
    if "error" in answer.lower():
        raise SystemExit(f"{command} failed: {answer}")


def call(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Run a command; end everything if it fails."""
    env = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def make_repository(place: Path) -> None:
    """A new restic repository, made by restic itself."""
    call(["restic", "--repo", str(place), "--quiet", "init"], PASSWORD)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Cost:
    """What one run took: seconds, seconds of CPU, MiB of memory at most, seconds of QEMU's CPU."""

    time: float
    cpu: float
    memory: float
    qemu: float


def measure(argv: Sequence[str]) -> Cost:
    """Run a whole process, with the password of the repositories, and say what it took."""
    before = _qemu_seconds()
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            argv, stdout=output, stderr=output, env={**os.environ, **PASSWORD}
        )
        _, status, usage = os.wait4(process.pid, 0)
        taken = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(argv)} failed:\n{output.read().decode()}")
    cpu = usage.ru_utime + usage.ru_stime
    return Cost(taken, cpu, usage.ru_maxrss / 1024, _qemu_seconds() - before)


def _qemu_seconds() -> float:
    """CPU of this process's running children: the VM."""
    ticks = 0
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for child in children:
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")

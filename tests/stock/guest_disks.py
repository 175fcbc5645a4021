# SPDX-License-Identifier: Apache-2.0
"""Disks with file systems of guests, made without mounting any, and points of them."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from lab import cli
from lab.disks import MIB
from qmpbackup.machine.appliance.building import Appliance, appliance
from qmpbackup.machine.appliance.running import Machine, running

_LINUX = 0x83


def run(*words: str | Path, given: bytes = b"", env: Mapping[str, str] | None = None) -> None:
    """Run a program that must succeed."""
    subprocess.run(
        words, input=given, check=True, capture_output=True, env={**os.environ, **(env or {})}
    )


def blank(path: Path, size: int) -> Path:
    """A disk of zeros."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def ext4(path: Path, tree: Path, size: int = 24 * MIB) -> Path:
    """An ext4 with what is in a folder."""
    run("mke2fs", "-q", "-t", "ext4", "-F", "-L", "sys", "-d", tree, blank(path, size))
    return path


def vfat(path: Path, files: Mapping[str, bytes], size: int = 8 * MIB) -> Path:
    """A FAT with these files."""
    run("mkfs.vfat", "-n", "EFI", blank(path, size))
    for name, data in files.items():
        run("mcopy", "-i", path, "-", f"::{name}", given=data)
    return path


def xfs(path: Path, files: Mapping[str, Path], size: int = 320 * MIB) -> Path:
    """An XFS with copies of these files."""
    lines = [f"{name} ---644 0 0 {source}" for name, source in files.items()]
    prototype = path.with_name(path.name + ".proto")
    prototype.write_text("\n".join(["/", "0 0", "d--755 0 0", *lines, "$", ""]))
    run("mkfs.xfs", "-q", "-p", prototype, blank(path, size))
    return path


def btrfs(path: Path, tree: Path, size: int = 128 * MIB) -> Path:
    """A btrfs with what is in a folder."""
    run("mkfs.btrfs", "-q", "--rootdir", tree, blank(path, size))
    return path


def ntfs(path: Path, files: Mapping[str, Path], size: int = 16 * MIB) -> Path:
    """An NTFS with copies of these files."""
    run("mkntfs", "-F", "-q", blank(path, size))
    for name, source in files.items():
        run("ntfscp", "-q", path, source, name)
    return path


def partitioned(path: Path, *parts: Path) -> Path:
    """A disk with a partition (MBR) for each of these images, a megabyte apart."""
    table, at = b"", 1
    with path.open("wb") as disk:
        for part in parts:
            size = part.stat().st_size
            disk.seek(at * MIB)
            disk.write(part.read_bytes())
            entry = bytes([0, 0, 0, 0, _LINUX, 0, 0, 0])
            sectors = (at * MIB // 512, size // 512)
            table += entry + b"".join(number.to_bytes(4, "little") for number in sectors)
            at += size // MIB + 1
        disk.truncate(at * MIB)
        disk.seek(446)
        disk.write(table.ljust(64, b"\0") + b"\x55\xaa")
    return path


def worked_on(folder: Path, script: str, *disks: Path) -> None:
    """Have the appliance itself write to disks in a folder of `nobody`, where they are vda, vdb, ….

    So no device of this host's is needed, nor a right to make one.
    """
    ours = Appliance(folder)
    made = appliance()
    shutil.copyfile(made.kernel, ours.kernel)
    shutil.copyfile(made.initramfs, ours.initramfs)
    for each in (*disks, ours.kernel, ours.initramfs):
        shutil.chown(each, "nobody")
    nodes = [
        {"driver": "raw", "node-name": f"n{n}", "file": {"driver": "file", "filename": str(each)}}
        for n, each in enumerate(disks)
    ]
    machine = Machine(ours, [(node, ()) for node in nodes], unlocks=False, largest_file=2**40)
    with running(machine) as agent:
        said, end = agent.told("sh", "-exc", script)
        assert end.status == 0, (said, end.said)


def backed_up(target: Path | str, disks: Mapping[str, Path], **env: str) -> None:
    """Make a point of these images."""
    images = [
        word for name, path in disks.items() for word in ("--image", f"{name}={path},format=raw")
    ]
    words = ("--offline", "--vm", "guest", "--level", "full", "--target", str(target))
    cli.run("backup", *words, *images, env=env).check()

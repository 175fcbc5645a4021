# SPDX-License-Identifier: Apache-2.0
"""Disks with file systems of guests, made without mounting any, and points of them."""

import os
import shutil
import struct
import subprocess
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path

from lab import cli
from lab.disks import MIB
from qmpbackup.machine.appliance.building import Appliance, appliance
from qmpbackup.machine.appliance.running import Machine, running

_LINUX = 0x83
_WITHOUT_SUMS = "^metadata_csum,^dir_index,^has_journal"
_LINUX_DATA = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4").bytes_le


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


def ext4(path: Path, tree: Path, size: int = 24 * MIB, kind: str = "ext4") -> Path:
    """An ext4, or one of those before it, with what is in a folder."""
    run("mke2fs", "-q", "-t", kind, "-F", "-L", "sys", "-d", tree, blank(path, size))
    return path


def hostile(path: Path, tree: Path) -> Path:
    """An ext4 with what is in a folder, and with what no kernel would write: in `bad`, a name that leads to
    this host's /etc, in `loop`, the root itself; and in `nodes` a device that could be this host's disk."""
    for each in ("bad", "loop", "nodes"):
        (tree / each).mkdir()
    (tree / "bad/AA_AA_etc").mkdir()
    run("mke2fs", "-q", "-t", "ext4", "-F", "-O", _WITHOUT_SUMS, "-d", tree, blank(path, 24 * MIB))
    lines = "link <2> /loop/root\ncd nodes\nmknod disk b 8 0\n"
    run("debugfs", "-w", "-f", "-", path, given=lines.encode())
    data = path.read_bytes()
    path.write_bytes(data.replace(b"AA_AA_etc", b"../../etc"))
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


def exfat(path: Path, size: int = 8 * MIB) -> Path:
    """An empty exFAT."""
    run("mkfs.exfat", "-L", "card", blank(path, size))
    return path


def iso(path: Path, tree: Path) -> Path:
    """A CD with what is in a folder, and its long names."""
    run("genisoimage", "-quiet", "-R", "-J", "-V", "CD", "-o", path, tree)
    return path


def bitlocker(path: Path) -> Path:
    """What blkid knows a volume by that BitLocker has encrypted; there is nothing in it."""
    with blank(path, MIB).open("r+b") as file:
        file.write(b"\xeb\x58\x90-FVE-FS-\0\x02")
        file.seek(160)
        file.write(bytes.fromhex("3bd66749292ed84a8399f6a339e3d001"))
        file.write((4096).to_bytes(8, "little"))
        file.seek(4096)
        file.write(b"-FVE-FS-" + (64).to_bytes(2, "little") + (2).to_bytes(2, "little"))
    return path


def gpt(path: Path, *parts: Path, sector: int = 512) -> Path:
    """A disk with a GPT for sectors of this size, and a partition for each of these images, a megabyte
    apart."""
    entries, at = b"", MIB
    size = MIB + sum(each.stat().st_size + MIB for each in parts)
    with blank(path, size).open("r+b") as disk:
        for number, part in enumerate(parts, 1):
            data = part.read_bytes()
            disk.seek(at)
            disk.write(data)
            first, last = at // sector, (at + len(data)) // sector - 1
            entries += _LINUX_DATA + bytes([number] * 16) + struct.pack("<QQQ72x", first, last, 0)
            at += len(data) + MIB
        entries = entries.ljust(128 * 128, b"\0")
        end, last = size // sector - 1, len(entries) // sector
        for here, other, table in ((1, end, 2), (end, 1, end - last)):
            disk.seek(table * sector)
            disk.write(entries)
            disk.seek(here * sector)
            disk.write(_gpt_head(here, other, table, (2 + last, end - last - 1), entries))
        disk.seek(446)
        protective = struct.pack("<B3xB3xII", 0, 0xEE, 1, end)
        disk.write(protective.ljust(64, b"\0") + b"\x55\xaa")
    return path


def _gpt_head(here: int, other: int, table: int, usable: tuple[int, int], entries: bytes) -> bytes:
    """A header of a GPT (UEFI specification, 5.3.2); its own checksum is of itself with none."""
    tail = struct.pack("<QQQQ", here, other, *usable) + bytes(range(16))
    tail += struct.pack("<QIII", table, 128, 128, zlib.crc32(entries))
    head = struct.pack("<8sII", b"EFI PART", 0x10000, 92)
    checksum = zlib.crc32(head + bytes(8) + tail)
    return head + struct.pack("<II", checksum, 0) + tail


def hybrid(path: Path) -> Path:
    """A disk with a GPT, whose first partition the MBR tells of as well, as some boot loaders want it."""
    with path.open("r+b") as disk:
        disk.seek(446)
        protective = disk.read(16)
        entry = bytes([0x80, 0, 0, 0, _LINUX, 0, 0, 0]) + struct.pack("<II", 2048, 8 * 2048)
        disk.seek(446)
        disk.write(entry + protective)
    return path


def partitioned(path: Path, *parts: Path, sector: int = 512) -> Path:
    """A disk with a partition (MBR) for each of these images, a megabyte apart."""
    table, at = b"", 1
    with path.open("wb") as disk:
        for part in parts:
            size = part.stat().st_size
            disk.seek(at * MIB)
            disk.write(part.read_bytes())
            entry = bytes([0, 0, 0, 0, _LINUX, 0, 0, 0])
            sectors = (at * MIB // sector, size // sector)
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

# SPDX-License-Identifier: Apache-2.0
"""What the appliance tells of file systems and files, and how users name them."""

import subprocess

import pytest

from qmpbackup.errors import UsageError, VmError
from qmpbackup.plan import guest_files
from qmpbackup.plan.guest_files import GuestFileSystem

EVERY_BYTE = bytes(range(1, 256))
LVM = "LVM-" + "a" * 64


def record(device: str, identity: str, **said: str) -> bytes:
    """A device as the appliance tells of it."""
    lines = "".join(f"{key}={value}\n" for key, value in said.items())
    return f"{device}\0{identity}\0{2048}\0{lines}\0".encode()


def system(name: str, kind: str = "ext4") -> GuestFileSystem:
    """A file system of a point."""
    return GuestFileSystem(name, name, kind, 1)


@pytest.mark.parametrize(
    "word", [b"", b"plain", b"a b", b"$(reboot)", b"`x`", b"it's", b'"\\', b"a\nb", EVERY_BYTE]
)
def test_a_word_is_one_word_for_a_shell_and_one_line(word: bytes) -> None:
    quoted = guest_files.quoted(word)
    assert b"\n" not in quoted
    said = subprocess.run(
        ["/bin/bash", "-c", b"printf %s " + quoted],
        env={"LC_ALL": "C"},
        check=True,
        capture_output=True,
    )
    assert said.stdout == word


def test_a_word_with_a_zero_byte_is_refused() -> None:
    with pytest.raises(UsageError):
        guest_files.quoted(b"a\0b")


def test_file_systems_are_named_after_the_disks_of_the_point() -> None:
    answer = b"".join(
        [
            record("vda", "disk d0", PTTYPE="gpt"),
            record("vda1", "part 1 disk d0", TYPE="vfat", LABEL="a\\ b"),
            record("vda2", "part 2 disk d0", TYPE="LVM2_member"),
            record("vdb", "disk d1", TYPE="ext4", UUID="1-2"),
            record("dm-0", f"dm {LVM} v--g-ro--ot", TYPE="xfs"),
            record("dm-1", f"dm {LVM}-real hidden", TYPE="xfs"),
            record("md127", "md host:data", TYPE="ext4"),
            record("vdb1", "part 1 disk d1"),
        ]
    )
    found = guest_files.file_systems(answer, ["sys", "drive:0"])
    assert [(each.name, each.device, each.type, each.label) for each in found] == [
        ("sys:part1", "vda1", "vfat", "a b"),
        ("drive:0", "vdb", "ext4", ""),
        ("v-g/ro-ot", "dm-0", "xfs", ""),
        ("md/data", "md127", "ext4", ""),
    ]
    assert found[0].size == 1024 * 1024


def test_what_was_unlocked_stands_for_what_holds_it() -> None:
    locked = record("vda1", "part 1 disk d0", TYPE="crypto_LUKS")
    (found,) = guest_files.file_systems(locked, ["vda"])
    assert not found.is_readable
    assert "--passphrase-file" in found.note
    opened = record("dm-0", "dm CRYPT-LUKS2-1-luks-vda1 luks-vda1", TYPE="ext4")
    (found,) = guest_files.file_systems(opened + locked, ["vda"])
    assert (found.name, found.device, found.is_readable) == ("vda:part1", "dm-0", True)


def test_several_disks_of_one_btrfs_are_one_and_others_are_explained() -> None:
    answer = b"".join(
        [
            record("vda", "disk d0", TYPE="btrfs", UUID="u"),
            record("vdb", "disk d1", TYPE="btrfs", UUID="u"),
            record("vdc", "disk d2", TYPE="BitLocker"),
            record("vdd", "disk d3", TYPE="swap"),
        ]
    )
    first, bitlocker, swap = guest_files.file_systems(answer, ["a", "b", "c", "d"])
    assert first.name == "a"
    assert "BitLocker" in bitlocker.note
    assert not swap.is_readable


@pytest.mark.parametrize(
    "answer",
    [b"x", b"vda\0disk d7\01\0\0", b"vda\0disk x\01\0\0", b"vda\0disk d0\0many\0TYPE=ext4\n\0"],
)
def test_an_answer_that_makes_no_sense_is_not_believed(answer: bytes) -> None:
    with pytest.raises(VmError):
        guest_files.file_systems(answer, ["vda"])


@pytest.mark.parametrize(
    ("address", "name", "path"),
    [
        ("/etc/passwd", None, "/etc/passwd"),
        ("vda:/etc", "vda", "/etc"),
        ("vda", "vda", "/"),
        ("vda:", "vda", "/"),
        ("vda:part1:/a:/b", "vda:part1", "/a:/b"),
        ("vg/root:/x", "vg/root", "/x"),
    ],
)
def test_addresses(address: str, name: str | None, path: str) -> None:
    systems = [system("vda"), system("vda:part1"), system("vg/root")]
    found, rest = guest_files.split(address, systems)
    assert (found and found.name, rest) == (name, path)


@pytest.mark.parametrize("address", ["vdb:/x", "vda:x", "x", "vda:part2:/", ""])
def test_an_address_of_nothing_says_what_there_is(address: str) -> None:
    with pytest.raises(UsageError, match="vda:part1"):
        guest_files.split(address, [system("vda"), system("vda:part1")])


def test_files_are_told_in_pieces() -> None:
    first = (b"f", b"644", b"0", b"5", b"3", b"1.5", b"1", b"na\nme", b"", b"")
    second = (b"l", b"777", b"1", b"2", b"4", b"-1.0", b"1", b"li", b"to", b"")
    whole = b"\0".join(first) + b"\0".join(second)
    found, rest = [], b""
    for byte in whole:
        some, rest = guest_files.complete(rest + bytes([byte]))
        found += some
    assert rest == b""
    assert [(each.kind, each.path, each.target) for each in found] == [
        ("f", b"na\nme", b""),
        ("l", b"li", b"to"),
    ]
    assert (found[0].mode, found[0].group, found[0].time) == (0o644, 5, 1.5)


@pytest.mark.parametrize("data", [b"\0".join([b"f", b"x", *[b"0"] * 7, b""]), b"x" * 20000])
def test_files_that_make_no_sense_are_not_believed(data: bytes) -> None:
    with pytest.raises(VmError):
        guest_files.complete(data)


def test_subvolumes() -> None:
    said = b"ID 256 gen 8 top level 5 path @\nID 257 gen 9 top level 256 path @/a b\nnonsense\n"
    assert list(guest_files.subvolumes(said)) == [b"@", b"@/a b"]

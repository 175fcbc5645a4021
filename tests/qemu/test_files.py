# SPDX-License-Identifier: Apache-2.0
"""Files out of points: their file systems are read in the appliance, and never on this host."""

import hashlib
import json
import os
import pwd
import signal
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from lab import cli
from lab.disks import MIB
from lab.http_proxy import HttpProxy
from lab.patience import PATIENCE, wait_until
from lab.repositories import Repository
from lab.rest_server import RestServer
from qmpbackup.errors import DamagedError, NoSuchTarget, StorageError, UsageError, VmError
from qmpbackup.service.files.copying import Wishes, copy
from qmpbackup.service.files.reading import Place, Reading, Request, reading
from qmpbackup.targets import opening
from stock import guest_disks
from stock.repositories import made, repository

HOSTILE = [b"new\nline", b"$(reboot)", b"'\"\\", b"-rf", b"\xff\xfe", b"...", b" ", b"*"]


def fill(tree: Path) -> None:
    """A tree with all that file systems can hold, but for what only root can make."""
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/hostname").write_text("guest\n")
    (tree / "etc/link").symlink_to("/etc/hostname")
    (tree / "etc/loop").symlink_to("loop")
    (tree / "absolute").symlink_to("/etc")
    (tree / "out").symlink_to("../../../etc/passwd")
    (tree / "same").hardlink_to(tree / "etc/hostname")
    (tree / "suid").write_text("#!")
    (tree / "suid").chmod(0o4755)
    os.mkfifo(tree / "pipe")
    with (tree / "sparse").open("wb") as file:
        file.seek(6 * MIB)
        file.write(b"end")
        file.truncate(500 * MIB)
    (tree / "large").write_bytes(os.urandom(9 * MIB))
    os.setxattr(tree / "large", "user.origin", b"here")
    os.utime(tree / "large", (1_000_000_000, 1_000_000_000))
    for name in HOSTILE:
        (tree / os.fsdecode(name)).mkdir()
        (tree / os.fsdecode(name) / "in").write_bytes(name)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tree, and a point in `target` of a disk with it and a FAT, and of an empty disk."""
    folder = tmp_path_factory.mktemp("files")
    fill(folder / "tree")
    system = guest_disks.ext4(folder / "system", folder / "tree")
    boot = guest_disks.vfat(folder / "boot", {"Start Me.txt": b"boot\n"})
    disk = guest_disks.partitioned(folder / "vda", system, boot)
    empty = guest_disks.blank(folder / "vdb", MIB)
    guest_disks.backed_up(folder / "target", {"vda": disk, "data": empty})
    return folder


def files(stored: Path, command: str, *words: cli.Argument) -> cli.Result:
    """Run a command on the point in a folder."""
    return cli.run("files", command, "--target", stored / "target", *words)


def digest(data: bytes) -> str:
    """What tells contents apart."""
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def opened(stored: Path) -> Iterator[Reading]:
    """The point, which answers several questions."""
    with reading(Request(stored / "target", "latest")) as found:
        yield found


def test_file_systems_are_named_by_disk_and_partition(stored: Path) -> None:
    shown = files(stored, "ls", "--json").check().objects
    assert [(each["name"], each["kind"], each["label"]) for each in shown] == [
        ("vda:part1", "ext4", "sys"),
        ("vda:part2", "vfat", "EFI"),
    ]
    assert shown[0]["size"] == 24 * MIB


def test_every_name_is_found_and_read(stored: Path, opened: Reading) -> None:
    entries = {each.path: each for each in opened.entries(opened.place("vda:part1:/"))}
    assert set(entries) == {os.fsencode(each.name) for each in (stored / "tree").iterdir()} | {
        b"lost+found"
    }
    assert (entries[b"suid"].mode, entries[b"sparse"].size) == (0o4755, 500 * MIB)
    assert entries[b"out"].target == b"../../../etc/passwd"
    for name in HOSTILE:
        place = opened.place(f"vda:part1:/{os.fsdecode(name)}/in")
        assert b"".join(opened.contents(place)) == name


def test_paths_lead_where_they_lead_for_the_guest(opened: Reading) -> None:
    for path in ("/etc/link", "/absolute/link", "/etc/../../../etc//./hostname", "/out/../same"):
        if path.startswith("/out"):
            with pytest.raises(NoSuchTarget):
                b"".join(opened.contents(opened.place(f"vda:part1:{path}")))
            continue
        assert b"".join(opened.contents(opened.place(f"vda:part1:{path}"))) == b"guest\n"
    with pytest.raises(NoSuchTarget):
        list(opened.entries(opened.place("vda:part1:/etc/loop")))
    with pytest.raises(UsageError, match="no file"):
        b"".join(opened.contents(opened.place("vda:part1:/etc")))


def test_a_large_file_and_small_ones_are_read_by_turns(stored: Path, opened: Reading) -> None:
    """The one past the cache of the disk, the others through it."""
    for _ in range(2):
        large = b"".join(opened.contents(opened.place("vda:part1:/large")))
        assert digest(large) == digest((stored / "tree/large").read_bytes())
        assert b"".join(opened.contents(opened.place("vda:part1:/etc/hostname"))) == b"guest\n"


def test_a_path_alone_is_looked_for_everywhere(opened: Reading) -> None:
    assert opened.place("/etc/hostname").system.name == "vda:part1"
    assert opened.place("/start me.TXT").system.name == "vda:part2"
    with pytest.raises(NoSuchTarget):
        opened.place("/nowhere")
    with pytest.raises(UsageError, match="several"):
        opened.place("/")


def test_files_are_found_by_name(opened: Reading) -> None:
    system = opened.place("vda:part1")
    found = {each.path for each in opened.search(system, ["-name", "h*", "-type", "f"])}
    assert found == {b"etc/hostname"}
    fat = Place(opened.place("/Start Me.txt").system, "/")
    assert {each.path for each in opened.search(fat, [])} == {b"Start Me.txt"}


def test_a_tree_is_copied_and_what_could_harm_is_left_out(stored: Path, tmp_path: Path) -> None:
    done = files(stored, "cp", "-r", "vda:part1:/", tmp_path / "out").check(3)
    assert "pipe is left out" in done.err
    left_out = {"pipe", "out", "absolute"}
    tree, out = stored / "tree", tmp_path / "out"
    assert {each.name for each in out.iterdir()} == (
        {each.name for each in tree.iterdir()} | {"lost+found"}
    ) - left_out
    for name in ("large", "etc/hostname", "suid"):
        assert digest((out / name).read_bytes()) == digest((tree / name).read_bytes())
    assert (out / "sparse").stat().st_size == 500 * MIB
    assert (out / "sparse").stat().st_blocks * 512 < 8 * MIB
    assert (out / "large").stat().st_mtime == 1_000_000_000
    assert (out / "suid").stat().st_mode & 0o7777 == 0o755
    assert (out / "same").stat().st_ino == (out / "etc/hostname").stat().st_ino
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_an_archive_keeps_all(stored: Path, tmp_path: Path) -> None:
    files(stored, "tar", "-f", tmp_path / "all.tar", "vda:part1:/").check()
    with tarfile.open(tmp_path / "all.tar") as tar:
        found = {member.name: member for member in tar.getmembers()}
        large = found["./large"]
        assert large.pax_headers["SCHILY.xattr.user.origin"] == "here"
        assert (large.mtime, found["./suid"].mode) == (1_000_000_000, 0o4755)
        assert found["./out"].linkname == "../../../etc/passwd"
        assert found["./pipe"].isfifo()
        data = tar.extractfile(large)
        assert data
        assert digest(data.read()) == digest((stored / "tree/large").read_bytes())
    again = files(stored, "tar", "-f", tmp_path / "all.tar", "vda:part1:/").check(2)
    assert "is there" in again.err


def shell(
    target: Path | str, *lines: str, code: int = 0, env: Mapping[str, str] | None = None
) -> tuple[str, str]:
    """What a shell says for these lines, and what it complains of."""
    command = [cli.executable("qmpbackup"), "files", "shell", "--target", str(target)]
    given = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
    told = {**os.environ, **(env or {})}
    done = subprocess.run(
        command, input=given, capture_output=True, check=False, timeout=PATIENCE, env=told
    )
    out, err = done.stdout.decode(errors="surrogateescape"), done.stderr.decode()
    assert done.returncode == code, (out, err)
    return out, err


def test_a_shell_answers_one_line_after_the_other(stored: Path, tmp_path: Path) -> None:
    out, err = shell(
        stored / "target",
        "ls",
        "cd vda:part1:etc/..",
        "cd vda:part1:/absolute",
        "cat hostname",
        "cat hostname # again",
        "cd ..",
        "pwd",
        "cat '/etc'",
        "nothing",
        "cp -x",
        "cp / out",
        f"cp -r etc {tmp_path / 'etc'}",
        f"cp -r nowhere {tmp_path / 'nowhere'}",
        "find --name h* --type f",
        "'",
        "ls",
        "cat \\'\\\"\\\\/in",
        "cat '\udcff\udcfe/in'",
        "exit",
        "cat etc/hostname",
        code=2,
    )
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["vda:part1:", "vda:part2:"]
    assert lines[2:6] == ["guest", "guest", "vda:part1:/", "vda:part1:/etc/hostname"]
    assert "new\\nline" in lines[6:-1], "a hostile name stays on its line"
    assert lines[-1] == "'\"\\\udcff\udcfe"
    assert (tmp_path / "etc/hostname").read_text() == "guest\n"
    assert [line.partition(":")[0] for line in err.splitlines()].count("error") >= 8
    for said in ("'nothing'", "no file", "is a folder", "There is no vda:part1:/nowhere"):
        assert said in err


def test_journals_are_replayed_out_of_a_repository(tmp_path: Path) -> None:
    fill(tmp_path / "tree")
    disk = guest_disks.ext4(tmp_path / "disk", tmp_path / "tree")
    block = subprocess.run(
        ["debugfs", "-R", "blocks /etc/hostname", disk], check=True, capture_output=True
    ).stdout.split()[0]
    (tmp_path / "new").write_bytes(b"after".ljust(4096, b"\n"))
    journal = f"jo\njw -b {int(block)} {tmp_path / 'new'}\njc\n".encode()
    guest_disks.run("debugfs", "-w", "-f", "-", disk, given=journal)
    which = repository(tmp_path)
    guest_disks.backed_up(str(which), {"vda": disk}, **which.environment)
    before = disk.read_bytes()
    found = cli.run("files", "cat", "--target", str(which), "/etc/hostname", env=which.environment)
    assert found.check().out == "after\n"
    assert disk.read_bytes() == before


MAKE = """
exec 2>&1
lvm pvcreate -q -y /dev/vda
lvm vgcreate -q vg /dev/vda
modprobe -a dm_thin_pool raid1
lvm lvcreate -q -y -Wn -Zn -L 32M -n ro-ot vg
lvm lvcreate -q -y -T -L 64M -V 200M -n thin vg/pool
mdadm --create /dev/md/data --level=1 --raid-devices=2 --metadata=1.2 --run /dev/vdb /dev/vdc
modprobe -a dm_crypt algif_skcipher
printf 'open sesame' | cryptsetup luksFormat -q --key-file=- --pbkdf pbkdf2 \\
    --pbkdf-force-iterations 1000 /dev/vdd
printf 'open sesame' | cryptsetup open --key-file=- /dev/vdd luks
for each in vg/ro-ot vg/thin md/data mapper/luks; do
    cat /dev/vde >/dev/$each
done
mkdir /b
modprobe btrfs
mount -t btrfs /dev/vdf /b
btrfs subvolume create /b/@home
echo mine >/b/@home/file
busybox umount /b
busybox sync
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to nobody")
def test_volumes_raid_encryption_and_other_file_systems(open_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    hostname = tmp_path / "tree/hostname"
    hostname.write_text("guest\n")
    system = guest_disks.ext4(open_folder / "system", tmp_path / "tree", 16 * MIB)
    sizes = {"lvm": 300 * MIB, "one": 24 * MIB, "two": 24 * MIB, "locked": 40 * MIB}
    disks = {name: guest_disks.blank(open_folder / name, size) for name, size in sizes.items()}
    disks["tree"] = guest_disks.btrfs(open_folder / "btrfs", tmp_path / "tree")
    guest_disks.worked_on(open_folder, MAKE, *list(disks.values())[:4], system, disks["tree"])
    disks["xfs"] = guest_disks.xfs(tmp_path / "xfs", {"hostname": hostname})
    disks["win"] = guest_disks.ntfs(tmp_path / "ntfs", {"hostname": hostname})
    guest_disks.backed_up(tmp_path / "target", disks)
    (tmp_path / "phrase").write_text("open sesame\n")

    shown = {each["name"]: each for each in files(tmp_path, "ls", "--json").check().objects}
    assert {name: each["kind"] for name, each in shown.items()} == {
        "vg/ro-ot": "ext4",
        "vg/thin": "ext4",
        "md/data": "ext4",
        "locked": "crypto_LUKS",
        "tree": "btrfs",
        "xfs": "xfs",
        "win": "ntfs",
    }
    assert shown["tree"]["subvolumes"] == ["@home"]
    with reading(Request(tmp_path / "target", "latest", passphrase=tmp_path / "phrase")) as found:
        for name in shown:
            place = found.place(f"{name}:/hostname")
            assert b"".join(found.contents(place)) == b"guest\n", name
        assert b"".join(found.contents(found.place("tree:/@home/file"))) == b"mine\n"
    (tmp_path / "phrase").write_text("open barley\n")
    wrong = files(tmp_path, "ls", "--passphrase-file", tmp_path / "phrase").check(2)
    assert "unlocks nothing" in wrong.err


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to nobody")
def test_partitions_of_all_kinds_and_what_is_on_cards_and_discs(
    open_folder: Path, tmp_path: Path
) -> None:
    """Also disks whose sectors had 4 KiB, which the appliance's do not have."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "hostname").write_text("guest\n")
    (tree / "A long name.txt").write_text("long\n")
    two = guest_disks.ext4(tmp_path / "two", tree, 8 * MIB, "ext2")
    three = guest_disks.ext4(tmp_path / "three", tree, 8 * MIB, "ext3")
    card = guest_disks.exfat(open_folder / "card")
    script = "modprobe exfat; mkdir /b; mount -t exfat /dev/vda /b; echo guest >/b/hostname; busybox umount /b"
    guest_disks.worked_on(open_folder, script, card)
    gpt, mbr = guest_disks.gpt, guest_disks.partitioned
    disks = {
        "gpt": gpt(tmp_path / "gpt", two, three, card),
        "hybrid": guest_disks.hybrid(gpt(tmp_path / "hybrid", two)),
        "large": gpt(tmp_path / "large", two, three, sector=4096),
        "older": mbr(tmp_path / "older", three, sector=4096),
        "disc": guest_disks.iso(tmp_path / "disc", tree),
        "win": guest_disks.bitlocker(tmp_path / "win"),
        "swap": guest_disks.blank(tmp_path / "swap", MIB),
        "empty": gpt(tmp_path / "empty"),
    }
    guest_disks.run("mkswap", disks["swap"])
    guest_disks.backed_up(tmp_path / "target", disks)
    shown = {each["name"]: each for each in files(tmp_path, "ls", "--json").check().objects}
    assert {name: each["kind"] for name, each in shown.items()} == {
        "gpt:part1": "ext2",
        "gpt:part2": "ext3",
        "gpt:part3": "exfat",
        "hybrid:part1": "ext2",
        "large:part1": "ext2",
        "large:part2": "ext3",
        "older:part1": "ext3",
        "disc": "iso9660",
        "win": "BitLocker",
        "swap": "swap",
    }
    assert "BitLocker, which cannot be opened here" in shown["win"]["note"]
    with reading(Request(tmp_path / "target", "latest")) as found:
        for system in found.readable():
            place = Place(system, "/hostname")
            assert b"".join(found.contents(place)) == b"guest\n", system.name
        for name in ("win", "swap"):
            with pytest.raises(UsageError, match=f"{name} cannot be opened"):
                found.place(f"{name}:/hostname")
        assert b"".join(found.contents(found.place("disc:/A long name.txt"))) == b"long\n"


def processes(folder: Path) -> list[int]:
    """What runs for a folder."""
    found = []
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            if process.name.isdigit() and os.fsencode(folder) in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def machine_of(running: cli.Running) -> int | None:
    """The process of a run's machine, once that has confined itself."""
    for each in children_of(running.pid):
        with suppress(OSError):
            words = Path(f"/proc/{each}/cmdline").read_bytes()
            if b"-sandbox" in words and status_of(each)["Seccomp"] == "2":
                return each
    return None


def status_of(process: int) -> dict[str, str]:
    """What the kernel says of a process."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def folder_of(machine: int) -> Path:
    """The folder of a run, by the overlay of its machine."""
    words = Path(f"/proc/{machine}/cmdline").read_bytes().split(b"\0")
    (node,) = (word for word in words if b".overlay.qcow2" in word and b"vda" in word)
    return Path(json.loads(node)["file"]["filename"]).parent


def children_of(parent: int) -> list[int]:
    """The children of a process."""
    found = Path(f"/proc/{parent}/task").glob("*/children")
    return [int(word) for each in found for word in each.read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_leaves_nothing(stored: Path, number: signal.Signals) -> None:
    with cli.start("files", "ls", "--target", stored / "target") as running:
        wait_until(running.unless_over(lambda: machine_of(running)), "its machine")
        machine = machine_of(running)
        assert machine
        folder = folder_of(machine)
        status = status_of(machine)
        if os.geteuid() == 0:
            assert status["Uid"].split()[1] == str(pwd.getpwnam("nobody").pw_uid)
            assert (status["NoNewPrivs"], int(status["CapBnd"], 16)) == ("1", 0)
            ours, theirs = (Path(f"/proc/{each}/ns/net") for each in ("self", machine))
            assert ours.readlink() != theirs.readlink()
        running.signal(number)
        code = running.wait().code
    assert code == (143 if number is signal.SIGTERM else -number)
    wait_until(lambda: not processes(folder), "the end of all that it started")
    if number is signal.SIGKILL:
        files(stored, "ls").check()
    assert not folder.exists()


def test_a_kernel_that_is_brought_down_ends_the_run_alone(stored: Path) -> None:
    request = Request(stored / "target", "latest")
    with pytest.raises(VmError, match="ended"), reading(request) as found:
        found._agent.told("sh", "-c", "echo c >/proc/sysrq-trigger")


def test_a_damaged_point_gives_nothing_wrong(stored: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", stored / "target", tmp_path / "target"], check=True)
    (file,) = (tmp_path / "target/vda").glob("FULL-*")
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size - 1000)
        opened.write(b"damage")
    done = files(tmp_path, "cp", "vda:part1:/large", tmp_path / "large").check(8)
    assert "damaged" in done.err
    assert not (tmp_path / "large").exists()


def chunk_of_large(stored: Path) -> bytes:
    """A chunk of the system's disk with nothing in it but some of the large file."""
    disk = (stored / "system").read_bytes()
    part = (stored / "tree/large").read_bytes()[4 * MIB : 4 * MIB + 4096]
    number = disk.index(part) // MIB
    return disk[number * MIB : (number + 1) * MIB]


def damage_chunk(which: Repository, folder: Path, chunk: bytes) -> None:
    """Spoil a chunk of a repository in a folder."""
    name = digest(chunk)
    for index in which.restic("list", "index").text.split():
        for pack in which.restic("cat", "index", index).json["packs"]:
            for blob in (each for each in pack["blobs"] if each["id"] == name):
                file = folder / "data" / pack["id"][:2] / pack["id"]
                file.chmod(0o600)
                with file.open("r+b") as opened:
                    opened.seek(blob["offset"] + blob["length"] // 2)
                    opened.write(b"damage")
                return
    raise AssertionError(f"no blob {name}")


def test_a_damaged_chunk_of_a_repository_is_named(stored: Path, tmp_path: Path) -> None:
    which = repository(tmp_path)
    guest_disks.backed_up(str(which), {"vda": stored / "system"}, **which.environment)
    damage_chunk(which, tmp_path / "repository", chunk_of_large(stored))
    words = ("--target", str(which), "vda:/large", tmp_path / "large")
    done = cli.run("files", "cp", *words, env=which.environment).check(8)
    assert "vda is damaged: " in done.err
    assert not (tmp_path / "large").exists()
    lines = ("cd vda:", "cat large", "cat etc/hostname")
    said, err = shell(str(which), *lines, code=8, env=which.environment)
    assert said.endswith("guest\n"), "what is whole can be had"
    assert "vda is damaged: " in err


def test_damage_where_a_file_system_begins_is_damage(stored: Path, tmp_path: Path) -> None:
    which = repository(tmp_path)
    guest_disks.backed_up(str(which), {"vda": stored / "system"}, **which.environment)
    damage_chunk(which, tmp_path / "repository", (stored / "system").read_bytes()[:MIB])
    for words in (("cat", "vda:/etc/hostname"), ("ls", "/etc")):
        done = cli.run(
            "files", words[0], "--target", str(which), words[1], env=which.environment
        ).check(8)
        assert "vda is damaged: " in done.err


def test_a_target_that_cannot_be_read_is_no_damage(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RestServer(tmp_path / "served") as server, HttpProxy(server.url) as proxy:
        which = made(Repository(f"rest:{proxy.url}/", tmp_path))
        guest_disks.backed_up(str(which), {"vda": stored / "system"}, **which.environment)

        for name, value in which.environment.items():
            monkeypatch.setenv(name, value)
        with reading(Request(opening.place(str(which)), "latest")) as found:
            place = found.place("vda:/large")
            proxy.hook = lambda request: "403" if "/data/" in request.path else "pass"
            with pytest.raises(StorageError, match="403"):
                b"".join(found.contents(place))
            proxy.hook = lambda _: "pass"
            whole = b"".join(found.contents(place))
        assert digest(whole) == digest((stored / "tree/large").read_bytes())


def test_an_appliance_that_is_there_is_not_made_again(stored: Path) -> None:
    files(stored, "ls").check()  # by now it is there
    first, second = (cli.run("files", "prepare", "--if-missing").check().out for _ in range(2))
    assert first == second
    assert (Path(first.strip()) / "initramfs").exists()


def test_a_file_system_that_is_made_to_harm_harms_nothing(tmp_path: Path) -> None:
    tree, out = tmp_path / "tree", tmp_path / "out"
    deep = tree / "deep" / "/".join("d" * 600)
    deep.mkdir(parents=True)
    (tree / "good").write_text("good\n")
    with (tree / "bomb").open("wb") as file:
        file.truncate(1024 * 1024 * MIB)
    disk = guest_disks.hostile(tmp_path / "disk", tree)
    guest_disks.backed_up(tmp_path / "target", {"vda": disk})
    out.mkdir()
    with reading(Request(tmp_path / "target", "latest")) as found:

        def copied(path: str) -> int:
            place = found.place(f"vda:{path}")
            return copy(found.archive(place), place, out, Wishes(recursive=True))

        assert copied("/nodes") == 1
        assert copied("/bomb") == 0
        assert copied("/deep") > 0
        for bad in ("/bad", "/loop", "/"):
            with pytest.raises(DamagedError):
                copied(bad)
        assert b"".join(found.contents(found.place("vda:/good"))) == b"good\n"
        assert all(b"/" not in each.path for each in found.search(found.place("vda:/nodes"), []))
    assert sorted(each.name for each in out.iterdir()) == ["bomb", "deep", "nodes"]
    assert not list((out / "nodes").iterdir())
    assert (out / "bomb").stat().st_size == 1024 * 1024 * MIB
    assert (out / "bomb").stat().st_blocks * 512 < MIB


def test_a_server_that_is_lost_is_started_again(stored: Path) -> None:
    large = digest((stored / "tree/large").read_bytes())
    others = servers()
    with reading(Request(stored / "target", "latest")) as found:
        place = found.place("vda:part1:/large")
        for server in servers() - others:
            os.kill(server, signal.SIGKILL)

        def is_read() -> bool:
            with suppress(StorageError):  # where this machine is slow to start one
                return digest(b"".join(found.contents(place))) == large
            return False

        wait_until(is_read, "a server that answers")
    assert servers() == others


def servers() -> set[int]:
    """The servers that this process has started."""
    return {
        each
        for each in children_of(os.getpid())
        if b"serve" in Path(f"/proc/{each}/cmdline").read_bytes().split(b"\0")
    }


def test_a_machine_that_is_killed_ends_the_run_and_nothing_is_left(
    stored: Path, tmp_path: Path
) -> None:
    words = ("--target", stored / "target", "-r", "vda:part1:/", tmp_path / "out")
    with cli.start("files", "cp", *words) as running:
        wait_until(running.unless_over(lambda: machine_of(running)), "its machine")
        machine = machine_of(running)
        assert machine
        folder = folder_of(machine)
        os.kill(machine, signal.SIGKILL)
        running.wait().check(6)
    assert not processes(folder)
    assert not folder.exists()
    assert not list(tmp_path.iterdir())


def test_a_wrecked_file_system_is_named(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    disk = guest_disks.ext4(tmp_path / "disk", tmp_path / "tree")
    with disk.open("r+b") as file:
        file.seek(1024 + 24)  # how large blocks are
        file.write(b"\x77")
    guest_disks.backed_up(tmp_path / "target", {"vda": disk})
    assert "vda" in files(tmp_path, "ls", "/").check(8).err

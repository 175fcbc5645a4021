# SPDX-License-Identifier: Apache-2.0
"""The real restic takes what we write, we take what it writes, and each honours the other's locks.

With the restic of PATH; `scripts/test-versions.sh` runs the same with the one of a newer Debian.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lab.patience import PATIENCE, wait_until
from lab.restic import PASSWORD, Backing, Restic
from lab.small import require_fuse
from qmpbackup.errors import Locked
from qmpbackup.restic import lock_file
from qmpbackup.restic.keyfile import Scrypt
from qmpbackup.restic.lock import Timing
from qmpbackup.restic.lock_file import Lock
from qmpbackup.restic.pack import BlobType
from qmpbackup.restic.repository import Repository
from qmpbackup.restic.snapshot import Snapshot
from qmpbackup.restic.storage.interface import File, Kind
from qmpbackup.restic.storage.local import LocalStorage
from qmpbackup.restic.tree import Node
from qmpbackup.restic.tree import encode as encode_tree
from qmpbackup.restic.writer import Writer

TIME = datetime(2026, 3, 1, 12, 30, 1, 50, tzinfo=UTC)
CHUNK = 256 * 1024
QUICK = Timing(settle=0.0, retry=0.05)
ODD_NAMES = [
    "a",
    "Z",
    "with space",
    'quote"s',
    "back\\slash",
    "new\nline",
    "tab\t\a\b\v\x7f",
    "<&>",
    "ä€😀\u2028\u00a0\ufeff",
    os.fsdecode(b"no utf-8 \xff\xfe"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the repository lies."""
    return tmp_path / "repository"


@pytest.fixture
def restic(tmp_path: Path, folder: Path) -> Restic:
    """restic on that repository, which it has not made yet."""
    return Restic(folder, tmp_path / "cache")


@pytest.fixture
def ours(folder: Path) -> Iterator[Repository]:
    """A new repository of ours, whose password costs next to nothing."""
    storage = LocalStorage(folder)
    with Repository.create(storage, PASSWORD, cost=Scrypt(2, 1, 1), environment={}) as made:
        yield made


def _open(folder: Path, password: str = PASSWORD) -> Repository:
    return Repository.open(LocalStorage(folder), password, environment={})


def _back_up(repository: Repository, files: dict[str, bytes], **more: object) -> str:
    """Store files as a snapshot of a folder /vm."""
    with repository.lock(timing=QUICK):
        repository.load_index()
        writer = Writer(repository, workers=1)
        nodes = []
        for name, data in files.items():
            chunks = (data[at : at + CHUNK] for at in range(0, len(data), CHUNK))
            content = b"".join(writer.add_now(BlobType.DATA, chunk) for chunk in chunks)
            nodes.append(_node(name, size=len(data), content=content))
        tree = writer.add_large(BlobType.TREE, lambda: encode_tree(nodes))
        top = _node("vm", type="dir", mode=1 << 31 | 0o750, subtree=tree)
        root = writer.add_large(BlobType.TREE, lambda: encode_tree([top]))
        writer.flush()
        writer.stop()
        made = Snapshot(TIME, root, ("/vm",), hostname="h", username="u", tags=("vm=x",))
        return repository.save_snapshot(replace(made, **more))  # type: ignore[arg-type]


def _node(name: str, **more: object) -> Node:
    node = Node(name, "file", 0o640, TIME, TIME, TIME, uid=1, gid=2, user="user", group="group")
    return replace(node, **more)  # type: ignore[arg-type]


def _files(repository: Repository, tree: bytes, path: str = "") -> Iterator[tuple[str, Node]]:
    for node in repository.load_tree(tree):
        yield f"{path}/{node.name}", node
        if node.subtree is not None:
            yield from _files(repository, node.subtree, f"{path}/{node.name}")


def _content(repository: Repository, node: Node) -> bytes:
    ids = [node.content[at : at + 32] for at in range(0, len(node.content), 32)]
    return b"".join(repository.load_blob(BlobType.DATA, each) for each in ids)


# restic takes what we write


def test_restic_opens_a_repository_that_we_made(folder: Path, restic: Restic) -> None:
    made = Repository.create(LocalStorage(folder), PASSWORD, environment={})
    config = restic("cat", "config").json
    assert config == {
        "version": 2,
        "id": made.config.id,
        "chunker_polynomial": f"{made.config.polynomial:x}",
    }
    restic("check")
    assert restic("snapshots", "--json").json in ([], None)
    (key,) = restic("key", "list", "--json").json
    assert key["current"]
    assert replace(restic, password="wrong")("snapshots", check=False).code != 0  # noqa: S106


def test_restic_takes_and_restores_what_we_store(
    ours: Repository, restic: Restic, tmp_path: Path
) -> None:
    files = dict.fromkeys(ODD_NAMES, b"") | {
        "disk.raw": os.urandom(CHUNK * 3 + 5) + bytes(CHUNK * 4),
        "manifest.json": b"{}",
    }
    name = _back_up(ours, files)
    restic("check", "--read-data")

    (snapshot,) = restic("snapshots", "--json").json
    assert (snapshot["id"], snapshot["paths"], snapshot["tags"]) == (name, ["/vm"], ["vm=x"])
    assert (snapshot["hostname"], snapshot["username"]) == ("h", "u")
    assert snapshot["time"] == "2026-03-01T12:30:01.00005Z"

    listed = {each["path"]: each for each in restic("ls", "--json", name).objects if "path" in each}
    assert listed["/vm"]["type"] == "dir"
    disk = listed["/vm/disk.raw"]
    assert (disk["size"], disk["mode"], disk["uid"], disk["gid"]) == (CHUNK * 7 + 5, 0o640, 1, 2)
    assert len(listed) == len(files) + 1

    assert restic("dump", name, "/vm/disk.raw").out == files["disk.raw"]
    restic("restore", name, "--target", tmp_path / "restored")
    restored = tmp_path / "restored" / "vm"
    assert {path.name: path.read_bytes() for path in restored.iterdir()} == files
    state = (restored / "disk.raw").stat()
    assert (state.st_mode & 0o777, state.st_mtime) == (0o640, TIME.timestamp())
    assert restored.stat().st_mode & 0o777 == 0o750


def test_restic_mounts_what_we_store(ours: Repository, restic: Restic, tmp_path: Path) -> None:
    require_fuse()
    disk = os.urandom(CHUNK + 5) + bytes(CHUNK * 4)
    name = _back_up(ours, {"disk.raw": disk})
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    with restic.start("mount", mounted) as process:
        try:
            wait_until(lambda: process.poll() is not None or mounted.is_mount())
            file = mounted / "ids" / name[:8] / "vm" / "disk.raw"
            assert file.read_bytes() == disk
            with file.open("rb") as opened:
                opened.seek(CHUNK)
                assert opened.read(10) == disk[CHUNK : CHUNK + 10]
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=PATIENCE)


def test_we_go_on_after_restic_has_worked_on_it(
    ours: Repository, restic: Restic, tmp_path: Path
) -> None:
    same = os.urandom(CHUNK)
    first = _back_up(ours, {"a": same + os.urandom(CHUNK)})
    _back_up(ours, {"a": same + os.urandom(CHUNK)}, parent=first, time=TIME + timedelta(days=1))
    restic("forget", "--keep-last", "1", "--prune")
    again = os.urandom(CHUNK)
    third = _back_up(ours, {"a": same + again})
    repair = ("rebuild-index",) if restic.version < (0, 16) else ("repair", "index")
    restic(*repair, "--read-all-packs")
    restic("tag", "--add", "seen", third)
    (tagged,) = [each for each in ours.snapshots() if "seen" in each.tags]
    assert tagged.original == third
    fourth = _back_up(ours, {"a": same + again}, parent=tagged.id)
    restic("check", "--read-data")
    assert restic("dump", fourth, "/vm/a").out == same + again
    there = {"RESTIC_FROM_PASSWORD": PASSWORD}
    other = Restic(tmp_path / "copy", tmp_path / "cache", environment=there).init()
    other("copy", "--from-repo", restic.repository)
    other("check", "--read-data")
    assert len(_open(tmp_path / "copy").snapshots()) == 3


# We take what restic writes


@pytest.mark.parametrize("version", [1, 2])
def test_we_read_what_restic_wrote(
    version: int, folder: Path, restic: Restic, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    (source / "sub" / "empty").mkdir(parents=True)
    contents = {name: os.urandom(10) for name in ODD_NAMES} | {
        "large": os.urandom(5 << 20) + bytes(5 << 20),
    }
    for name, data in contents.items():
        (source / "sub" / name).write_bytes(data)
    (source / "link").symlink_to("sub/large")
    (source / "sub" / "a").chmod(0o4711)
    os.link(source / "sub" / "a", source / "hard")
    os.mkfifo(source / "fifo")
    os.utime(source / "sub" / "a", ns=(1, 123_456_789))

    restic.init("--repository-version", str(version))
    restic("key", "add", "--new-password-file", _file(tmp_path / "second", "zwei"))
    restic("backup", source, "--tag", "one,two", "--host", "there", "--exclude", "nothing")

    for password in (PASSWORD, "zwei"):
        opened = _open(folder, password)
        assert opened.config.version == version
    (said,) = restic("snapshots", "--json").json
    (snapshot,) = opened.snapshots()
    assert (snapshot.id, snapshot.tree.hex()) == (said["id"], said["tree"])
    assert (snapshot.hostname, snapshot.tags) == ("there", ("one", "two"))
    assert (snapshot.paths, snapshot.excludes) == ((str(source),), ("nothing",))

    opened.load_index()
    nodes = dict(_files(opened, snapshot.tree))
    listed = {each["path"] for each in restic("ls", "--json", "latest").objects if "path" in each}
    assert {path.encode(errors="replace") for path in nodes} >= {
        path.encode() for path in listed if "\ufffd" not in path
    }
    assert len(nodes) == len(listed)
    for name, data in contents.items():
        node = nodes[f"{source}/sub/{name}"]
        assert (_content(opened, node), node.size) == (data, len(data))
    assert nodes[f"{source}/link"].link_target == "sub/large"
    assert nodes[f"{source}/fifo"].type == "fifo"
    assert nodes[f"{source}/sub/a"].mode == 0o711 | 1 << 23  # Go's ModeSetuid
    assert nodes[f"{source}/sub/a"].mtime == datetime(1970, 1, 1, 0, 0, 0, 123_456, tzinfo=UTC)
    assert nodes[f"{source}/sub/a"].links == 2


def _file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_our_trees_are_restics_to_the_byte(folder: Path, restic: Restic, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ODD_NAMES:
        (source / name).write_bytes(name.encode(errors="surrogateescape"))
    (source / "empty file").touch()
    (source / "folder").mkdir()
    (source / "link").symlink_to("nowhere")
    restic.init()
    restic("backup", source)
    opened = _open(folder)
    opened.load_index()
    (snapshot,) = opened.snapshots()
    folders = [node for _, node in _files(opened, snapshot.tree) if node.subtree is not None]
    for id_ in (snapshot.tree, *(node.subtree for node in folders)):
        assert id_ is not None
        theirs = opened.load_blob(BlobType.TREE, id_)
        # Our times end at microseconds.
        expected = re.sub(
            rb"(\.\d{6})\d{1,3}Z", lambda found: found[1].rstrip(b"0.") + b"Z", theirs
        )
        assert b"".join(encode_tree(opened.load_tree(id_))) == expected


def test_we_write_into_repositories_of_version_1(folder: Path, restic: Restic) -> None:
    restic.init("--repository-version", "1")
    name = _back_up(_open(folder), {"a": bytes(CHUNK)})
    restic("check", "--read-data")
    assert restic("dump", name, "/vm/a").out == bytes(CHUNK)


# Locks


def test_restic_works_beside_our_lock_and_bears_no_other_alone(
    ours: Repository, restic: Restic
) -> None:
    with ours.lock(timing=QUICK):
        restic("snapshots")
        refused = restic("prune", check=False)
        assert refused.code != 0
        assert f"PID {os.getpid()}" in refused.err
    restic("prune")


def test_restic_stays_out_while_we_have_it_alone(ours: Repository, restic: Restic) -> None:
    with ours.lock(exclusive=True, timing=QUICK):
        refused = restic("snapshots", check=False)
        assert refused.code != 0
        assert "exclusively" in refused.err
    restic("snapshots")


def test_we_work_beside_restics_lock_and_bear_no_other_alone(
    ours: Repository, restic: Restic
) -> None:
    with Backing(restic) as backing:
        wait_until(lambda: list(ours.storage.list(Kind.LOCK)))
        with ours.lock(timing=QUICK):
            pass
        with (
            pytest.raises(Locked, match=f"process {backing.pid} "),
            ours.lock(exclusive=True, timing=QUICK),
        ):
            pass
        # What dies without a word leaves a lock that holds up nobody on its host.
        backing.kill()
        with ours.lock(exclusive=True, timing=QUICK):
            assert len(list(ours.storage.list(Kind.LOCK))) == 1
    assert list(ours.storage.list(Kind.LOCK)) == []


def test_we_stay_out_while_restic_has_it_alone(ours: Repository, restic: Restic) -> None:
    with restic.start("prune") as pruning:
        wait_until(lambda: list(ours.storage.list(Kind.LOCK)))
        pruning.send_signal(signal.SIGSTOP)
        try:
            alone = f"exclusively by process {pruning.pid} "
            with pytest.raises(Locked, match=alone), ours.lock(timing=QUICK):
                pass
        finally:
            pruning.send_signal(signal.SIGCONT)
        # And we wait for its end, if asked to.
        with ours.lock(wait=60.0, timing=QUICK):
            pass
        pruning.communicate(timeout=PATIENCE)


def _write(repository: Repository, written: Lock) -> None:
    name, sealed = repository.seal_unpacked(Kind.LOCK, lock_file.encode(written))
    repository.storage.save(File(Kind.LOCK, name), [sealed])


def test_restic_and_we_agree_on_which_locks_are_stale(ours: Repository, restic: Restic) -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    elsewhere = replace(Lock.ours(exclusive=True), hostname="elsewhere", pid=gone.pid)
    old = timedelta(minutes=31)
    cases = {
        "fresh, elsewhere": elsewhere,
        "old, elsewhere": replace(elsewhere, time=elsewhere.time - old),
        "dead, here": replace(Lock.ours(exclusive=True), pid=gone.pid),
        "old, here, alive": replace(Lock.ours(exclusive=True), time=elsewhere.time - old),
    }
    stale = {}
    for case, written in cases.items():
        _write(ours, written)
        restic("unlock")
        stale[case] = not list(ours.storage.list(Kind.LOCK))
        restic("unlock", "--remove-all")
    assert stale == {case: written.is_stale for case, written in cases.items()}
    assert set(stale.values()) == {True, False}


HOLDER = """
import sys
from pathlib import Path
from qmpbackup.restic.repository import Repository
from qmpbackup.restic.storage.local import LocalStorage
with Repository.open(LocalStorage(Path(sys.argv[1])), sys.argv[2], environment={}).lock():
    print("held", flush=True)
    sys.stdin.read()
print("ended", flush=True)
"""


def test_restic_unlock_leaves_us_and_our_lock_alone_while_we_live(
    ours: Repository, restic: Restic
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, ours.storage.name, PASSWORD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        restic("unlock")
        assert len(list(ours.storage.list(Kind.LOCK))) == 1
        holder.kill()
        holder.wait()
        restic("unlock")
        assert list(ours.storage.list(Kind.LOCK)) == []


def test_restic_never_sees_us_without_a_lock_while_we_refresh(
    ours: Repository, restic: Restic
) -> None:
    with ours.lock(exclusive=True, timing=replace(QUICK, refresh=0.02)):
        before = [name for name, _ in ours.storage.list(Kind.LOCK)]
        for _ in range(3):
            assert restic("snapshots", check=False).code != 0
        wait_until(
            lambda: [name for name, _ in ours.storage.list(Kind.LOCK)] != before, "a refresh"
        )

# SPDX-License-Identifier: Apache-2.0
"""Every parser of what others may have written: it understands or refuses, and nothing else.

`make test` tries a few dozen documents on each, `make test-all` thousands; QMPBACKUP_FUZZ says how
many. A document that fails is printed by hypothesis, and belongs into the parser's own test.
"""

import contextlib
import io
import json
import os
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz import mutations
from lab.disks import MIB, create
from qmpbackup import bounded_json
from qmpbackup.errors import QmpBackupError
from qmpbackup.images import qcow2, qemu_img
from qmpbackup.machine import command_line
from qmpbackup.model import Consistency, Level, Point, StoredDisk, VmConfig, VmIdentity
from qmpbackup.plan import names, retention, sizes
from qmpbackup.process import Result
from qmpbackup.restic import (
    config,
    keyfile,
    lock_file,
    pack,
    password,
    snapshot,
    tree,
    unpacked,
)
from qmpbackup.restic.crypto import Key, seal
from qmpbackup.restic.index import index_file
from qmpbackup.restic.storage import listing, location
from qmpbackup.restic.storage.interface import Kind
from qmpbackup.targets import manifest
from qmpbackup.targets.folder.journal import Intent, Phase
from qmpbackup.targets.folder.marks import Mark
from qmpbackup.targets.folder.owner import Owner
from qmpbackup.targets.folder.pending import Journal
from qmpbackup.targets.names import parse_file
from stock.parsers import PARSERS

EXAMPLES = int(os.environ.get("QMPBACKUP_FUZZ", "40"))
MOST_MEMORY = 128 * MIB
"""Bytes that a parser may take for a document of less than a megabyte."""

fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

ID = "ab" * 32
TIME = "2026-11-02T03:04:05.678901234+01:00"
KEY = Key.random()
VM = VmIdentity("7a1c7e7e-6f0c-4d3c-9a27-0d5c1f1c2b3a", "vm", "/run/vm.qmp")
DISK = StoredDisk(
    "hd0",
    Level.FULL,
    "hd0/FULL-1480542683",
    None,
    MIB,
    4096,
    f"blake3:{ID}",
    "qcow2",
    "/a",
    "b",
    "c",
)
POINT = Point(
    id="20261102T030405Z-000001",
    sequence=1,
    time=datetime(2026, 11, 2, 3, 4, 5, tzinfo=UTC),
    level=Level.FULL,
    parent=None,
    consistency=Consistency.CRASH,
    vm=VmConfig(VM, "7.2.22", "q35", ("qemu-system-x86_64", "-name", "vm")),
    disks=(DISK,),
)


def understood_or_refused(parse: Callable[[], object]) -> None:
    """A parser returns, or raises an error of ours, in bounded memory."""
    tracemalloc.start()
    try:
        with contextlib.suppress(QmpBackupError):
            parse()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MOST_MEMORY


def loaded(data: bytes) -> Any:
    return json.loads(data)


def resealed(value: Any) -> bytes:
    """A manifest whose digest is right, where there can be one."""
    data = mutations.rendered(value)
    with contextlib.suppress(ValueError, RecursionError, UnicodeError):
        content = json.loads(data)
        if isinstance(content, dict):
            content["digest"] = manifest._digest(
                {k: v for k, v in content.items() if k != "digest"}
            )
            return json.dumps(content).encode()
    return data


@fuzzed
@given(mutations.documents(loaded(manifest.encode(POINT))).map(resealed))
def test_manifests(data: bytes) -> None:
    understood_or_refused(lambda: manifest.decode(data, "a"))


JSON: dict[str, tuple[Any, Callable[[bytes], object]]] = {
    "vm.json": (loaded(Owner("t", VM).encode()), lambda data: Owner.decode(data, "a")),
    "a mark": (loaded(Mark("hd0/FULL-1", ID, TIME, "r").encode()), lambda data: Mark.decode(data, "a")),
    "a journal of a point": (
        {"schema": 1, "files": ["hd0/FULL-1480542683"], "folders": ["hd0"]},
        lambda data: Journal.decode(data, "a"),
    ),
    "a journal of a merge": (
        loaded(Intent(Phase.SWAPPING, "FULL-1", 7, ("a",), ("b",), (POINT,), (POINT.id,)).encode()),
        lambda data: Intent.decode(data, "a"),
    ),
    "config": (loaded(config.encode(config.create())), config.parse),
    "a key": (
        loaded(keyfile.create(KEY, "p", keyfile.Scrypt(2, 1, 1))),
        lambda data: keyfile.unlock(keyfile.parse(data, ID), "p", ID),
    ),
    "a lock": (
        loaded(lock_file.encode(lock_file.Lock.ours(exclusive=True))),
        lambda data: (str(each := lock_file.parse(data, ID)), each.is_stale),
    ),
    "a snapshot": (
        {"time": TIME, "tree": ID, "paths": ["/vm"], "hostname": "h", "tags": ["a"], "parent": ID,
         "uid": 1, "summary": {"x": 1}, "program_version": "r", "original": ID},
        lambda data: snapshot.parse(data, ID),
    ),
    "a tree": (
        {"nodes": [{"name": "a\\n", "type": "file", "mode": 384, "mtime": TIME, "atime": TIME,
                    "ctime": TIME, "uid": 0, "gid": 0, "size": 5, "content": [ID, ID],
                    "subtree": ID}]},
        lambda data: tree.parse([data[:50], data[50:]]),
    ),
    "an index": (
        {"supersedes": [ID], "packs": [{"id": ID, "blobs": [
            {"id": ID, "type": "data", "offset": 0, "length": 60, "uncompressed_length": 90}]}]},
        lambda data: list(index_file.parse(data, ID)),
    ),
    "what qemu-img says": (
        {"virtual-size": 5, "format": "qcow2", "snapshots": [{"id": "1"}]},
        lambda data: qemu_img._parse(Result("qemu-img", 0, data, "")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", JSON)
@fuzzed
@given(data=st.data())
def test_documents(what: str, data: st.DataObject) -> None:
    sample, parse = JSON[what]
    document = data.draw(mutations.texts([sample]))
    understood_or_refused(lambda: parse(document))


def header(*blobs: pack.PackedBlob) -> bytes:
    return pack.encode_header(KEY, blobs)


BLOB = pack.PackedBlob(pack.BlobType.DATA, bytes(32), 0, 60, 40)
PLAIN = b"some text, " * 20
SEALED, RAW_LENGTH = pack.seal_blob(KEY, PLAIN)


def whole(data: bytes) -> bytes:
    """What a sealed thing of these contents is, so that it is opened."""
    return seal(KEY, data)


def compressed(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=1).compress(data)


BYTES: dict[str, tuple[list[bytes], Callable[[bytes], object]]] = {
    "the end of a pack": (
        [header(BLOB), header(BLOB, BLOB._replace(offset=60, raw_length=0))],
        lambda data: pack.parse_header(KEY, data, 60 + len(data)),
    ),
    "entries of a pack": (
        [pack._COMPRESSED.pack(2, 60, 40, bytes(32)), pack._PLAIN.pack(0, 60, bytes(32))],
        lambda data: list(pack._entries(data, "A pack")),
    ),
    "a blob": (
        [compressed(PLAIN), compressed(bytes(100_000))],
        lambda data: pack.open_blob(
            KEY, whole(data), BLOB._replace(length=len(data) + 32, raw_length=len(PLAIN))
        ),
    ),
    "a large blob": (
        [compressed(PLAIN), compressed(bytes(100_000))],
        lambda data: list(
            pack.open_large_blob(
                KEY, whole(data), BLOB._replace(length=len(data) + 32, raw_length=len(PLAIN))
            )
        ),
    ),
    "a compressed file": (
        [b"\x02" + compressed(b'{"a": 1}'), b'{"a": 1}', b"\x02" + compressed(bytes(100_000))],
        lambda data: unpacked.decompressed(data, Kind.INDEX, "A file"),
    ),
}


@pytest.mark.parametrize("what", BYTES)
@fuzzed
@given(data=st.data())
def test_bytes(what: str, data: st.DataObject) -> None:
    samples, parse = BYTES[what]
    spoilt = data.draw(mutations.blobs(samples))
    understood_or_refused(lambda: parse(spoilt))


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """How real images begin."""
    import subprocess

    folder = tmp_path_factory.mktemp("heads")
    create(folder / "base", MIB)
    made = [folder / "base"]
    for name, options in (("overlay", "cluster_size=65536"), ("old", "compat=0.10")):
        path = folder / name
        base = ["-b", str(made[0]), "-F", "qcow2"]
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *base, str(path)]
        subprocess.run(command, check=True)
        made.append(path)
    return [path.read_bytes()[: qcow2.HEAD] for path in made]


@settings(parent=fuzzed, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_heads_of_images(heads: list[bytes], data: st.DataObject) -> None:
    head = data.draw(mutations.blobs([each[:600] for each in heads] + heads))
    understood_or_refused(lambda: qcow2.parse_header(head, "a"))


@fuzzed
@given(mutations.texts([[{"name": ID, "size": 5}, {"name": ID, "size": 6}], [ID, ID], []]))
def test_listings(data: bytes) -> None:
    """The storage turns what is no list into an error of its own."""

    def parse() -> None:
        for form in (listing.sized, listing.unsized):
            found = listing.Listing(Kind.DATA, "a")
            with contextlib.suppress(ValueError):
                for name, size in form(listing.members(io.BytesIO(data).read)):
                    found.add(name, size)
            list(found)

    understood_or_refused(parse)


@fuzzed
@given(mutations.texts([{"a": [1, "b", {"c": None}]}]))
def test_what_a_document_takes_is_reckoned_on_the_safe_side(data: bytes) -> None:
    reckoned = bounded_json.cost(data)
    tracemalloc.start()
    try:
        value = bounded_json.load(data, 1 << 40)
    except ValueError:
        return
    finally:
        taken, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert taken <= reckoned + 4096, type(value)


@fuzzed
@given(mutations.words(["rest:", "s3:", "http://", "https://", "gs:", "azure:", "host", "user", "pw",
                        "bucket", "/path", ":8000", ":99999", "[::1]", "local:", "b2:", "%zz"]))  # fmt: skip
def test_locations(text: str) -> None:
    understood_or_refused(lambda: location.connect(text, {"HOME": "/nowhere"}).close())


@fuzzed
@given(mutations.words(["1", "9" * 400, "M", "MiB", "G", ".5", "-", " ", "1y", "2d", "3h", "e9"]))
def test_numbers_with_units(text: str) -> None:
    understood_or_refused(lambda: sizes.parse_size(text))
    understood_or_refused(lambda: retention.parse_duration(text))


@fuzzed
@given(mutations.words(["qmpbackup:", "hd0/", "FULL-", "INC-", "1480542683", ".partial", ".."]))
def test_names(text: str) -> None:
    understood_or_refused(lambda: (names.parse_bitmap(text), parse_file(text)))


@fuzzed
@given(mutations.words(['"', "'", "\\", "cat", " ", "\t", "/file"]))
def test_commands_that_give_passwords(text: str) -> None:
    understood_or_refused(lambda: password.split(text))


@fuzzed
@given(st.lists(mutations.words(["-object", "secret,", "data=", "password=", "json:", '{"key":', "://u:p@",
                                 "-append", "-smbios", "value=", "x" * 2000, ",,"]), max_size=5))  # fmt: skip
def test_command_lines_keep_their_words(line: list[str]) -> None:
    assert len(list(command_line.masked(line))) == len(line)


OPTIONS = ["--socket", "--target", "--level", "auto", "backup", "list", "restore", "prune", "verify",
           "--keep-daily", "--keep-within", "1y", "-1", "--point", "--json", "--disk", "--speed-limit",
           "--help", "x", "", "é", "\x1b[2J", "--lock-wait", "nan", "inf", "1e999"]  # fmt: skip


@fuzzed
@given(
    st.sampled_from(range(len(PARSERS))), st.lists(st.sampled_from(OPTIONS) | st.text(max_size=5))
)
def test_options(number: int, argv: list[str]) -> None:
    said = io.StringIO()

    def parse() -> None:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                PARSERS[number].parse_args(argv)
            except SystemExit as end:
                assert end.code in {0, 2}

    understood_or_refused(parse)

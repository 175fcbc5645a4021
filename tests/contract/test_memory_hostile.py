# SPDX-License-Identifier: Apache-2.0
"""Memory stays within its bound whatever others send: QEMU, a guest agent, servers of repositories.

Each command runs in a process of its own, whose memory is what the kernel says of it.
"""

import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab import watched
from lab.hostile import How, hostile
from lab.repositories import Repository
from lab.scripted import FakeMonitor, ScriptedServer
from lab.servers import BUCKET, KEYS
from qmpbackup.restic.keyfile import Scrypt
from stock.stored_repository import StoredRepository

MOST_MIB = 200
"""What docs/explanation/threat-model.md promises."""

MIB = 1 << 20


def repeated(piece: bytes, size: int) -> bytes:
    """As many pieces as make up a size."""
    return piece * (size // len(piece))


def amplified(size: int) -> bytes:
    """JSON of a size that takes ten times as much once it is parsed."""
    return b"[" + repeated(b"[],", size) + b"[]]"


EVENTS = {
    "unrelated": b'{"event": "NOISE", "data": {}}\n',
    "large and unrelated": b'{"event": "NOISE", "data": {"x": "%b"}}\n' % (b"x" * MIB),
    "many values": b'{"event": "NOISE", "data": %b}\n' % amplified(MIB),
    "of foreign jobs": b'{"event": "JOB_STATUS_CHANGE", "data": {"id": "a", "status": "running"}}\n',
    "of our jobs": b'{"event": "JOB_STATUS_CHANGE", "data": {"id": "qmpbackup-1-copy0", '
    b'"status": "running"}}\n',
    "of our jobs, large": b'{"event": "BLOCK_JOB_ERROR", "data": {"device": "qmpbackup-1-copy0", '
    b'"operation": "%b"}}\n' % (b"x" * 100_000),
}


@pytest.mark.parametrize("kind", EVENTS)
def test_a_flood_of_events(kind: str, tmp_path: Path) -> None:
    event = EVENTS[kind]
    # What is kept of small ones takes some 20 times their length, of large ones just that.
    pieces = [repeated(event, 8 * MIB)] * (40 if kind == "large and unrelated" else 4)

    def answer(_name: str) -> dict[str, Any]:
        assert monitor.client
        while pieces:
            monitor.client.sendall(pieces.pop())
        return {"return": {}}

    monitor = FakeMonitor(answer)
    with ScriptedServer(tmp_path / "qmp", monitor.serve):
        seen = watched.run("--socket", tmp_path / "qmp", "info", "--show", "blockdev")
    seen.result.check(6)
    assert "Unexpected" not in seen.result.err
    assert seen.mib < MOST_MIB


def replies(size: int) -> dict[str, Callable[[], bytes]]:
    """Replies without id, of about a size, each of another kind."""
    return {
        "arrays": lambda: b'"return": ' + amplified(size),
        "objects": lambda: b'"return": [' + repeated(b'{"":0},', size) + b"0]",
        "strings": lambda: b'"return": [' + repeated(b'"ab",', size) + b"0]",
        "one rare letter": lambda: b'"return": "' + b"a" * size + b'\\ud83d\\ude00"',
        "refusals": lambda: b'"error": {"class": "A", "desc": %b}' % amplified(size),
        "deep": lambda: b'"return": ' + repeated(b"[[[[],", size) + b"0",
    }


GREETING = (
    b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, '
    b'"capabilities": []}}\n'
)


@pytest.mark.parametrize("size", [MIB // 2, 15 * MIB, 40 * MIB])
@pytest.mark.parametrize("kind", replies(0))
def test_large_replies_to_all_questions(kind: str, size: int, tmp_path: Path) -> None:
    reply = replies(size)[kind]()

    def serve(client: socket.socket) -> None:
        """Answer with the ids that are asked for."""
        client.sendall(GREETING)
        client.recv(65536)
        client.sendall(b'{"return": {}}\n')
        while data := client.recv(65536):
            for number in data.split(b'"id":"')[1:]:
                client.sendall(b'{"id": "%b", %b}\n' % (number.partition(b'"')[0], reply))

    with ScriptedServer(tmp_path / "qmp", serve):
        seen = watched.run("--socket", tmp_path / "qmp", "info", "--show", "blockdev")
    seen.result.check(6)
    assert "Unexpected" not in seen.result.err
    assert seen.mib < MOST_MIB


KINDS = ("config", "keys", "locks", "snapshots", "index", "data")
OF_FILES: tuple[How, ...] = ("more than said", "more than said, in chunks", "endless refusals")
OF_LISTS: tuple[How, ...] = (
    "endless lists",
    "endless lists of empty values",
    "endless space",
    "endless names",
    "impossible sizes",
)
OF_PAGES: tuple[How, ...] = (*OF_LISTS, "endless pages")
COMBINATIONS = [
    *(("rest", kind, how) for kind in KINDS for how in OF_FILES),
    *(("s3", kind, how) for kind in KINDS for how in OF_FILES if "chunks" not in how),
    *((protocol, kind, "endless lists") for protocol in ("rest", "s3") for kind in KINDS[1:]),
    *((protocol, "locks", how) for protocol in ("rest", "s3") for how in OF_LISTS[1:]),
    ("s3", "locks", "endless pages"),
]
OTHERS = [
    combination
    for protocol, hows in (("rest", OF_LISTS), ("s3", OF_PAGES))
    for kind in KINDS[1:]
    for how in hows
    if (combination := (protocol, kind, how)) not in COMBINATIONS
]
"""Listings are parsed and bounded in one place: what differs is who takes them in."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository with a point of one disk, whose index no cache has."""
    folder = tmp_path_factory.mktemp("repository")
    made = StoredRepository(folder)
    made.add({"hd0": os.urandom(2 * MIB)})
    return made.made


@pytest.mark.parametrize(
    ("protocol", "kind", "how"),
    [*COMBINATIONS, *(pytest.param(*each, marks=pytest.mark.slow) for each in OTHERS)],
)
def test_a_server_that_knows_no_measure(
    protocol: str, kind: str, how: How, stored: Repository, tmp_path: Path
) -> None:
    with hostile(Path(stored.location), kind, how) as url:
        place = f"rest:{url}/" if protocol == "rest" else f"s3:{url}/{BUCKET}"
        variables = {**stored.environment, **KEYS, "RESTIC_CACHE_DIR": str(tmp_path)}
        seen = watched.run("verify", "--target", f"restic:{place}", env=variables)
    assert seen.result.code in {0, 7, 8, 10}, str(seen.result)
    assert "Unexpected" not in seen.result.err
    whole = protocol == "s3" and how.startswith("endless")
    # What the library takes in as a whole is noticed by what it takes, some moments later: without
    # that, it takes all that there is.
    assert seen.mib < (10 if whole else 1) * MOST_MIB, str(seen.result)


@pytest.mark.parametrize(
    "cost", [Scrypt(2, 1, 13_000_000), Scrypt(1 << 20, 8, 1), Scrypt(1 << 15, 8, 1 << 20)]
)
def test_keys_that_somebody_planted(cost: Scrypt, tmp_path: Path) -> None:
    """Nobody needs a password to put them there."""
    made = StoredRepository(tmp_path / "repository").made
    own = next((Path(made.location) / "keys").iterdir())
    said = json.loads(own.read_bytes())
    for number in range(20):
        planted = json.dumps(said | {"N": cost.n, "r": cost.r, "p": cost.p, "n": number}).encode()
        own.with_name(hashlib.sha256(planted).hexdigest()).write_bytes(planted)
    seen = watched.run("list", "--target", str(made), env=made.environment)
    assert seen.result.code in {8, 10}, str(seen.result)
    assert seen.mib < MOST_MIB

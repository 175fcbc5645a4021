# SPDX-License-Identifier: Apache-2.0
"""Snapshots: which tree is the state of which paths at what time (doc/design.rst, "Snapshots")."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from qmpbackup.restic import gojson

LARGEST: Final = 24 << 20
"""Bytes of JSON that are believed: a snapshot may name very many paths, and no more."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot.

    `time` is aware, and what restic's policies take the calendar day from. `parent` and `original`
    are names of other snapshots, `summary` what restic 0.17 and later keep of the run. `id` is the
    snapshot's own name, empty until it is stored.
    """

    time: datetime
    tree: bytes
    paths: tuple[str, ...]
    hostname: str = ""
    username: str = ""
    uid: int = 0
    gid: int = 0
    tags: tuple[str, ...] = ()
    parent: str | None = None
    program_version: str = ""
    original: str | None = None
    summary: Mapping[str, object] | None = None
    excludes: tuple[str, ...] = ()
    id: str = field(default="", compare=False)


def encode(snapshot: Snapshot) -> bytes:
    """A snapshot as JSON, members in restic's order; empty ones are left out where it does so."""
    members: dict[str, object] = {
        "time": snapshot.time,
        "parent": snapshot.parent,
        "tree": snapshot.tree.hex(),
        "paths": snapshot.paths,
        "hostname": snapshot.hostname,
        "username": snapshot.username,
        "uid": snapshot.uid,
        "gid": snapshot.gid,
        "excludes": snapshot.excludes,
        "tags": snapshot.tags,
        "original": snapshot.original,
        "program_version": snapshot.program_version,
        "summary": snapshot.summary,
    }
    always = {"time", "tree", "paths"}
    return gojson.dump({k: v for k, v in members.items() if v or k in always}).encode()


def parse(data: bytes, name: str) -> Snapshot:
    """The snapshot of this name.

    Raises:
        DamagedError: this is none.
    """
    what = f"The snapshot {name}"
    members = gojson.Members(gojson.load(data, what), what)
    tree, parent, original = (members.id(each) for each in ("tree", "parent", "original"))
    if tree is None:
        raise gojson.damaged(what, "it names no tree")
    return Snapshot(
        time=members.time("time"),
        tree=tree,
        paths=members.strings("paths"),
        hostname=members.string("hostname"),
        username=members.string("username"),
        uid=members.number("uid", gojson.UINT32),
        gid=members.number("gid", gojson.UINT32),
        tags=members.strings("tags"),
        parent=parent.hex() if parent else None,
        program_version=members.string("program_version"),
        original=original.hex() if original else None,
        summary=members.object("summary"),
        excludes=members.strings("excludes"),
        id=name,
    )

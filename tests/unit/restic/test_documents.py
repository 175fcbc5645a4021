# SPDX-License-Identifier: Apache-2.0
"""Snapshots, key files, configurations and locks: as restic has them, and damaged is damaged."""

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qmpbackup.errors import DamagedError, UsageError
from qmpbackup.restic import config, keyfile, lock_file, snapshot
from qmpbackup.restic.crypto import Key
from qmpbackup.restic.keyfile import Scrypt
from qmpbackup.restic.snapshot import Snapshot

CHEAP = Scrypt(2, 1, 1)
TIME = datetime(2026, 3, 1, 12, 30, 1, 500_000, tzinfo=timezone(timedelta(hours=1)))
SNAPSHOT = Snapshot(TIME, bytes(32), ("/vm",), hostname="host", tags=("a", "b"))
LOCK = lock_file.Lock(TIME, exclusive=True, hostname="host", username="me", pid=7, uid=8, gid=9)
CONFIG = config.Config(2, "ab" * 32, 0x3DA3358B4DC173)

in_its_time = settings(deadline=None)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def _parse_config(data: bytes) -> object:
    try:
        return config.parse(data)
    except UsageError as error:
        assert "version" in error.message
        return None


PARSERS: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "snapshot": (lambda data: snapshot.parse(data, "ab" * 32), snapshot.encode(SNAPSHOT)),
    "lock": (lambda data: lock_file.parse(data, "ab" * 32), lock_file.encode(LOCK)),
    "config": (_parse_config, config.encode(CONFIG)),
    "key": (
        lambda data: keyfile.parse(data, "ab" * 32),
        keyfile.create(Key.from_bytes(bytes(range(64))), "password", CHEAP),
    ),
}
each_parser = st.sampled_from(sorted(PARSERS))


def _check(name: str, data: bytes) -> None:
    parser, _ = PARSERS[name]
    try:
        parser(data)
    except DamagedError as error:
        assert error.exit_code == 8


@in_its_time
@given(each_parser, st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
@example("lock", b"{" * 100_000)
@example("lock", b'{"a":' * 100_000)
@example("config", b'{"version":' + b"1" * 10_000 + b"}")
@example("snapshot", b'\xef\xbb\xbf{"tree":1}')
def test_anything_is_what_it_should_be_or_damaged(name: str, data: bytes) -> None:
    _check(name, data)


@in_its_time
@given(each_parser, st.data(), json_values)
def test_a_member_of_any_form_is_no_crash(name: str, data: st.DataObject, value: object) -> None:
    document = json.loads(PARSERS[name][1])
    document[data.draw(st.sampled_from(sorted(document)))] = value
    _check(name, json.dumps(document).encode())


@in_its_time
@given(each_parser, st.data())
def test_flipped_bytes_are_no_crash(name: str, data: st.DataObject) -> None:
    document = bytearray(PARSERS[name][1])
    for _ in range(data.draw(st.integers(1, 4))):
        document[data.draw(st.integers(0, len(document) - 1))] = data.draw(st.integers(0, 255))
    _check(name, bytes(document))


def test_a_snapshot_is_written_as_restic_writes_it() -> None:
    whole = replace(
        SNAPSHOT,
        username="<me>",
        uid=5,
        gid=6,
        parent="cd" * 32,
        original="ef" * 32,
        program_version="qmpbackup 1",
        summary={"backup_start": TIME, "data_added": 3},
    )
    assert snapshot.encode(whole).decode() == (
        f'{{"time":"2026-03-01T12:30:01.5+01:00","parent":"{"cd" * 32}","tree":"{"00" * 32}",'
        '"paths":["/vm"],"hostname":"host","username":"\\u003cme\\u003e","uid":5,"gid":6,'
        f'"tags":["a","b"],"original":"{"ef" * 32}","program_version":"qmpbackup 1",'
        '"summary":{"backup_start":"2026-03-01T12:30:01.5+01:00","data_added":3}}'
    )
    read = snapshot.parse(snapshot.encode(whole), "12" * 32)
    assert read.id == "12" * 32
    assert replace(read, summary=whole.summary) == whole


def test_a_snapshot_without_a_tree_is_damaged() -> None:
    with pytest.raises(DamagedError, match="tree"):
        snapshot.parse(b'{"time":"2026-03-01T12:30:01Z","paths":["/"]}', "ab" * 32)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("2026-03-01T12:30:01Z", datetime(2026, 3, 1, 12, 30, 1, tzinfo=UTC)),
        ("2026-03-01T12:30:01.123456789Z", datetime(2026, 3, 1, 12, 30, 1, 123456, tzinfo=UTC)),
        ("2026-03-01T12:30:01.1+05:30", datetime(2026, 3, 1, 7, 0, 1, 100000, tzinfo=UTC)),
        ("0001-01-01T00:00:00Z", datetime(1, 1, 1, tzinfo=UTC)),
    ],
)
def test_times_of_go_are_read(written: str, read: datetime) -> None:
    document = snapshot.encode(SNAPSHOT).replace(b"2026-03-01T12:30:01.5+01:00", written.encode())
    assert snapshot.parse(document, "ab" * 32).time == read


def test_the_right_password_opens_a_key_and_no_other_does() -> None:
    master = Key.random()
    file = keyfile.parse(keyfile.create(master, "pässword", CHEAP), "ab" * 32)
    assert keyfile.unlock(file, "pässword", "ab" * 32) == master
    assert keyfile.unlock(file, "password", "ab" * 32) is None


@pytest.mark.parametrize(
    ("n", "r", "p"),
    [
        (1 << 30, 8, 1),
        (1 << 15, 1 << 20, 1),
        (1 << 15, 8, 1 << 20),
        (3, 8, 1),
        (0, 0, 0),
        (1, 8, 1),
    ],
)
def test_a_key_that_asks_for_too_much_is_not_tried(n: int, r: int, p: int) -> None:
    document = json.loads(PARSERS["key"][1]) | {"N": n, "r": r, "p": p}
    with pytest.raises(DamagedError, match="scrypt"):
        keyfile.parse(json.dumps(document).encode(), "ab" * 32)


@in_its_time
@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
@example(json.dumps({"mac": {"k": "AA==", "r": "AA=="}, "encrypt": "AA=="}).encode())
@example(json.dumps({"mac": [], "encrypt": None}).encode())
def test_a_key_that_opens_to_nonsense_is_damaged(content: bytes) -> None:
    from qmpbackup.restic.crypto import seal

    file = keyfile.parse(PARSERS["key"][1], "ab" * 32)
    user = file.scrypt.derive("password", file.salt)
    with pytest.raises(DamagedError):
        keyfile.unlock(replace(file, data=seal(user, content)), "password", "ab" * 32)


def test_a_key_file_has_what_restic_shows_of_it() -> None:
    document = json.loads(PARSERS["key"][1])
    assert list(document) == [
        "created",
        "username",
        "hostname",
        "kdf",
        "N",
        "r",
        "p",
        "salt",
        "data",
    ]
    assert len(base64.b64decode(document["salt"])) == 64


def test_the_cost_of_a_password_is_never_below_restics() -> None:
    cost = keyfile.calibrate()
    assert (cost.n, cost.r) == (1 << 15, 8)
    assert cost.p >= 1


def test_a_lock_is_written_as_restic_writes_it() -> None:
    assert lock_file.encode(LOCK).decode() == (
        '{"time":"2026-03-01T12:30:01.5+01:00","exclusive":true,"hostname":"host","username":"me",'
        '"pid":7,"uid":8,"gid":9}'
    )
    assert lock_file.parse(lock_file.encode(LOCK), "ab" * 32) == LOCK


def test_unknown_versions_of_the_format_are_refused() -> None:
    with pytest.raises(UsageError, match="version 3"):
        config.parse(config.encode(replace(CONFIG, version=3)))


def test_irreducible_polynomials_are_told_from_others() -> None:
    # As many irreducible polynomials over F2 as theory says (Gauss).
    for degree, count in (
        (1, 2),
        (2, 1),
        (3, 2),
        (4, 3),
        (5, 6),
        (6, 9),
        (7, 18),
        (8, 30),
        (9, 56),
    ):
        candidates = range(1 << degree, 2 << degree)
        assert sum(map(config.is_irreducible, candidates)) == count


def test_a_new_repository_has_a_polynomial_that_restic_takes() -> None:
    made = config.create()
    assert made.polynomial.bit_length() == 54
    assert config.is_irreducible(made.polynomial)
    assert config.parse(config.encode(made)) == made

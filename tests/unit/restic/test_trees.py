# SPDX-License-Identifier: Apache-2.0
"""Trees are Go's JSON to the byte, and whatever is read as one is a tree or damaged."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qmpbackup.errors import DamagedError
from qmpbackup.restic import tree
from qmpbackup.restic.tree import Node

TIME = datetime(2026, 3, 1, 12, 30, 1, 50, tzinfo=UTC)
FILE = Node("disk.raw", "file", 0o600, TIME, TIME, TIME, size=5, links=1, content=bytes(range(64)))
FOLDER = Node("vm", "dir", 1 << 31 | 0o700, TIME, TIME, TIME, subtree=bytes(32))

in_its_time = settings(deadline=None)


def encode(nodes: list[Node]) -> bytes:
    """A tree's JSON, in one piece."""
    return b"".join(tree.encode(nodes))


def parse(document: bytes) -> list[Node]:
    """A tree out of its JSON in one piece."""
    return tree.parse([document])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
names = st.binary(min_size=1, max_size=20).map(lambda raw: raw.decode(errors="surrogateescape"))
times = st.datetimes(
    timezones=st.integers(-719, 719).map(lambda minutes: timezone(timedelta(minutes=minutes))),
    min_value=datetime(2, 1, 1),  # noqa: DTZ001 - hypothesis adds the zone
    max_value=datetime(9998, 1, 1),  # noqa: DTZ001
)
nodes = st.builds(
    Node,
    name=names.filter(lambda name: name not in {".", ".."} and not {"/", "\0"} & set(name)),
    type=st.sampled_from(["file", "dir", "symlink", "fifo"]),
    mode=st.integers(0, (1 << 32) - 1),
    mtime=times,
    atime=times,
    ctime=times,
    uid=st.integers(0, (1 << 32) - 1),
    user=st.text(),
    size=st.integers(0, (1 << 64) - 1),
    content=st.lists(st.binary(min_size=32, max_size=32), max_size=4).map(b"".join),
    subtree=st.none() | st.binary(min_size=32, max_size=32),
    link_target=st.text(),
)


def test_a_file_and_a_folder_are_written_as_restic_writes_them() -> None:
    ids = f'"{bytes(range(32)).hex()}","{bytes(range(32, 64)).hex()}"'
    moment = '"2026-03-01T12:30:01.00005Z"'
    times_ = f'"mtime":{moment},"atime":{moment},"ctime":{moment}'
    assert encode([FOLDER, FILE]).decode() == (
        '{"nodes":['
        f'{{"name":"disk.raw","type":"file","mode":384,{times_},"uid":0,"gid":0,"size":5,"links":1,'
        f'"content":[{ids}]}},'
        f'{{"name":"vm","type":"dir","mode":2147484096,{times_},"uid":0,"gid":0,'
        f'"content":null,"subtree":"{"00" * 32}"}}]}}\n'
    )


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ('a"b', '"a\\\\\\"b"'),
        ("a\\b", '"a\\\\\\\\b"'),
        ("a\nb", '"a\\\\nb"'),
        ("ä€😀", '"ä€😀"'),
        ("a<b>&", '"a\\u003cb\\u003e\\u0026"'),
        ("a\u2028b", '"a\\\\u2028b"'),
        ("\x01\x7f", '"\\\\x01\\\\x7f"'),
        (b"\xff\x80".decode(errors="surrogateescape"), '"\\\\xff\\\\x80"'),
        ("\U000e0001", '"\\\\U000e0001"'),
    ],
)
def test_names_are_quoted_as_go_quotes_them(name: str, written: str) -> None:
    document = encode([replace(FILE, name=name)])
    assert document.decode().startswith(f'{{"nodes":[{{"name":{written},"type"')
    assert parse(document)[0].name == name


def test_nodes_stand_in_the_order_of_their_bytes() -> None:
    unordered = [replace(FILE, name=name) for name in ("é", "z", "Z", "\U0001f600", "\uffff")]
    assert [node.name for node in parse(encode(unordered))] == [
        "Z",
        "z",
        "é",
        "\uffff",
        "\U0001f600",
    ]


@in_its_time
@given(st.lists(nodes, max_size=4, unique_by=lambda node: node.name))
def test_what_is_written_is_read(written: list[Node]) -> None:
    found = parse(encode(written))
    assert found == sorted(written, key=lambda node: node.name.encode(errors="surrogateescape"))


def test_a_million_chunks_come_back() -> None:
    content = b"".join(number.to_bytes(32, "little") for number in range(40_000))
    assert parse(encode([replace(FILE, content=content)]))[0].content == content


@pytest.mark.parametrize("size", [67 * 64, 1 << 16, 1 << 20])
@pytest.mark.parametrize("odd", [(), (0,), (70_000,), (1, 16_383, 16_384, 49_999)])
def test_long_runs_of_one_id_come_back(odd: tuple[int, ...], size: int) -> None:
    ids = [b"\7" * 32] * 70_001
    for number in odd:
        ids[number] = number.to_bytes(32, "little")
    content = b"".join(ids)
    document = encode([replace(FILE, content=content)])
    assert document.count(QUOTED_RUN) == len(ids) - len(odd)
    blocks = [document[at : at + size] for at in range(0, len(document), size)]
    assert tree.parse(blocks)[0].content == content


@given(st.lists(nodes, max_size=4, unique_by=lambda node: node.name), st.integers(1, 100))
def test_it_does_not_matter_how_a_tree_is_cut_into_blocks(written: list[Node], size: int) -> None:
    document = encode(written)
    blocks = [document[at : at + size] for at in range(0, len(document), size)]
    assert tree.parse(blocks) == parse(document)


QUOTED = b'"%s"' % (b"0f" * 32)
QUOTED_RUN = b'"%s"' % (b"07" * 32)


@pytest.mark.parametrize("odd", [b" ", b', "x"', b",null", b",", b'"', b',"content":[' + QUOTED])
@given(whole=st.integers(0, 3), size=st.integers(1, 90))
def test_a_list_that_turns_out_odd_is_read_alike_however_far_it_has_come(
    odd: bytes, whole: int, size: int
) -> None:
    listing = b",".join([QUOTED] * whole) + odd
    document = re.sub(rb'"content":\[[^]]*', b'"content":[' + listing, encode([FILE]))
    blocks = [document[at : at + size] for at in range(0, len(document), size)]
    assert _outcome([document]) == _outcome(blocks)
    assert (_outcome(blocks)[0] == []) == (odd != b" ")


def _outcome(blocks: list[bytes]) -> tuple[list[Node], str]:
    try:
        return tree.parse(blocks), ""
    except DamagedError as error:
        return [], str(error)


def test_other_writers_may_put_spaces_and_unknown_members() -> None:
    document = json.loads(encode([FILE, FOLDER]))
    document["nodes"][0]["extended_attributes"] = [{"name": "user.x", "value": "AA=="}]
    document["more"] = [1]
    assert parse(json.dumps(document, indent=1).encode()) == [FILE, FOLDER]


def test_a_content_in_a_name_or_elsewhere_is_none() -> None:
    tricky = replace(FILE, name='"content":["', user=f'"content":["{"00" * 32}"]')
    assert parse(encode([tricky])) == [tricky]
    document = json.loads(encode([FILE]))
    document["nodes"][0]["generic_attributes"] = {"content": ["00" * 32]}
    assert parse(json.dumps(document, separators=(",", ":")).encode()) == [FILE]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "a\0"])
def test_names_that_would_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="names"):
        encode([replace(FILE, name=name)])
    escaped = name.replace("\0", "\\\\u0000")
    with pytest.raises(DamagedError):
        parse(encode([FILE]).replace(b"disk.raw", escaped.encode()))


def test_a_name_there_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="differ"):
        encode([FILE, FILE])
    with pytest.raises(DamagedError, match="twice"):
        parse(encode([FILE, replace(FILE, name="disk.rax")]).replace(b"rax", b"raw"))


def test_beginnings_of_lists_without_end_are_no_tree() -> None:
    with pytest.raises(DamagedError):
        tree.parse([b'"content":[' * 90_000] * 8)


def test_what_is_said_beside_the_lists_has_a_limit() -> None:
    blocks = iter([b'{"nodes":[],"more":"', *[b"x" * (1 << 20)] * 200, b'"}'])
    with pytest.raises(DamagedError, match="too large"):
        tree.parse(blocks)
    assert len(list(blocks)) > 100


def _check(data: bytes) -> None:
    try:
        found = parse(data)
    except DamagedError:
        return
    assert parse(encode(found)) == sorted(
        found, key=lambda node: node.name.encode("utf-8", "surrogateescape")
    )


@in_its_time
@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 100_000)
@example(b'{"nodes":[{"name":"a","type":"file","content":["')
@example(b'{"nodes":' + b"9" * 10_000 + b"}")
@example(b'{"nodes":[{"name":"\\ud800"}]}')
@example(b'{"nodes":[{"name":"\\\\777"}]}')
def test_anything_is_a_tree_or_damaged(data: bytes) -> None:
    _check(data)


@in_its_time
@given(st.sampled_from(sorted(json.loads(encode([FOLDER]))["nodes"][0])), json_values)
@example("mtime", "2026-01-01T00:00:00+99:00")
@example("mtime", "0000-01-01T00:00:00Z")
@example("mtime", "9999-12-31T23:59:59-12:00")
@example("name", "a\\")
@example("name", "\\U00110000")
@example("content", ["00" * 31])
def test_a_member_of_any_form_is_a_tree_or_damaged(member: str, value: object) -> None:
    document = json.loads(encode([FOLDER]))
    document["nodes"][0][member] = value
    _check(json.dumps(document).encode())
    _check(json.dumps(document, separators=(",", ":")).encode())


@in_its_time
@given(st.data())
def test_a_tree_with_flipped_bytes_is_a_tree_or_damaged(data: st.DataObject) -> None:
    document = bytearray(encode([FILE, FOLDER]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(document) - 1))
        document[at] = data.draw(st.sampled_from(b'",[]{}:\\0a\n \xff'))
    _check(bytes(document))

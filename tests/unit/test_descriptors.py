# SPDX-License-Identifier: Apache-2.0
"""`--progress-fd` and `--limit-fd`: nobody at the other end holds a backup up, or ends it."""

import argparse
import json
import logging
import os
import socket
from collections.abc import Iterator

import pytest

from qmpbackup.cli.descriptors import descriptor, limits, telling
from qmpbackup.plan.progress import DiskProgress, Progress, Stage


class Pipe:
    """A pipe; its ends may be closed by anybody."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()

    def close(self) -> None:
        for fd in (self.read, self.write):
            try:
                os.close(fd)
            except OSError:
                continue


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


def at(done: int, stage: Stage = Stage.COPY, disks: int = 2) -> Progress:
    """Some progress."""
    found = (DiskProgress(f"disk{number}", done, 100) for number in range(disks))
    return Progress("web", stage, tuple(found))


def written(pipe: Pipe) -> list[dict[str, object]]:
    """What can be read once nobody writes any more."""
    os.close(pipe.write)
    with open(pipe.read, closefd=False) as lines:
        return [json.loads(line) for line in lines]


def test_each_object_tells_all_there_is(pipe: Pipe) -> None:
    with telling(pipe.write) as tell:
        tell(at(7))
    (told,) = written(pipe)
    assert told == {
        "schema": 1,
        "type": "progress",
        "vm": "web",
        "stage": "copy",
        "disks": [
            {"id": "disk0", "done": 7, "total": 100},
            {"id": "disk1", "done": 7, "total": 100},
        ],
    }


def test_what_begins_is_told_at_once_and_the_rest_now_and_then(pipe: Pipe) -> None:
    with telling(pipe.write) as tell:
        for stage in Stage:
            for done in range(1000):
                tell(at(done, stage))
    told = written(pipe)
    assert {each["stage"] for each in told} == set(Stage)
    assert len(told) < 1000


@pytest.mark.parametrize("disks", [1, 3000])
def test_one_who_never_reads_holds_nothing_up(pipe: Pipe, disks: int) -> None:
    """Also where a single object finds no room; what was written is whole all the same."""
    with telling(pipe.write) as tell:
        for _ in range(1000):
            for stage in (Stage.PREPARE, Stage.COPY):
                tell(at(1, stage, disks))
    os.close(pipe.write)
    with open(pipe.read, closefd=False) as lines:
        whole = [line for line in lines if line.endswith("\n")]
    assert all(json.loads(line)["vm"] == "web" for line in whole)


def test_what_found_no_room_is_finished_before_anything_else(pipe: Pipe) -> None:
    with telling(pipe.write) as tell:
        tell(at(1, Stage.PREPARE, 2000))  # more than a pipe takes
        found = os.read(pipe.read, 1 << 20)
        assert not found.endswith(b"\n")
        tell(at(2, Stage.COPY, 1))
        found += os.read(pipe.read, 1 << 20)
    first, second = map(json.loads, found.splitlines())
    assert (first["stage"], len(first["disks"])) == ("prepare", 2000)
    assert second["stage"] == "copy"


def test_one_who_has_gone_fails_nothing(pipe: Pipe) -> None:
    with telling(pipe.write) as tell:
        os.close(pipe.read)
        tell(at(1, Stage.PREPARE))
        tell(at(1, Stage.COPY))


def test_a_terminal_stays_fit_for_the_shell() -> None:
    master, terminal = os.openpty()
    with telling(terminal) as tell:
        tell(at(1))
    assert os.get_blocking(terminal)
    assert b'"progress"' in os.read(master, 4096)
    os.close(terminal)
    os.close(master)


def test_one_socket_serves_for_both() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        limit = limits(theirs.fileno())
        with telling(theirs.fileno()) as tell:
            tell(at(1))
            assert limit() == 0
            ours.send(b"20M\n")
            assert limit() == 20 << 20
            assert b'"progress"' in ours.recv(4096)


def test_the_last_whole_line_is_the_limit(pipe: Pipe, caplog: pytest.LogCaptureFixture) -> None:
    limit = limits(pipe.read)
    assert limit() == 0
    for said, meant in (
        (b"1000\n", 1000),
        (b"5\n7\n30", 7),
        (b"00\n", 3000),
        (b"none\n", 0),
        (b"20M\n0\n", 0),
        (b"9" * 40 + b"\n", 2**63 - 1),
        (b"12\n", 12),
    ):
        os.write(pipe.write, said)
        assert limit() == meant
    with caplog.at_level(logging.WARNING):
        os.write(pipe.write, b"fast\n\n-1\n" + b"\xff" * 5000 + b"\n")
        assert limit() == 12
    assert "'fast' is no limit" in caplog.text
    os.write(pipe.write, b"13\n14")
    os.close(pipe.write)
    assert [limit(), limit()] == [13, 13], "the last one holds when nobody says anything any more"


def test_a_descriptor_is_one_that_was_passed_on(pipe: Pipe) -> None:
    os.set_inheritable(pipe.write, True)
    assert descriptor(str(pipe.write)) == pipe.write
    for wrong in (str(pipe.read), "1000000", "-1", "one", "", "٣", "9" * 30):
        with pytest.raises(argparse.ArgumentTypeError, match="passed on"):
            descriptor(wrong)

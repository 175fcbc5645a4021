# SPDX-License-Identifier: Apache-2.0
"""The NBD server against real and hostile clients; what it serves lies in memory, or another server has it."""

import random
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

import nbd
import pytest

from qmpbackup.errors import StorageError
from qmpbackup.nbd.server import Server

SIZE = 5 * 1024 * 1024 + 512
PIECE = 64 * 1024


class Remembered:
    """An export in memory: random bytes and zeros in turn. Reading where it is `broken` fails."""

    def __init__(self) -> None:
        chosen = random.Random(1)  # noqa: S311 - repeatable
        parts = [
            chosen.randbytes(PIECE) if i % 2 else bytes(PIECE) for i in range(SIZE // PIECE + 1)
        ]
        self.data = b"".join(parts)[:SIZE]
        self.size = SIZE
        self.broken = -1

    def extents(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Pieces in turn."""
        while start < end:
            stop = min(end, (start // PIECE + 1) * PIECE)
            yield start, stop - start, not start // PIECE % 2
            start = stop

    def read(self, offset: int, length: int) -> bytes:
        """From memory."""
        if offset <= self.broken < offset + length:
            raise StorageError("it is broken there.")
        return self.data[offset : offset + length]

    def peek(self, offset: int, length: int) -> bytes | None:
        """Small ones at once, at some places."""
        return self.read(offset, length) if length <= 512 and offset % 1024 else None


@pytest.fixture
def export() -> Remembered:
    """What is served as `disk`."""
    return Remembered()


@pytest.fixture(params=[False, True], ids=["own", "relayed"])
def path(request: pytest.FixtureRequest, tmp_path: Path, export: Remembered) -> Iterator[str]:
    """The socket of a server, which reads itself or has another answer."""
    with ExitStack() as stack:
        relayed = {}
        if request.param:
            behind = stack.enter_context(serving(tmp_path / "behind", {"": export}))
            relayed = {"disk": behind}
        yield stack.enter_context(serving(tmp_path / "socket", {"disk": export}, relayed=relayed))


@contextmanager
def serving(
    path: Path,
    exports: Mapping[str, Remembered],
    *,
    allocation: bool = True,
    relayed: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[str]:
    """Serve for the block."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        server = Server(listener, exports, allocation=allocation, relayed=relayed)
        ending = threading.Thread(target=server.run, args=(0.0,))
        with socket.socket(socket.AF_UNIX) as holding:  # as long as somebody is there it goes on
            holding.connect(str(path))
            ending.start()
            yield str(path)
        ending.join()


def connected(path: str, *, structured: bool = True) -> nbd.NBD:
    """A client of libnbd."""
    client = nbd.NBD()
    client.set_export_name("disk")
    client.set_request_structured_replies(structured)
    client.add_meta_context("base:allocation")
    client.connect_unix(path)
    return client


@pytest.mark.parametrize("structured", [True, False])
def test_ranges_are_right_with_replies_of_both_forms(
    path: str, export: Remembered, structured: bool
) -> None:
    client = connected(path, structured=structured)
    chosen = random.Random(2)  # noqa: S311 - repeatable
    for _ in range(200):
        start = chosen.randrange(SIZE)
        length = min(chosen.choice([1, 512, 100_000, 3 << 20]), SIZE - start)
        assert bytes(client.pread(length, start)) == export.data[start : start + length]
    client.shutdown()


def test_requests_in_flight_are_answered_each_with_its_own(path: str, export: Remembered) -> None:
    client = connected(path)
    buffers = [(at, nbd.Buffer(20_000)) for at in range(0, SIZE - 20_000, 30_000)]
    cookies = [client.aio_pread(buffer, at) for at, buffer in buffers]
    while client.aio_in_flight():
        client.poll(-1)
    assert all(client.aio_command_completed(cookie) for cookie in cookies)
    for at, buffer in buffers:
        assert bytes(buffer.to_bytearray()) == export.data[at : at + 20_000]
    client.shutdown()


@pytest.mark.parametrize("structured", [True, False])
def test_a_failure_is_an_error_of_that_request_alone(
    path: str, export: Remembered, structured: bool
) -> None:
    export.broken = PIECE + 5
    client = connected(path, structured=structured)
    with pytest.raises(nbd.Error, match="Input/output error"):
        client.pread(3 * PIECE, 0)
    assert bytes(client.pread(PIECE, 3 * PIECE)) == export.data[3 * PIECE : 4 * PIECE]
    client.shutdown()


def test_what_would_change_it_is_refused(path: str) -> None:
    client = connected(path)
    assert client.is_read_only()
    client.set_strict_mode(0)
    for change in (client.trim, client.zero):
        with pytest.raises(nbd.Error):
            change(4096, 0)
    with pytest.raises(nbd.Error):
        client.pread(1024, SIZE - 512)
    client.shutdown()


def test_who_does_not_know_the_name_gets_nothing(path: str) -> None:
    client = nbd.NBD()
    client.set_export_name("other")
    with pytest.raises(nbd.Error):
        client.connect_unix(path)


def test_the_list_names_what_is_served(path: str) -> None:
    client = nbd.NBD()
    client.set_opt_mode(True)
    client.connect_unix(path)
    names: list[str] = []

    def note(name: str, _description: str) -> int:
        names.append(name)
        return 0

    client.opt_list(note)
    client.opt_abort()
    assert names == ["disk"]


_OPTION = struct.Struct(">8sII")
_GO = 7
_HANDSHAKE = struct.pack(">I", 3)
_CHOSEN = _HANDSHAKE + _OPTION.pack(b"IHAVEOPT", 1, 4) + b"disk"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\0",
        b"GET / HTTP/1.1\r\n\r\n" * 100,
        _HANDSHAKE + _OPTION.pack(b"IHAVEOPT", _GO, 2**32 - 1),
        _HANDSHAKE + _OPTION.pack(b"IHAVEOPT", _GO, 4) + b"\xff\xff\xff\xff",
        _HANDSHAKE + _OPTION.pack(b"IHAVEOPT", 10, 12) + b"\0\0\0\4disk\xff\xff\xff\xff",
        _HANDSHAKE + _OPTION.pack(b"IHAVEOPT", 99, 0) * 1000,
        _CHOSEN + random.Random(4).randbytes(28 * 50),  # noqa: S311
        _CHOSEN + struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, 2**31),
        _CHOSEN + struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 2**64 - 1, 2**32 - 1) * 100,
    ],
    ids=range(10),
)
def test_nonsense_ends_its_own_connection_at_most(
    path: str, export: Remembered, sent: bytes
) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.settimeout(60)
        with suppress(ConnectionError):  # what was not read when it was cut off
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass
    good = connected(path)
    assert bytes(good.pread(4096, PIECE)) == export.data[PIECE : PIECE + 4096]
    good.shutdown()


def test_a_client_that_does_not_read_holds_up_no_other(path: str, export: Remembered) -> None:
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.connect(path)
        read = struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 4 << 20)
        deaf.sendall(_CHOSEN + read * 8)
        good = connected(path)
        assert bytes(good.pread(4096, PIECE)) == export.data[PIECE : PIECE + 4096]
        good.shutdown()


def test_zeros_that_another_server_would_tell_are_not_told(
    tmp_path: Path, export: Remembered
) -> None:
    with (
        serving(tmp_path / "behind", {"": export}) as behind,
        serving(
            tmp_path / "socket", {"disk": export}, allocation=False, relayed={"disk": behind}
        ) as path,
    ):
        client = connected(path)
        assert not client.can_meta_context("base:allocation")
        client.set_strict_mode(0)
        with pytest.raises(nbd.Error):
            client.block_status(SIZE, 0, lambda *_: 0)
        assert bytes(client.pread(SIZE, 0)) == export.data
        client.shutdown()


def test_zeros_that_another_server_tells_are_told_to_those_who_may_know(
    tmp_path: Path, export: Remembered
) -> None:
    with (
        serving(tmp_path / "behind", {"": export}) as behind,
        serving(tmp_path / "socket", {"disk": export}, relayed={"disk": behind}) as path,
    ):
        client = connected(path)
        found: list[list[int]] = []

        def note(context: str, _at: int, entries: list[int], _error: object) -> int:
            assert context == "base:allocation"
            found.append(entries)
            return 0

        client.block_status(2 * PIECE, 0, note)
        assert found == [[PIECE, 3, PIECE, 0]]
        client.shutdown()


def test_without_the_other_server_clients_are_cut_off_and_it_serves_on(
    tmp_path: Path, export: Remembered
) -> None:
    exports = {"disk": export, "other": export}
    with serving(tmp_path / "socket", exports, relayed={"disk": str(tmp_path / "behind")}) as path:
        with serving(tmp_path / "behind", {"": export}):
            client = connected(path)
            assert bytes(client.pread(512, PIECE)) == export.data[PIECE : PIECE + 512]
            client.shutdown()
        late = nbd.NBD()
        late.set_export_name("disk")
        late.connect_unix(path)
        with pytest.raises(nbd.Error):
            late.pread(512, PIECE)
        own = nbd.NBD()
        own.set_export_name("other")
        own.connect_unix(path)
        assert bytes(own.pread(512, PIECE)) == export.data[PIECE : PIECE + 512]
        own.shutdown()

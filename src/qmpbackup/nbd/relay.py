# SPDX-License-Identifier: Apache-2.0
"""Answers of another server, handed on to a client of ours.

    client ──► requests, read and sent ──► the other server
    client ◄── answers, pages of memory that are moved (splice), not copied ◄──

We shake hands with each for ourselves and agree with both upon the same; from then on both speak as if to
each other. So the other server may know more than we offer to a client, such as `base:allocation`.

Knows the protocol; must not know what the other server shows.
"""

import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

from qmpbackup.nbd import protocol
from qmpbackup.nbd.protocol import Answer, Option, ProtocolError

_SECONDS: Final = 30.0
_PIPE: Final = 1 << 20
"""Bytes that are under way within us; what any user may have (/proc/sys/fs/pipe-max-size)."""


def receive(connection: socket.socket, length: int) -> bytes:
    """So many bytes.

    Raises:
        EOFError: there are not so many.
        OSError: the connection failed.
    """
    found = bytearray()
    while len(found) < length:
        data = connection.recv(length - len(found))
        if not data:
            raise EOFError
        found += data
    return bytes(found)


def hang_up(connection: socket.socket) -> None:
    """End a connection, from any thread: whoever waits for it is woken."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def connected(path: str, *, structured: bool, allocation: bool) -> Iterator[socket.socket]:
    """A connection to the only export of a server, which answers as was agreed upon with the client.

    Raises:
        OSError, EOFError: the server is not there.
        ProtocolError: it does not agree.
    """
    with socket.socket(socket.AF_UNIX) as server:
        server.settimeout(_SECONDS)
        server.connect(path)
        if receive(server, len(protocol.GREETING))[:16] != protocol.GREETING[:16]:
            raise ProtocolError("no greeting")
        server.sendall(protocol.CLIENT_FLAGS)
        if structured:
            _agree(server, Option.STRUCTURED_REPLY)
        if allocation:
            told = _agree(server, Option.SET_META_CONTEXT, protocol.allocation_of(""))
            if told[:4] != protocol.CONTEXT.to_bytes(4):
                raise ProtocolError("another number of a context")
        server.sendall(protocol.option(Option.EXPORT_NAME))
        receive(server, protocol.EXPORT_BYTES)
        server.settimeout(None)
        yield server


def _agree(server: socket.socket, option: Option, data: bytes = b"") -> bytes:
    """Have an option acknowledged; what was told before that."""
    server.sendall(protocol.option(option, data))
    told = b""
    while True:
        answer, length = protocol.parse_answer(receive(server, protocol.ANSWER_BYTES))
        if length > protocol.MOST_OPTION or answer not in {Answer.ACK, Answer.META_CONTEXT}:
            raise ProtocolError("no consent")
        told += receive(server, length)
        if answer == Answer.ACK:
            return told


def relay(client: socket.socket, server: socket.socket) -> None:
    """Hand on requests and answers, until one of both has gone; then both are hung up.

    Raises:
        OSError: one has gone in the midst of it.
    """
    answers = threading.Thread(
        target=_hand_on_answers, args=(server, client), name="nbd-answers", daemon=True
    )
    answers.start()
    try:
        while data := client.recv(64 * 1024):
            server.sendall(data)
    finally:
        hang_up(server)
        hang_up(client)
        answers.join()


def _hand_on_answers(server: socket.socket, client: socket.socket) -> None:
    with ExitStack() as stack:
        stack.callback(hang_up, client)
        stack.callback(hang_up, server)
        end, start = os.pipe()
        stack.callback(os.close, end)
        stack.callback(os.close, start)
        with suppress(OSError):  # then it is as long as it is
            fcntl.fcntl(start, fcntl.F_SETPIPE_SZ, _PIPE)
        with suppress(OSError):
            while count := os.splice(server.fileno(), start, _PIPE):
                while count:
                    count -= os.splice(end, client.fileno(), count)

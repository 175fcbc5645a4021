# SPDX-License-Identifier: Apache-2.0
"""A repository behind a REST server (restic, doc/REST_backend.rst): `rest-server`, `rclone serve
restic`.

Connections are kept as long as the server keeps them, for whoever asks next. Servers of the first version list names
alone; then each size is asked for.
"""

import base64
import errno
import http.client
import os
import re
import select
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Final, TypeVar
from urllib.parse import quote, unquote, urlsplit

from qmpbackup.durable import is_absence
from qmpbackup.errors import StorageError, UsageError
from qmpbackup.restic.storage import listing
from qmpbackup.restic.storage.connections import ByProxy, ProxyRefuses, Tunnelled
from qmpbackup.restic.storage.interface import (
    Buffer,
    File,
    Kind,
    Missing,
    Refused,
    Storage,
    Temporary,
    Unanswered,
)
from qmpbackup.restic.storage.listing import Listing
from qmpbackup.restic.storage.proxies import proxy_for
from qmpbackup.restic.storage.trust import refusal, trust

T = TypeVar("T")

_V2: Final = "application/vnd.x.restic.rest.v2"
_SECONDS: Final = 60.0
_LAST_SECONDS: Final = 10.0
"""How long a server may be silent once what it is asked for has been given up."""

_LARGEST_WHOLE: Final = 64 << 20
"""Bytes of a file that is asked for without a length; what is read in a run has one always."""

_PIECE: Final = 1 << 20
_LARGEST_REMARK: Final = 64 << 10
"""Bytes that a server may say beside what is asked for; none of them is read by anybody."""

_PASSING: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_APPENDING: Final = "The server may only take new files (append-only), or only be read."
_FOR_PROXY: Final = (
    "Write name and password into the proxy's address: http://user:password@host:3128."
)
_REFUSED: Final = {
    401: "Check RESTIC_REST_USERNAME and RESTIC_REST_PASSWORD.",
    403: _APPENDING,
    405: _APPENDING,
    407: _FOR_PROXY,
}
_PORTS: Final = {"http": 80, "https": 443}


class RestStorage(Storage):
    """A server at an address such as `https://user:password@host:8000/path/`."""

    def __init__(self, address: str, environment: Mapping[str, str], seconds: float = _SECONDS):
        """`seconds` is how long a server may be silent.

        Raises:
            UsageError: this is no address of a server.
        """
        try:
            parts = urlsplit(address)
            port = parts.port
        except ValueError:
            raise UsageError("The address behind rest: is not valid.", _EXAMPLE) from None
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise UsageError("The address behind rest: is not valid.", _EXAMPLE)
        self._trust = trust(environment) if parts.scheme == "https" else None
        self._host, self._port = parts.hostname, port or _PORTS[parts.scheme]
        self._proxy = proxy_for(parts.scheme, self._host, self._port, environment)
        path = quote(parts.path, safe=_IN_PATHS)
        self._path = path if path.endswith("/") else f"{path}/"
        self._seconds = seconds
        user = unquote(parts.username or "") or environment.get("RESTIC_REST_USERNAME", "")
        password = unquote(parts.password or "") or environment.get("RESTIC_REST_PASSWORD", "")
        self._headers = _authorization(user, password)
        place = parts.netloc.rpartition("@")[2]
        # A proxy that makes no tunnel is asked for whole addresses.
        self._root = f"http://{place}" if self._proxy and not self._trust else ""
        if self._proxy and self._root:
            self._headers |= self._proxy.headers
        masked = f"{quote(user)}:***@" if user else ""
        self._name = f"rest:{parts.scheme}://{masked}{place}{self._path}"
        self._idle: list[http.client.HTTPConnection] = []
        self._asking: set[http.client.HTTPConnection] = set()

    @property
    def name(self) -> str:
        """The location, without the password."""
        return self._name

    def create(self) -> None:
        """Have the server make the repository's folders."""
        self._ask("POST", "?create=true", "create the repository", _read_remark)

    def save(self, file: File, parts: Sequence[Buffer]) -> None:
        """Upload a file; servers that append only refuse one that is there already."""
        length = sum(len(part) for part in parts)
        if file.kind is Kind.CONFIG and self._length(file) is not None:
            return  # other servers would replace it
        headers = {"Content-Length": str(length), "Content-Type": "application/octet-stream"}
        try:
            self._ask("POST", str(file), f"write {file}", _read_remark, headers, parts)
        except Refused:
            # Why it does so, only another question tells.
            found = self._length(file)
            if found is None:
                raise
            if found != length:
                raise Temporary(
                    f"Cannot write {file} at {self._name}: a part of it is there, which may still "
                    "grow."
                ) from None

    def _length(self, file: File) -> int | None:
        """The length of a file, or None where there is no such file, or it may not be asked for."""
        try:
            return self.size(file)
        except (Missing, Refused):
            return None

    def load(self, file: File, offset: int = 0, length: int | None = None) -> bytes:
        """Download a file, or a range of it."""
        if length == 0:
            return b""
        headers = {}
        if offset or length is not None:
            end = "" if length is None else str(offset + length - 1)
            headers = {"Range": f"bytes={offset}-{end}"}

        def read(answer: http.client.HTTPResponse) -> bytes:
            if headers and answer.status == http.HTTPStatus.OK:  # ranges are optional
                _pass_over(answer, offset)
            return _read(answer, _LARGEST_WHOLE if length is None else length)

        _, data = self._ask("GET", str(file), f"read {file}", read, headers)
        if length is None and len(data) == _LARGEST_WHOLE:
            raise StorageError(f"{file} at {self._name} is too large.")
        if length is not None and len(data) != length:
            raise StorageError(f"{file} at {self._name} is shorter than it should be.")
        return data

    def size(self, file: File) -> int:
        """Ask for a file's length."""
        headers, _ = self._ask("HEAD", str(file), f"look at {file}", _read_remark)
        said = headers["Content-Length"] or ""
        if _LENGTH.fullmatch(said) is None:
            raise StorageError(f"{self._name} does not tell the length of {file}.")
        return int(said)

    def list(self, kind: Kind) -> Iterator[tuple[str, int]]:
        """Ask for names, and in one go for lengths where the server knows how."""

        def read(answer: http.client.HTTPResponse) -> Listing:
            found = Listing(kind, self._name)
            entries = listing.members(lambda size: _read(answer, size))
            is_sized = answer.headers.get("Content-Type") == _V2
            for name, size in listing.sized(entries) if is_sized else listing.unsized(entries):
                found.add(name, size)
            return found

        try:
            _, found = self._ask("GET", f"{kind}/", f"list {kind}", read, {"Accept": _V2})
        except ValueError as error:
            raise StorageError(f"{self._name} does not list {kind} as it should.") from error
        return iter(found) if found.has_sizes else self._with_sizes(kind, found)

    def _with_sizes(self, kind: Kind, found: Listing) -> Iterator[tuple[str, int]]:
        for name, size in found:
            try:
                yield name, size if size >= 0 else self.size(File(kind, name))
            except Missing:
                continue  # removed meanwhile

    def remove(self, file: File) -> None:
        """Have the server remove a file."""
        self._ask("DELETE", str(file), f"remove {file}", _read_remark)

    def give_up(self) -> None:
        """Break off what is under way; what is asked for from now on has little time."""
        self._seconds = min(self._seconds, _LAST_SECONDS)
        for connection in self._asking.copy():
            sock: socket.socket | None = connection.sock
            if sock is not None:
                with suppress(OSError):
                    sock.settimeout(self._seconds)
                    # As TLS's own method of this name changes what another thread is using.
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close all connections."""
        self._forget_idle()
        for connection in self._asking.copy():
            connection.close()

    def _ask(
        self,
        method: str,
        path: str,
        action: str,
        read: Callable[[http.client.HTTPResponse], T],
        headers: Mapping[str, str] | None = None,
        body: Sequence[Buffer] | None = None,
    ) -> tuple[http.client.HTTPMessage, T]:
        """One request; headers of an answer that is none of an error, and what `read` makes of it.

        Raises:
            ValueError: `read` did.
        """
        action = f"{action} at {self._name}"
        connection = self._connection()
        self._asking.add(connection)
        is_usable = False
        try:
            if connection.sock is None:
                connection.connect()
            # Giving up tells the connections that are there; one that was being made looks here.
            connection.sock.settimeout(self._seconds)
            sent = False
            with suppress(BrokenPipeError, ConnectionResetError):
                all_headers = {**self._headers, **(headers or {})}
                where = self._root + self._path + path
                connection.request(method, where, body=body, headers=all_headers)
                sent = True
            # A server may say no, and hang up, before it has read all that is sent.
            with connection.getresponse() as answer:
                if not http.HTTPStatus.OK <= answer.status < http.HTTPStatus.MULTIPLE_CHOICES:
                    raise _failure(action, answer.status, answer.reason)
                if not sent:
                    raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
                found = read(answer)
                # What follows would be taken for the next answer.
                is_usable = not answer.read(1)
            return answer.headers, found
        except ProxyRefuses as error:
            raise _without_tunnel(action, error) from error
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            if lasting := refusal(f"Cannot {action}", error):
                raise lasting from error
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            is_away = isinstance(error, socket.gaierror) or is_absence(error)
            kind = Unanswered if is_away else Temporary
            raise kind(f"Cannot {action}: {why}.", "See that the server can be reached.") from error
        finally:
            self._asking.discard(connection)
            if is_usable and connection.sock is not None:
                self._idle.append(connection)
            else:
                connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        """One that is open and that nobody uses, or a new one."""
        while self._idle:
            with suppress(IndexError):  # another thread was quicker
                found = self._idle.pop()
                if not _has_ended(found.sock):
                    return found
                found.close()
        return self._connect()

    def _forget_idle(self) -> None:
        while self._idle:
            with suppress(IndexError):
                self._idle.pop().close()

    def _connect(self) -> http.client.HTTPConnection:
        if self._trust is None:
            if self._proxy is not None:
                return ByProxy(self._host, self._port, self._proxy, self._seconds)
            return http.client.HTTPConnection(self._host, self._port, timeout=self._seconds)
        if self._proxy is not None:
            return Tunnelled(self._host, self._port, self._proxy, self._seconds, self._trust)
        return http.client.HTTPSConnection(
            self._host, self._port, timeout=self._seconds, context=self._trust
        )


def _has_ended(sock: socket.socket) -> bool:
    """Whether a server has hung up on a connection on which nothing was asked."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _read(answer: http.client.HTTPResponse, most: int) -> bytes:
    """The next bytes of an answer: as many as wanted, or all there are."""
    data = answer.read(most)
    if len(data) < most and answer.length:  # read(…) does not mind an end that comes early
        raise http.client.IncompleteRead(data, answer.length)
    return data


def _pass_over(answer: http.client.HTTPResponse, length: int) -> None:
    while length > 0 and (piece := _read(answer, min(length, _PIECE))):
        length -= len(piece)


def _read_remark(answer: http.client.HTTPResponse) -> None:
    _read(answer, _LARGEST_REMARK)


_LENGTH = re.compile(r"[0-9]{1,18}", re.ASCII)
_IN_PATHS: Final = "/%!$&'()*+,;=:@"
_EXAMPLE: Final = "It reads like rest:https://host:8000/path/."


def _authorization(user: str, password: str) -> dict[str, str]:
    if not user and not password:
        return {}
    token = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {token}"}


def _failure(action: str, status: int, reason: str) -> StorageError:
    said = f"Cannot {action}: the server says {status} {reason}.".replace(" .", ".")
    if status == http.HTTPStatus.NOT_FOUND:
        return Missing(said)
    if status in _REFUSED:
        return Refused(said, _REFUSED[status])
    if status in _PASSING:
        return Temporary(said, "Look at the server's log.")
    return StorageError(said, "Look at the server's log.")


def _without_tunnel(action: str, refuses: ProxyRefuses) -> StorageError:
    """No answer of the server's, and so nothing that would mean one of its files."""
    said = f"Cannot {action}: {refuses}."
    if refuses.status in _PASSING:
        return Temporary(said, "See that the server can be reached from there.")
    if refuses.status == http.HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        return StorageError(said, _FOR_PROXY)
    return StorageError(said, "NO_PROXY names servers that are asked without it.")

# SPDX-License-Identifier: Apache-2.0
"""A repository behind a REST server (restic, doc/REST_backend.rst): `rest-server`, `rclone serve
restic`.

One connection a thread, kept as long as the server keeps it. Servers of the first version list names
alone; then each size is asked for.
"""

import base64
import errno
import http.client
import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Final
from urllib.parse import quote, unquote, urlsplit

from qmpbackup.errors import StorageError, UsageError
from qmpbackup.restic.storage.interface import (
    Buffer,
    File,
    Kind,
    Missing,
    Refused,
    Storage,
    Temporary,
    is_name,
)

_V2: Final = "application/vnd.x.restic.rest.v2"
_SECONDS: Final = 60.0
_LAST_SECONDS: Final = 10.0
"""How long a server may be silent once what it is asked for has been given up."""

_LARGEST_LISTING: Final = 1 << 30
_PASSING: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_REFUSED: Final = frozenset({401, 403, 405})


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
        self._trust = _trust(environment) if parts.scheme == "https" else None
        self._host, self._port = parts.hostname, port
        path = quote(parts.path, safe=_IN_PATHS)
        self._path = path if path.endswith("/") else f"{path}/"
        self._seconds = seconds
        user = unquote(parts.username or "") or environment.get("RESTIC_REST_USERNAME", "")
        password = unquote(parts.password or "") or environment.get("RESTIC_REST_PASSWORD", "")
        self._headers = _authorization(user, password)
        place = parts.netloc.rpartition("@")[2]
        masked = f"{quote(user)}:***@" if user else ""
        self._name = f"rest:{parts.scheme}://{masked}{place}{self._path}"
        self._local = threading.local()
        self._open: list[http.client.HTTPConnection] = []
        self._asking: set[http.client.HTTPConnection] = set()

    @property
    def name(self) -> str:
        """The location, without the password."""
        return self._name

    def create(self) -> None:
        """Have the server make the repository's folders."""
        self._ask("POST", "?create=true", "create the repository")

    def save(self, file: File, parts: Sequence[Buffer]) -> None:
        """Upload a file; servers that append only refuse one that is there already."""
        length = sum(len(part) for part in parts)
        if file.kind is Kind.CONFIG and self._length(file) is not None:
            return  # other servers would replace it
        headers = {"Content-Length": str(length), "Content-Type": "application/octet-stream"}
        try:
            self._ask("POST", str(file), f"write {file}", headers, parts)
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
        status, _, data = self._ask("GET", str(file), f"read {file}", headers)
        if headers and status == http.HTTPStatus.OK:  # the whole file, as ranges are optional
            data = data[offset:] if length is None else data[offset : offset + length]
        if length is not None and len(data) != length:
            raise StorageError(f"{file} at {self._name} is shorter than it should be.")
        return data

    def size(self, file: File) -> int:
        """Ask for a file's length."""
        _, headers, _ = self._ask("HEAD", str(file), f"look at {file}")
        try:
            return int(headers["Content-Length"] or "")
        except ValueError as error:
            raise StorageError(f"{self._name} does not tell the length of {file}.") from error

    def list(self, kind: Kind) -> Iterator[tuple[str, int]]:
        """Ask for names, and in one go for lengths where the server knows how."""
        path = f"{kind}/"
        _, headers, data = self._ask("GET", path, f"list {kind}", {"Accept": _V2})
        try:
            listed = json.loads(data) or []
            if headers.get("Content-Type") == _V2:
                found = [(each["name"], int(each["size"])) for each in listed]
            else:
                found = [(name, -1) for name in listed]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise StorageError(f"{self._name} does not list {kind} as it should.") from error
        for name, size in found:
            if isinstance(name, str) and is_name(name):
                try:
                    yield name, size if size >= 0 else self.size(File(kind, name))
                except Missing:
                    continue  # removed meanwhile

    def remove(self, file: File) -> None:
        """Have the server remove a file."""
        self._ask("DELETE", str(file), f"remove {file}")

    def give_up(self) -> None:
        """Break off what is under way; what is asked for from now on has little time."""
        self._seconds = min(self._seconds, _LAST_SECONDS)
        for connection in [*self._open]:
            sock: socket.socket | None = connection.sock
            if sock is not None:
                with suppress(OSError):
                    sock.settimeout(self._seconds)
                    if connection in self._asking:
                        # As TLS's own method of this name changes what another thread is using.
                        socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close all connections."""
        while self._open:
            self._open.pop().close()

    def _ask(
        self,
        method: str,
        path: str,
        action: str,
        headers: Mapping[str, str] | None = None,
        body: Sequence[Buffer] | None = None,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """One request; status, headers and body of an answer that is none of an error."""
        action = f"{action} at {self._name}"
        connection = self._connection()
        self._asking.add(connection)
        try:
            if connection.sock is None:
                connection.connect()
            # Giving up tells the connections that are there; one that was being made looks here.
            connection.sock.settimeout(self._seconds)
            sent = False
            with suppress(BrokenPipeError, ConnectionResetError):
                all_headers = {**self._headers, **(headers or {})}
                connection.request(method, self._path + path, body=body, headers=all_headers)
                sent = True
            # A server may say no, and hang up, before it has read all that is sent.
            with connection.getresponse() as answer:
                data = answer.read(_LARGEST_LISTING)
                if answer.length:  # with a bound, read(…) does not mind an end that comes early
                    raise http.client.IncompleteRead(data, answer.length)
                if not sent and answer.status < http.HTTPStatus.BAD_REQUEST:
                    raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        except ssl.SSLCertVerificationError as error:
            self._drop()
            raise StorageError(
                f"Cannot {action}: its certificate is not trusted ({error.verify_message}).",
                "RESTIC_CACERT names a file with the certificate to trust.",
            ) from error
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            self._drop()
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise Temporary(
                f"Cannot {action}: {why}.", "See that the server can be reached."
            ) from (error)
        finally:
            self._asking.discard(connection)
        if not http.HTTPStatus.OK <= answer.status < http.HTTPStatus.MULTIPLE_CHOICES:
            self._drop()
            raise _failure(action, answer.status, answer.reason)
        return answer.status, answer.headers, data

    def _connection(self) -> http.client.HTTPConnection:
        found: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if found is None:
            found = self._connect()
            self._local.connection = found
            self._open.append(found)
        return found

    def _connect(self) -> http.client.HTTPConnection:
        if self._trust is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=self._seconds)
        return http.client.HTTPSConnection(
            self._host, self._port, timeout=self._seconds, context=self._trust
        )

    def _drop(self) -> None:
        """Begin the next request of this thread on a new connection."""
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None
            with suppress(ValueError):
                self._open.remove(connection)


_IN_PATHS: Final = "/%!$&'()*+,;=:@"
_EXAMPLE: Final = "It reads like rest:https://host:8000/path/."


def _trust(environment: Mapping[str, str]) -> ssl.SSLContext:
    """The certificates of the machine, or in their place the ones of `RESTIC_CACERT`."""
    file = environment.get("RESTIC_CACERT") or None
    try:
        return ssl.create_default_context(cafile=file)
    except OSError as error:
        why = error.strerror or str(error)
        raise UsageError(
            f"RESTIC_CACERT: {file} cannot be used: {why}.", "Name a PEM file."
        ) from error


def _authorization(user: str, password: str) -> dict[str, str]:
    if not user and not password:
        return {}
    token = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {token}"}


def _failure(action: str, status: int, reason: str) -> StorageError:
    said = f"Cannot {action}: the server says {status} {reason}.".replace(" .", ".")
    if status == http.HTTPStatus.NOT_FOUND:
        return Missing(said)
    if status == http.HTTPStatus.UNAUTHORIZED:
        return Refused(said, "Check RESTIC_REST_USERNAME and RESTIC_REST_PASSWORD.")
    if status in _REFUSED:
        return Refused(said, "The server may only take new files (append-only), or only be read.")
    if status in _PASSING:
        return Temporary(said, "Look at the server's log.")
    return StorageError(said, "Look at the server's log.")

# SPDX-License-Identifier: Apache-2.0
"""Servers of repositories that know no measure: what a folder holds, and more than anybody asked for.

One handler speaks both protocols, restic's own and as much of S3's as is needed to read.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, urlsplit

from lab.servers import BUCKET
from lab.serving import serving

How = Literal[
    "nothing",
    "more than said",
    "more than said, in chunks",
    "endless lists",
    "endless lists of empty values",
    "endless space",
    "endless names",
    "endless pages",
    "endless empty pages",
    "endless refusals",
    "impossible sizes",
]

_MIB = 1 << 20
_ENDLESS = 1 << 34
"""Bytes after which even an endless answer ends, so that a fault does not fill a machine for ever."""

_V2 = "application/vnd.x.restic.rest.v2"


@contextmanager
def hostile(folder: Path, kind: str, how: How) -> Iterator[str]:
    """A server with the repository in a folder that misbehaves at files of one kind; its address."""

    class Handler(_Handler):
        """One connection."""

    Handler.folder, Handler.kind, Handler.how = folder, kind, how
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as port:
        yield f"http://127.0.0.1:{port}"


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    kind: str
    how: How
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        with suppress(OSError):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            address = urlsplit(self.path)
            query = parse_qs(address.query)
            path = address.path.strip("/").removeprefix(BUCKET).strip("/")
            prefix = query.get("prefix", [""])[0].strip("/")
            kind = (path or prefix).partition("/")[0]
            hostile = kind == self.kind
            if hostile and self.how == "endless refusals":
                # Not by its length: obstore reserves what is said, and ends the process where it
                # gets no memory for it, which no caller can help.
                self._answer(403, [b"x" * _MIB], forever=True, chunked=True)
            elif prefix:
                self._s3_list(kind, hostile=hostile)
            elif address.path.endswith("/") and kind:
                self._rest_list(kind, hostile=hostile)
            else:
                self._file(path, hostile=hostile)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle  # noqa: N815 - called so by the base

    def _file(self, path: str, *, hostile: bool) -> None:
        file = self.folder / path
        if not file.is_file():  # S3 knows no folders below data
            file = self.folder / "data" / file.name[:2] / file.name
        if self.command in {"PUT", "POST", "DELETE"} or not file.is_file():
            self._answer(404 if self.command == "GET" else 403, [])
            return
        data = file.read_bytes()
        first, last = 0, len(data) - 1
        asked = self.headers.get("Range", "")
        if asked:
            first, last = (int(each) for each in asked.removeprefix("bytes=").split("-"))
        headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}"} if asked else {}
        headers |= {"Last-Modified": "Wed, 25 Nov 2026 00:00:00 GMT", "ETag": '"x"'}
        part = [data[first : last + 1]]
        if hostile and self.how.startswith("more than said") and self.command == "GET":
            chunked = self.how.endswith("chunks")
            more = itertools.chain(part, itertools.repeat(b"y" * _MIB))
            self._answer(206 if asked else 200, more, headers, forever=True, chunked=chunked)
        else:
            self._answer(206 if asked else 200, part, headers)

    def _names(self, kind: str) -> list[tuple[str, int]]:
        folder = self.folder / kind
        files = [each for each in folder.rglob("*") if each.is_file()]
        return [(each.name, each.stat().st_size) for each in files]

    def _rest_list(self, kind: str, *, hostile: bool) -> None:
        headers = {"Content-Type": _V2}
        if not hostile or "said" in self.how or self.how == "nothing":
            entries = [{"name": name, "size": size} for name, size in self._names(kind)]
            self._answer(200, [json.dumps(entries).encode()], headers)
            return
        pieces: Iterable[bytes] = {
            "endless lists of empty values": itertools.repeat(b"[]," * 100_000),
            "endless space": itertools.repeat(b" " * _MIB),
            "endless names": itertools.repeat(b"x" * _MIB),
            "impossible sizes": [b'{"name": "%b", "size": 1e999}]' % (b"0" * 64)],
        }.get(self.how, _entries())
        start = b'[{"name": "' if self.how == "endless names" else b"["
        endless = self.how != "impossible sizes"
        self._answer(
            200, itertools.chain([start], pieces), headers, forever=endless, chunked=endless
        )

    def _s3_list(self, kind: str, *, hostile: bool) -> None:
        start = b'<?xml version="1.0"?><ListBucketResult><Name>bucket</Name>'
        if not hostile or "said" in self.how or self.how == "nothing":
            found = b"".join(_content(kind, name, size) for name, size in self._names(kind))
            body = [start + found + b"<IsTruncated>false</IsTruncated></ListBucketResult>"]
            self._answer(200, body)
            return
        if "pages" in self.how:
            names = [] if "empty" in self.how else [_name(number) for number in range(1000)]
            found = b"".join(_content(kind, name, 1) for name in names)
            more = (
                b"<IsTruncated>true</IsTruncated><NextContinuationToken>x</NextContinuationToken>"
            )
            self._answer(200, [start + found + more + b"</ListBucketResult>"])
            return
        pieces: Iterable[bytes] = {
            "endless space": itertools.repeat(b" " * _MIB),
            "endless names": itertools.repeat(b"x" * _MIB),
            "impossible sizes": [
                _content(kind, "0" * 64, 1 << 64), b"<IsTruncated>false</IsTruncated>",
                b"</ListBucketResult>",
            ],
        }.get(self.how, itertools.repeat(_content(kind, "0" * 64, 1) * 1000))  # fmt: skip
        endless = self.how != "impossible sizes"
        self._answer(200, itertools.chain([start], pieces), forever=endless, chunked=endless)

    def _answer(
        self,
        status: int,
        pieces: Iterable[bytes],
        headers: dict[str, str] | None = None,
        *,
        forever: bool = False,
        chunked: bool = False,
    ) -> None:
        self.send_response_only(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        body = pieces if forever else [b"".join(pieces)]
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            size = _ENDLESS if forever else sum(map(len, body))
            self.send_header("Content-Length", str(size))
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = 0
        for piece in body if not forever else itertools.cycle(body):
            framed = b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece
            self.wfile.write(framed)
            sent += len(piece)
            if sent > _ENDLESS:
                break

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - of the base
        """Nothing is printed."""


def _name(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def _entries() -> Iterator[bytes]:
    """Files for ever, none of them named twice."""
    for start in itertools.count(0, 1000):
        names = map(_name, range(start, start + 1000))
        yield b"".join(b'{"name":"%b","size":400},' % name.encode() for name in names)


def _content(kind: str, name: str, size: int) -> bytes:
    path = f"{kind}/{name[:2]}/{name}" if kind == "data" else f"{kind}/{name}"
    return (
        f"<Contents><Key>{path}</Key><LastModified>2026-11-25T00:00:00.000Z</LastModified>"
        f'<ETag>"x"</ETag><Size>{size}</Size></Contents>'
    ).encode()

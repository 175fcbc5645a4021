# SPDX-License-Identifier: Apache-2.0
"""A man in the middle of HTTP: every request to a storage is seen, and things happen between.

Stands before a server on loopback and passes requests on. A hook is asked at each request what shall
become of it, so that a test can have any of them fail in any way, or kill whoever sent it.
"""

import http.client
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, Self
from urllib.parse import urlsplit

from lab.patience import PATIENCE
from lab.serving import serving

Fate = Literal["pass", "503", "500", "403", "cut", "lose the answer", "cut the answer", "stall"]
"""What becomes of a request: passed on; refused with a status; its connection closed before anything
is passed on, after it was carried out, or in the middle of the answer; or no answer, ever."""

_OWN = {"connection", "keep-alive", "transfer-encoding", "date", "server"}


@dataclass(frozen=True)
class Request:
    """A request: its number (from 0), and whether it is about to be passed on or has been."""

    number: int
    when: Literal["before", "after"]
    method: str
    path: str

    @property
    def stores(self) -> bool:
        """Whether it puts a file there."""
        return self.method in {"POST", "PUT"}


Hook = Callable[[Request], Fate]


class HttpProxy:
    """Stands before the server at `upstream`, a URL; `url` is its own. A context manager.

    `hook` is called before each request is passed on, and after it was carried out; in threads of
    the proxy. `log` holds the requests so far.
    """

    def __init__(self, upstream: str, hook: Hook | None = None) -> None:
        self._address = urlsplit(upstream).netloc
        self._lock = threading.Lock()
        self.hook: Hook = hook or (lambda _request: "pass")
        self.log: list[Request] = []
        self.over = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._serving = serving(self._server)

    @property
    def url(self) -> str:
        """Where it stands."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._serving.__enter__()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.over.set()
        self._serving.__exit__(None, None, None)

    def _seen(self, method: str, path: str) -> Request:
        with self._lock:
            request = Request(len(self.log), "before", method, path)
            self.log.append(request)
            return request

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(_Handler):
            """One connection of this proxy."""

            of = proxy

        return Handler


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    of: HttpProxy
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = self.of._seen(self.command, self.path)
        if not self._survives(self.of.hook(request)):
            return
        status, headers, answer = self._passed_on(body)
        fate = self.of.hook(Request(request.number, "after", request.method, request.path))
        half = fate == "cut the answer"
        if not half and not self._survives(fate):
            return
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD" and not any(
            name.lower() == "content-length" for name, _ in headers
        ):
            self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer[: len(answer) // 2] if half else answer)
        self.close_connection = self.close_connection or half

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle  # noqa: N815 - called so by the base

    def _survives(self, fate: Fate) -> bool:
        if fate == "pass":
            return True
        if fate == "stall":
            self.of.over.wait()
        if fate.isdigit():
            self.send_response_only(int(fate))
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.close_connection = True
        return False

    def _passed_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.of._address, timeout=PATIENCE)
        try:
            headers = {
                name: value for name, value in self.headers.items() if name.lower() not in _OWN
            }
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
            kept = [each for each in answer.getheaders() if each[0].lower() not in _OWN]
            return answer.status, kept, data
        finally:
            connection.close()

    def handle(self) -> None:
        """Clients that are killed leave in the middle of anything."""
        try:
            super().handle()
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - of the base
        """Nothing is printed."""

# SPDX-License-Identifier: Apache-2.0
"""A forward proxy on loopback, as `HTTP_PROXY` and `HTTPS_PROXY` name one: it makes tunnels, and asks
for whole addresses. Names lead where the test says, so that a server on loopback has one, too."""

import http.client
import select
import socket
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit

from lab.patience import PATIENCE
from lab.serving import serving

_OWN = {"connection", "keep-alive", "transfer-encoding", "proxy-authorization", "date", "server"}


class ForwardProxy:
    """A context manager. `routes` tells for `host:port` where that is; `log` holds what was asked for;
    `authorization` is the header without which it lets nobody through."""

    def __init__(self, routes: Mapping[str, tuple[str, int]], authorization: str = "") -> None:
        self.routes = routes
        self.authorization = authorization
        self.log: list[str] = []
        proxy = self

        class Handler(_Handler):
            """One connection of this proxy."""

            of = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._serving = serving(self._server)

    @property
    def place(self) -> str:
        """Its address and port."""
        return f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._serving.__enter__()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._serving.__exit__(None, None, None)


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    of: ForwardProxy
    protocol_version = "HTTP/1.1"

    def _upstream(self, netloc: str) -> tuple[str, int] | None:
        """Where the client wants to, if it may; else it has been told."""
        self.of.log.append(f"{self.command} {netloc}")
        if self.headers.get("Proxy-Authorization", "") != self.of.authorization:
            self.send_error(407)
        elif netloc not in self.of.routes:
            self.send_error(502)
        else:
            return self.of.routes[netloc]
        self.close_connection = True
        return None

    def do_CONNECT(self) -> None:
        place = self._upstream(self.path)
        if place is None:
            return
        with socket.create_connection(place, PATIENCE) as server:
            self.send_response_only(200)
            self.end_headers()
            ends = {self.connection: server, server: self.connection}
            while True:
                ready, _, _ = select.select([*ends], [], [])
                for end in ready:
                    data = end.recv(65536)
                    if not data:
                        self.close_connection = True
                        return
                    ends[end].sendall(data)

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        place = self._upstream(parts.netloc)
        if place is None:
            return
        connection = http.client.HTTPConnection(*place, timeout=PATIENCE)
        kept = {name: value for name, value in self.headers.items() if name.lower() not in _OWN}
        where = f"{parts.path}?{parts.query}" if parts.query else parts.path
        connection.request(self.command, where, body, kept)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in {*_OWN, "content-length"}:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle  # noqa: N815 - called so by the base

    def handle(self) -> None:
        """Clients leave in the middle of anything."""
        try:
            super().handle()
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - of the base
        """Nothing is printed."""

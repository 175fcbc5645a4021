# SPDX-License-Identifier: Apache-2.0
"""Connections to a server over HTTP: through a proxy that is asked for whole addresses, and through the
tunnel that one makes."""

import http.client
import socket
import ssl
from typing import Final

from qmpbackup.restic.storage.proxies import Proxy

_LONGEST: Final = 100


class ProxyRefuses(Exception):
    """The proxy makes no tunnel."""

    def __init__(self, proxy: Proxy, status: int, reason: str) -> None:
        self.status = status
        super().__init__(f"the proxy {proxy.name} says {status} {reason[:_LONGEST]}".rstrip(". "))


class ByProxy(http.client.HTTPConnection):
    """To a server that a proxy asks in its own name."""

    def __init__(self, host: str, port: int, proxy: Proxy, seconds: float) -> None:
        super().__init__(host, port, timeout=seconds)
        self._proxy, self._seconds = proxy, seconds

    def connect(self) -> None:
        """Connect to the proxy."""
        self.sock = _to(self._proxy, self._seconds)


class Tunnelled(http.client.HTTPSConnection):
    """To a server behind TLS, through a tunnel: the proxy sees nothing but the server's name."""

    def __init__(
        self, host: str, port: int, proxy: Proxy, seconds: float, trust: ssl.SSLContext
    ) -> None:
        super().__init__(host, port, timeout=seconds, context=trust)
        self._proxy, self._seconds, self._trust = proxy, seconds, trust

    def connect(self) -> None:
        """Connect to the proxy, have it connect to the server, and see that it is the right one."""
        way = _to(self._proxy, self._seconds)
        try:
            self._dig(way)
            self.sock = self._trust.wrap_socket(way, server_hostname=self.host)
        except BaseException:
            way.close()
            raise

    def _dig(self, way: socket.socket) -> None:
        """`http.client` would do it, but leaves the answer open where that says no."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        headers = {"Host": f"{host}:{self.port}", **self._proxy.headers}
        lines = [f"CONNECT {host}:{self.port} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        way.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
        with http.client.HTTPResponse(way, method="CONNECT") as answer:
            answer.begin()
            if answer.status != http.HTTPStatus.OK:
                raise ProxyRefuses(self._proxy, answer.status, answer.reason)


def _to(proxy: Proxy, seconds: float) -> socket.socket:
    """Failures name the proxy, as it stands in no location."""
    try:
        way = socket.create_connection((proxy.host, proxy.port), seconds)
    except OSError as error:
        why = error.strerror or str(error) or type(error).__name__
        raise OSError(error.errno, f"the proxy {proxy.name} cannot be reached: {why}") from error
    way.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return way

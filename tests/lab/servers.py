# SPDX-License-Identifier: Apache-2.0
"""Servers of repositories on loopback: moto's S3, and one that answers what a test wants.

`lab.rest_server` has the one of rclone, `lab.http_proxy` the man in the middle.
"""

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from moto.server import ThreadedMotoServer

KEYS = {
    "AWS_ACCESS_KEY_ID": "id-of-a-key",
    "AWS_SECRET_ACCESS_KEY": "secret-of-a-key",
    "AWS_DEFAULT_REGION": "us-east-1",
}
"""What moto, which lets everybody in, is told."""

BUCKET = "bucket"


@contextmanager
def s3_server() -> Iterator[str]:
    """An object store with an empty bucket `BUCKET`; its URL."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        connection = http.client.HTTPConnection(host, port, timeout=60)
        # All servers of a process have one memory.
        for method, path in (("POST", "/moto-api/reset"), ("PUT", f"/{BUCKET}")):
            connection.request(method, path)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == http.HTTPStatus.OK
        connection.close()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextmanager
def answering(status: int, body: bytes = b"", *, reads: bool = True) -> Iterator[str]:
    """A server with one answer to everything, which may come before it `reads`; its URL."""

    class Handler(BaseHTTPRequestHandler):
        """One connection."""

        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            if reads:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response_only(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
            self.close_connection = not reads

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle  # noqa: N815 - called so

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - of the base
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="http server")
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(30)

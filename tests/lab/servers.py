# SPDX-License-Identifier: Apache-2.0
"""Servers of repositories on loopback: moto's S3, and one that answers what a test wants.

`lab.rest_server` has the one of rclone, `lab.http_proxy` the man in the middle.
"""

import http.client
import ipaddress
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from moto.server import ThreadedMotoServer

from lab.patience import PATIENCE
from lab.serving import serving

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
        connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
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
def answering(
    status: int, body: bytes = b"", *, reads: bool = True, certificate: Path | None = None
) -> Iterator[str]:
    """A server with one answer to everything, which may come before it `reads`; its URL.

    With a `certificate` (a PEM file that holds its key, too) it speaks TLS.
    """

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
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    with serving(server) as port:
        yield f"http{'s' if certificate else ''}://127.0.0.1:{port}"


def certificate(path: Path, name_of_server: str = "test") -> Path:
    """A PEM file with a new key and a certificate for loopback, and for a name, that it has signed
    itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, path.stem)])
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([address, x509.DNSName(name_of_server)]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path

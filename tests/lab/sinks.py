# SPDX-License-Identifier: Apache-2.0
"""Servers on loopback that take messages and keep them: of mail, and of HTTP.

Each serves in threads of its own and is over with its block.
"""

import socketserver
import ssl
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from lab.serving import serving


@dataclass
class Mailbox:
    """A mail server at `address`; `greeting` is what it says first. `logins` are the names and passwords
    that it was told."""

    address: str = ""
    greeting: str = "220 sink"
    mails: list[EmailMessage] = field(default_factory=list)
    recipients: list[str] = field(default_factory=list)
    logins: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def mail_server(greeting: str = "220 sink", certificate: Path | None = None) -> Iterator[Mailbox]:
    """A mail server that takes all; with a `certificate` (a PEM file that holds its key, too) it speaks TLS
    when it is asked to, and takes nothing before."""

    class Handler(_MailHandler):
        """One connection."""

    Handler.box, Handler.certificate = Mailbox(greeting=greeting), certificate
    with serving(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)) as port:
        Handler.box.address = f"127.0.0.1:{port}"
        yield Handler.box


class _MailHandler(socketserver.StreamRequestHandler):
    box: Mailbox
    certificate: Path | None = None

    def handle(self) -> None:
        self._say(self.box.greeting)
        if self.certificate is None:
            self._serve("250 sink")
        elif self._wants_tls():
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            with (
                suppress(OSError),  # a client that does not trust us
                context.wrap_socket(self.connection, server_side=True) as secured,
                secured.makefile("rb") as self.rfile,
                secured.makefile("wb") as self.wfile,
            ):
                self._serve("250-sink\r\n250 AUTH PLAIN")

    def _wants_tls(self) -> bool:
        while line := self.rfile.readline():
            if line.strip().upper() == b"STARTTLS":
                self._say("220 go on")
                return True
            is_hello = line.upper().startswith(b"EHLO")
            self._say("250-sink\r\n250 STARTTLS" if is_hello else "530 STARTTLS first")
        return False

    def _serve(self, hello: str) -> None:
        while line := self.rfile.readline():
            verb = line.split(b":")[0].split()[0].upper() if line.strip() else b""
            match verb:
                case b"EHLO":
                    self._say(hello)
                    continue
                case b"AUTH":
                    _, user, password = b64decode(line.split()[-1]).decode().split("\0")
                    self.box.logins.append((user, password))
                    self._say("235 ok")
                    continue
                case b"RCPT":
                    self.box.recipients.append(line.decode().split(":", 1)[1].strip(" <>\r\n"))
                case b"DATA":
                    self._say("354 go on")
                    self._take()
                case b"QUIT":
                    self._say("221 bye")
                    return
            self._say("250 ok")

    def _say(self, text: str) -> None:
        self.wfile.write(text.encode() + b"\r\n")
        self.wfile.flush()

    def _take(self) -> None:
        lines = []
        while (line := self.rfile.readline()) != b".\r\n":
            lines.append(line.removeprefix(b".") if line.startswith(b"..") else line)
        mail = message_from_bytes(b"".join(lines), policy=policy.default)
        assert isinstance(mail, EmailMessage)
        self.box.mails.append(mail)


@dataclass(frozen=True)
class Asked:
    """A request that came in."""

    path: str
    body: bytes
    headers: dict[str, str]


@dataclass
class Web:
    """A web server at `url`, which answers all with `status`."""

    url: str = ""
    status: int = 200
    asked: list[Asked] = field(default_factory=list)

    @property
    def paths(self) -> list[str]:
        """The paths that were asked for."""
        return [each.path for each in self.asked]


@contextmanager
def web_server(status: int = 200) -> Iterator[Web]:
    """A web server that takes all that is posted."""
    web = Web(status=status)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            web.asked.append(Asked(self.path, body, dict(self.headers.items())))
            self.send_response(web.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST  # noqa: N815 - the library's name

        def log_message(self, *_arguments: object) -> None:
            """Say nothing."""

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as port:
        web.url = f"http://127.0.0.1:{port}"
        yield web

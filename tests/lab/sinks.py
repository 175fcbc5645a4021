# SPDX-License-Identifier: Apache-2.0
"""Servers on loopback that take messages and keep them: of mail, and of HTTP.

Each serves in threads of its own and is over with its block.
"""

import socketserver
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from lab.serving import serving


@dataclass
class Mailbox:
    """A mail server at `address`; `greeting` is what it says first."""

    address: str = ""
    greeting: str = "220 sink"
    mails: list[EmailMessage] = field(default_factory=list)
    recipients: list[str] = field(default_factory=list)


@contextmanager
def mail_server(greeting: str = "220 sink") -> Iterator[Mailbox]:
    """A mail server that takes all."""
    box = Mailbox(greeting=greeting)

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self._say(box.greeting)
            while line := self.rfile.readline():
                verb = line.split(b":")[0].split()[0].upper() if line.strip() else b""
                if verb == b"RCPT":
                    box.recipients.append(line.decode().split(":", 1)[1].strip(" <>\r\n"))
                if verb == b"DATA":
                    self._say("354 go on")
                    self._take()
                self._say("221 bye" if verb == b"QUIT" else "250 ok")
                if verb == b"QUIT":
                    return

        def _say(self, text: str) -> None:
            self.wfile.write(text.encode() + b"\r\n")

        def _take(self) -> None:
            lines = []
            while (line := self.rfile.readline()) != b".\r\n":
                lines.append(line.removeprefix(b".") if line.startswith(b"..") else line)
            mail = message_from_bytes(b"".join(lines), policy=policy.default)
            assert isinstance(mail, EmailMessage)
            box.mails.append(mail)

    with serving(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)) as port:
        box.address = f"127.0.0.1:{port}"
        yield box


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

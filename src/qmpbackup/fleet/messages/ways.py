# SPDX-License-Identifier: Apache-2.0
"""How a message leaves: by mail, HTTP, or a command; within a bound of time, whatever answers.

An address may itself be a secret (healthchecks, webhooks), so no error names one. Must not know what
messages say, nor whether they are news.
"""

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from email.message import EmailMessage
from typing import Final

from qmpbackup import process
from qmpbackup.errors import QmpBackupError, UsageError
from qmpbackup.fleet.messages.notices import Message
from qmpbackup.fleet.settings import NotifySettings, NotifyType, Secret

Reveal = Callable[[Secret], str]

_SENDMAIL: Final = ("/usr/sbin/sendmail", "-i", "-t")
_LONGEST_BODY: Final = 10_000
_SLACK: Final = 2.0
"""How much longer than its timeout a way may take in all, whose parts each keep to it."""


def send(way: NotifySettings, message: Message, reveal: Reveal) -> None:
    """Send a message.

    Raises:
        QmpBackupError: it did not arrive, as far as we know.
    """
    _within(way.timeout * _SLACK, lambda: _WAYS[way.type](way, message, reveal))


def start(way: NotifySettings, reveal: Reveal) -> None:
    """Tell a service that waits for pings that a run begins.

    Raises:
        QmpBackupError: it did not arrive.
    """
    _within(way.timeout * _SLACK, lambda: _post(way, _url(way, reveal) + "/start", b"", {}))


def _within(seconds: float, do: Callable[[], None]) -> None:
    """Do something in a thread that nobody waits for longer than a while.

    Raises:
        QmpBackupError: it failed, or took longer.
    """
    errors: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            do()
        except BaseException as error:  # noqa: BLE001 - said by whoever waits
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=work, name="message", daemon=True).start()
    if not done.wait(seconds):
        raise QmpBackupError(f"It was not sent within {seconds:.0f} s.")
    if not errors:
        return
    if isinstance(errors[0], QmpBackupError):
        raise errors[0]
    if isinstance(errors[0], OSError):
        raise QmpBackupError(f"{_why(errors[0])}.") from None
    raise QmpBackupError(f"It cannot be sent: {type(errors[0]).__name__}.") from None


def _why(error: OSError) -> str:
    """What went wrong, without the address."""
    import smtplib
    from urllib.error import URLError

    match error:
        case URLError() if isinstance(error.reason, OSError):
            return _why(error.reason)
        case smtplib.SMTPResponseException():
            return f"The mail server says {error.smtp_code}"
        case smtplib.SMTPException():
            return f"The mail server refuses it ({type(error).__name__})"
        case TimeoutError():
            return "Nobody answered in time"
    return error.strerror or type(error).__name__


# Mail


def _mail(way: NotifySettings, message: Message, reveal: Reveal) -> None:
    mail = EmailMessage()
    mail["Subject"] = _line(message.title)
    mail["From"] = way.sender or f"qmpbackup <root@{message.host}>"
    mail["To"] = ", ".join(way.to)
    mail["Auto-Submitted"] = "auto-generated"
    mail.set_content(message.text)
    if not way.smtp:
        _run(_SENDMAIL, mail.as_bytes(), way.timeout, {})
        return
    import smtplib
    import ssl

    host, _, port = way.smtp.rpartition(":") if ":" in way.smtp else (way.smtp, "", "25")
    is_tls = port == "465"
    context = ssl.create_default_context()
    with (
        smtplib.SMTP_SSL(host, int(port), timeout=way.timeout, context=context)
        if is_tls
        else smtplib.SMTP(host, int(port), timeout=way.timeout)
    ) as server:
        server.ehlo()
        if not is_tls and server.has_extn("starttls"):
            server.starttls(context=context)
            server.ehlo()
        elif way.user and not is_tls:
            raise QmpBackupError(
                "The mail server offers no encryption, so the password is not sent to it.",
                "Use port 465, or a server with STARTTLS.",
            )
        if way.user:
            server.login(way.user, reveal(way.password) if way.password else "")
        server.send_message(mail)


def _line(text: str) -> str:
    return " ".join(text.split())


# HTTP


def _url(way: NotifySettings, reveal: Reveal) -> str:
    url = reveal(way.url) if isinstance(way.url, Secret) else way.url
    if not url.startswith(("http://", "https://")):
        raise UsageError("Its url is none that begins with https:// or http://.")
    return url.rstrip("/")


def _webhook(way: NotifySettings, message: Message, reveal: Reveal) -> None:
    headers = {"Content-Type": "application/json"}
    _post(way, _url(way, reveal), document(message), {**headers, **_authorized(way, reveal)})


def _ntfy(way: NotifySettings, message: Message, reveal: Reveal) -> None:
    headers = {
        "Title": _header(_line(message.title)),
        "Priority": "high" if message.news else "default",
        "Tags": "warning" if message.news else "white_check_mark",
    }
    body = message.text.encode()[:_LONGEST_BODY]
    _post(way, _url(way, reveal), body, {**headers, **_authorized(way, reveal)})


def _header(text: str) -> str:
    """Text as a header carries it."""
    from email.header import Header

    return text if text.isascii() else Header(text, "utf-8", maxlinelen=10_000).encode()


def _healthchecks(way: NotifySettings, message: Message, reveal: Reveal) -> None:
    """Its own word is the exit code: 0 where nothing is wrong that this way is told of."""
    code = message.exit_code if message.exit_code not in {0, 3} else int(bool(message.news))
    url = f"{_url(way, reveal)}/{code if 0 <= code <= 255 else 255}"
    _post(way, url, message.text.encode()[:_LONGEST_BODY], {})


def _authorized(way: NotifySettings, reveal: Reveal) -> dict[str, str]:
    return {"Authorization": f"Bearer {reveal(way.token)}"} if way.token else {}


def _post(way: NotifySettings, url: str, body: bytes, headers: Mapping[str, str]) -> None:
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    request = Request(url, body, {"User-Agent": "qmpbackup", **headers})  # noqa: S310 - see `_url`
    try:
        with urlopen(request, timeout=way.timeout):  # noqa: S310
            pass
    except HTTPError as error:
        error.close()
        raise QmpBackupError(f"The server says {error.code}.") from None


# Programs


def document(message: Message) -> bytes:
    """A message as JSON, for webhooks and commands."""
    notices = [
        {
            "event": each.event.value,
            "subject": each.subject,
            "sentence": each.sentence,
            "since": each.since.isoformat() if each.since else None,
            "severity": each.severity.value,
        }
        for each in message.news
    ]
    return json.dumps(
        {
            "schema": 1,
            "type": "message",
            "host": message.host,
            "title": message.title,
            "text": message.text,
            "notices": notices,
            "recovered": list(message.recovered),
            "exit_code": message.exit_code,
        }
    ).encode()


def _command(way: NotifySettings, message: Message, reveal: Reveal) -> None:
    del reveal
    told = {"QMPBACKUP_TITLE": message.title, "QMPBACKUP_EXIT": str(message.exit_code)}
    _run(way.command, document(message), way.timeout, told)


def _run(
    arguments: Sequence[str], given: bytes, timeout: float, environment: Mapping[str, str]
) -> None:
    fd = os.memfd_create("message", os.MFD_CLOEXEC)
    try:
        os.write(fd, given)
        os.lseek(fd, 0, os.SEEK_SET)
        done = process.run(arguments, environment=environment, timeout=timeout, given=fd)
    finally:
        os.close(fd)
    if done.code:
        raise QmpBackupError(f"{done.program} ended with code {done.code}.")


_TALKATIVE: Final = ("apprise", "urllib3.connectionpool", "requests")
"""Loggers of what Apprise brings, which name addresses, in which its passwords and tokens are."""


def _apprise(way: NotifySettings, message: Message, reveal: Reveal) -> None:
    from importlib import import_module

    try:
        sender = import_module("apprise").Apprise()
    except ImportError:
        raise UsageError(
            "Apprise is not installed.", "Install the extra: pip install 'qmpbackup[apprise]'."
        ) from None
    for name in _TALKATIVE:
        logging.getLogger(name).disabled = True
    url = reveal(way.url) if isinstance(way.url, Secret) else way.url
    for each in filter(None, (url, *way.to)):
        if not sender.add(each):
            raise UsageError("Apprise knows no such address.")
    if not sender.notify(body=message.text, title=message.title):
        raise QmpBackupError("Apprise could not deliver it.")


_WAYS: Final[Mapping[NotifyType, Callable[[NotifySettings, Message, Reveal], None]]] = {
    NotifyType.MAIL: _mail,
    NotifyType.WEBHOOK: _webhook,
    NotifyType.NTFY: _ntfy,
    NotifyType.HEALTHCHECKS: _healthchecks,
    NotifyType.COMMAND: _command,
    NotifyType.APPRISE: _apprise,
}

# SPDX-License-Identifier: Apache-2.0
"""Where things are: sockets, folders, targets, web servers, and variables for access to them.

Functions take a value as TOML gave it, and raise UsageError for what is none. None says a password.
"""

import re
from typing import Final
from urllib.parse import urlsplit

from qmpbackup.errors import UsageError
from qmpbackup.fleet.config import kinds
from qmpbackup.fleet.config.shapes import text_of
from qmpbackup.fleet.config.sockets import SocketPattern
from qmpbackup.model import Location
from qmpbackup.targets import opening

_SECRET_NAME: Final = re.compile(
    r"SECRET|PASSWORD|PASSWD|TOKEN|CREDENTIAL|SAS$|KEY$", re.IGNORECASE
)
_NO_SECRET: Final = re.compile(r"_(?:FILE|COMMAND)$|KEY_ID$", re.IGNORECASE)
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def location(value: object) -> str:
    text = text_of(value)
    if not text:
        raise UsageError("This is empty: a folder, or restic: and where a repository lies.")
    if has_password(text):
        raise UsageError(
            "A password stands in the location; give it to `environment`, as "
            'RESTIC_REST_PASSWORD = { credential = "…" }.'
        )
    if not isinstance(opening.place(text), Location) and not text.startswith("/"):
        raise UsageError("A folder must begin with a slash; a repository begins with restic:.")
    return kinds.with_names(text)


def has_password(text: str) -> bool:
    """Whether an address has a password in front of its host."""
    _, mark, rest = text.partition("://")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    return bool(mark and at and ":" in user)


def address(value: object) -> str:
    """The address of a monitor or an agent."""
    text = text_of(value)
    if text and not text.startswith(("/", "tcp:")):
        raise UsageError("A socket begins with a slash, or is tcp:HOST:PORT.")
    return text


def url(value: object) -> str:
    text = text_of(value)
    try:
        parts = urlsplit(text)
        usable = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        usable = None
    if text and not usable:
        raise UsageError("This is no address of a web server; it begins with https:// or http://.")
    if has_password(text):
        raise UsageError("A password stands in the address; use a secret for all of it.")
    return text


def wrong_variable(name: str, value: object) -> str:
    if not _VARIABLE.fullmatch(name):
        return "This cannot be the name of a variable."
    if name in {"RESTIC_PASSWORD", "RESTIC_PASSWORD_FILE", "RESTIC_PASSWORD_COMMAND"}:
        return "The password of a repository belongs to `password`."
    if isinstance(value, str) and _SECRET_NAME.search(name) and not _NO_SECRET.search(name):
        credential = name.lower().replace("_", "-")
        return f'A secret stands in the file; use {{ credential = "{credential}" }}.'
    return ""


def folder(value: object) -> str:
    return kinds.absolute(value) if value else text_of(value)


def agent(value: object) -> str:
    return kinds.with_names(address(value))


def scratch(value: object) -> str:
    return kinds.with_names(folder(value))


def sockets_of(value: object) -> str:
    return str(SocketPattern.parse(kinds.absolute(value)))

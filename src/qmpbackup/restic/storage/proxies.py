# SPDX-License-Identifier: Apache-2.0
"""Which proxy stands between us and a server: `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY`, read as Go
reads them (golang.org/x/net/http/httpproxy), so that restic and we take the same way.

Pure. Servers on this machine never have one between.
"""

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

from qmpbackup.errors import UsageError

_PORT: Final = 80
_EXAMPLE: Final = "It reads like http://proxy.example.org:3128."

Address = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy that is spoken to in plain HTTP, as nearly all are; `name` holds no password."""

    host: str
    port: int
    name: str
    headers: Mapping[str, str]


def proxy_for(scheme: str, host: str, port: int, environment: Mapping[str, str]) -> Proxy | None:
    """The proxy for a server, or None where it is asked directly.

    Raises:
        UsageError: the variable names no proxy, or one of a kind that is not known here.
    """
    variable = f"{scheme.upper()}_PROXY"
    named = _either(variable, environment)
    if not named or _is_exempt(host.lower(), port, _either("NO_PROXY", environment)):
        return None
    return _proxy(variable, named)


def _either(name: str, environment: Mapping[str, str]) -> str:
    return environment.get(name) or environment.get(name.lower()) or ""


def _proxy(variable: str, text: str) -> Proxy:
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port or _PORT
    except ValueError:
        raise UsageError(f"{variable} is no address of a proxy.", _EXAMPLE) from None
    if not parts.hostname:
        raise UsageError(f"{variable} is no address of a proxy.", _EXAMPLE)
    if parts.scheme != "http":
        raise UsageError(
            f"{variable} names a proxy of {parts.scheme}:, which qmpbackup cannot use.", _EXAMPLE
        )
    place = parts.netloc.rpartition("@")[2]
    return Proxy(parts.hostname, port, f"http://{place}", _authorization(parts))


def _authorization(parts: SplitResult) -> dict[str, str]:
    if parts.username is None and parts.password is None:
        return {}
    pair = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


def _is_exempt(host: str, port: int, exempt: str) -> bool:
    """Whether a server is asked directly: by a list of names, addresses and networks."""
    address = _address(host)
    if host == "localhost" or (address is not None and address.is_loopback):
        return True
    entries = _entries(exempt)
    if address is not None:
        return any(entry == "*" or _takes_address(entry, address, port) for entry in entries)
    return any(entry == "*" or _takes_name(entry, host, port) for entry in entries)


def _entries(exempt: str) -> Iterator[str]:
    return filter(None, (entry.strip().lower() for entry in exempt.split(",")))


def _takes_address(entry: str, address: Address, port: int) -> bool:
    if "/" in entry:
        try:
            return address in ip_network(entry, strict=False)
        except ValueError:
            return False
    if _address(entry) is not None:
        return _address(entry) == address
    host, wanted = _split(entry)
    return _address(host) == address and wanted in {"", str(port)}


def _takes_name(entry: str, host: str, port: int) -> bool:
    """`example.org` stands for itself and all below it, `.example.org` for what is below alone."""
    name, wanted = _split(entry)
    name = name.removeprefix("*") if name.startswith("*.") else name
    if not name or wanted not in {"", str(port)}:
        return False
    if name.startswith("."):
        return host.endswith(name)
    return host == name or host.endswith(f".{name}")


def _split(entry: str) -> tuple[str, str]:
    """A host and its port, which may be missing."""
    host, colon, port = entry.rpartition(":")
    return (host, port) if colon and port.isdigit() else (entry, "")


def _address(text: str) -> Address | None:
    try:
        return ip_address(text.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None

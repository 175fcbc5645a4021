# SPDX-License-Identifier: Apache-2.0
"""Which servers are asked through a proxy: as Go's documentation of the variables has it."""

import pytest

from qmpbackup.errors import UsageError
from qmpbackup.restic.storage.proxies import proxy_for

SECRET = "word-that-nobody-sees"  # noqa: S105 - a marker


@pytest.mark.parametrize(
    ("no_proxy", "host", "port", "direct"),
    [
        ("", "backup.example", 8000, False),
        ("", "localhost", 8000, True),
        ("", "127.0.0.1", 8000, True),
        ("", "127.9.9.9", 8000, True),
        ("", "::1", 8000, True),
        ("*", "backup.example", 8000, True),
        ("*", "192.0.2.1", 8000, True),
        ("other.example, backup.example", "backup.example", 8000, True),
        ("example", "backup.example", 8000, True),
        ("xample", "backup.example", 8000, False),
        (".example", "backup.example", 8000, True),
        (".backup.example", "backup.example", 8000, False),
        ("*.example", "backup.example", 8000, True),
        ("BACKUP.example", "Backup.Example", 8000, True),
        ("backup.example:8000", "backup.example", 8000, True),
        ("backup.example:443", "backup.example", 8000, False),
        ("192.0.2.1", "192.0.2.1", 8000, True),
        ("192.0.2.1:443", "192.0.2.1", 8000, False),
        ("192.0.2.0/24", "192.0.2.1", 8000, True),
        ("192.0.2.0/99,nonsense/8", "192.0.2.1", 8000, False),
        ("2001:db8::/32", "2001:db8::7", 8000, True),
        ("2001:db8::7", "2001:db8::7", 8000, True),
        ("[2001:db8::7]:8000", "2001:db8::7", 8000, True),
        (":8000,,.", "backup.example", 8000, False),
    ],
)
def test_who_is_asked_directly(no_proxy: str, host: str, port: int, direct: bool) -> None:
    environment = {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": no_proxy}
    assert (proxy_for("https", host, port, environment) is None) is direct


def test_the_variable_is_that_of_the_scheme() -> None:
    environment = {"HTTP_PROXY": "one", "https_proxy": "http://two:3128/"}
    plain, tunnel = (proxy_for(scheme, "a.b", 1, environment) for scheme in ("http", "https"))
    assert plain is not None
    assert tunnel is not None
    assert (plain.host, plain.port, plain.headers) == ("one", 80, {})
    assert (tunnel.host, tunnel.port) == ("two", 3128)


def test_the_password_is_in_the_header_alone() -> None:
    found = proxy_for("https", "a.b", 1, {"HTTPS_PROXY": f"http://me:{SECRET}@proxy:3128"})
    assert found is not None
    assert found.name == "http://proxy:3128"
    assert found.headers["Proxy-Authorization"].startswith("Basic ")


@pytest.mark.parametrize("proxy", [f"http://me:{SECRET}@[::1", "http://:1", "socks5://host:1080"])
def test_what_is_no_proxy(proxy: str) -> None:
    with pytest.raises(UsageError, match="HTTPS_PROXY") as raised:
        proxy_for("https", "a.b", 1, {"HTTPS_PROXY": proxy})
    assert raised.value.hint
    assert SECRET not in str(raised.value)

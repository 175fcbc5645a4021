# SPDX-License-Identifier: Apache-2.0
"""The ways to a REST server: through proxies, and with certificates on both sides. The same variables
lead restic to the same server."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from lab.forward_proxy import ForwardProxy
from lab.rest_server import RestServer
from lab.restic import Restic
from lab.servers import certificate
from qmpbackup.errors import StorageError, UsageError
from qmpbackup.restic.storage.interface import CONFIG, Missing, Refused, Storage, Temporary
from qmpbackup.restic.storage.rest import RestStorage
from qmpbackup.restic.storage.trust import words_for_restic

NAME = "storage.example"
SECRET = "word-that-nobody-sees"  # noqa: S105 - a marker
PROXY_HEADER = "Basic bWU6d29yZC10aGF0LW5vYm9keS1zZWVz"


@contextmanager
def closed_server(tmp_path: Path) -> Iterator[tuple[RestServer, dict[str, str]]]:
    """A server of its own CA that lets one client in, and the variables with which it does."""
    server = certificate(tmp_path / "server.pem", NAME)
    client = certificate(tmp_path / "client.pem")
    environment = {"RESTIC_CACERT": str(server), "RESTIC_TLS_CLIENT_CERT": str(client)}
    with RestServer(tmp_path / "served", certificate=server, clients=client) as running:
        yield running, environment


def assert_works(storage: Storage) -> None:
    """It is written to and read from."""
    storage.create()
    with pytest.raises(Missing):
        storage.load(CONFIG)
    storage.save(CONFIG, [b"some ", b"bytes"])
    assert storage.load(CONFIG, 2, 3) == b"me "


def failure(storage: Storage, kind: type[StorageError] = StorageError) -> str:
    """The sentence with which it fails, which has a hint and no secret."""
    with storage, pytest.raises(kind) as raised:
        storage.load(CONFIG)
    assert raised.value.hint
    assert SECRET not in f"{raised.value} {raised.value.hint}"
    assert kind is Temporary or not isinstance(raised.value, Temporary)
    return raised.value.message


def test_a_server_that_wants_a_certificate(tmp_path: Path) -> None:
    with closed_server(tmp_path) as (server, environment):
        with RestStorage(f"{server.url}/vm/", environment) as storage:
            assert_works(storage)
        trusting = {"RESTIC_CACERT": environment["RESTIC_CACERT"]}
        assert "certificate" in failure(RestStorage(f"{server.url}/vm/", trusting))
        stranger = str(certificate(tmp_path / "stranger.pem"))
        wrong = {**trusting, "RESTIC_TLS_CLIENT_CERT": stranger}
        assert "certificate" in failure(RestStorage(f"{server.url}/vm/", wrong))
        several = {**environment, "RESTIC_CACERT": f"{stranger},{environment['RESTIC_CACERT']}"}
        with RestStorage(f"{server.url}/vm/", several) as storage:
            assert storage.load(CONFIG) == b"some bytes"


def test_through_a_tunnel_with_restic_beside_us(tmp_path: Path) -> None:
    with (
        closed_server(tmp_path) as (server, environment),
        ForwardProxy({f"{NAME}:8000": server.place}, PROXY_HEADER) as proxy,
    ):
        environment |= {"HTTPS_PROXY": f"http://me:{SECRET}@{proxy.place}", "NO_PROXY": "other"}
        with RestStorage(f"https://{NAME}:8000/ours/", environment) as storage:
            assert_works(storage)
        assert set(proxy.log) == {f"CONNECT {NAME}:8000"}
        theirs = f"rest:https://{NAME}:8000/theirs/"
        init = ("init", *words_for_restic(environment))
        Restic(theirs, tmp_path / "cache", environment=environment)(*init)
        with RestStorage(f"https://{NAME}:8000/theirs/", environment) as storage:
            assert storage.load(CONFIG)


def test_a_server_without_tls_is_asked_for_by_the_proxy(tmp_path: Path) -> None:
    with (
        RestServer(tmp_path / "served") as server,
        ForwardProxy({f"{NAME}:8000": server.place}) as proxy,
    ):
        address = f"http://{NAME}:8000/vm/"
        with RestStorage(address, {"http_proxy": proxy.place}) as storage:
            assert_works(storage)
        assert f"POST {NAME}:8000" in proxy.log
        proxy.authorization = PROXY_HEADER
        said = failure(RestStorage(address, {"HTTP_PROXY": proxy.place}), Refused)
        assert "407" in said
        named = {"HTTP_PROXY": f"me:{SECRET}@{proxy.place}"}
        with RestStorage(address, named) as storage:
            assert storage.load(CONFIG) == b"some bytes"


def test_what_a_proxy_says_when_it_makes_no_tunnel() -> None:
    with ForwardProxy({}, PROXY_HEADER) as proxy:
        address = f"https://{NAME}/vm/"
        said = failure(RestStorage(address, {"HTTPS_PROXY": proxy.place}))
        assert f"the proxy http://{proxy.place} says 407 Proxy Authentication Required." in said
        named = {"HTTPS_PROXY": f"me:{SECRET}@{proxy.place}"}
        assert "says 502" in failure(RestStorage(address, named), Temporary)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_is_not_there(scheme: str) -> None:
    proxies = {f"{scheme.upper()}_PROXY": f"http://me:{SECRET}@127.0.0.1:1"}
    said = failure(RestStorage(f"{scheme}://{NAME}/vm/", proxies), Temporary)
    assert "the proxy http://127.0.0.1:1 cannot be reached: Connection refused." in said


def test_what_is_no_certificate_of_ours(tmp_path: Path) -> None:
    own, other = certificate(tmp_path / "own.pem"), certificate(tmp_path / "other.pem")
    key = serialization.load_pem_private_key(own.read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(SECRET.encode()),
    )
    begin = own.read_bytes().partition(b"-----BEGIN PRIVATE")[0]
    files = {
        "nothing": b"nothing",
        "alone": begin,
        "locked": begin + locked,
        "mixed": begin + other.read_bytes().replace(b"CERTIFICATE", b"IGNORED"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for file in (*files, "missing"):
        with pytest.raises(UsageError, match="RESTIC_TLS_CLIENT_CERT") as raised:
            RestStorage("https://host/", {"RESTIC_TLS_CLIENT_CERT": str(tmp_path / file)})
        assert raised.value.hint

# SPDX-License-Identifier: Apache-2.0
"""A repository behind a REST server that refuses, answers late, cuts connections or goes away, and
runs that are killed or told to end around their requests: no snapshot of theirs, no lock that blocks,
and the next run goes on incrementally."""

import http.client
import os
import select
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from lab import cli
from lab.aftermath import assert_clean, manifests
from lab.backups import leftovers
from lab.disks import MIB
from lab.http_proxy import Fate, HttpProxy, Request
from lab.patience import PATIENCE
from lab.repositories import Repository
from lab.rest_server import RestServer
from stock.repositories import made
from stock.scene import Scene, scene

STORAGE = 7
FATES: tuple[Fate, ...] = ("503", "500", "cut", "lose the answer", "cut the answer")


def healthy(_request: Request) -> Fate:
    """Nothing happens to a request."""
    return "pass"


@contextmanager
def remote(folder: Path, *, append_only: bool = False) -> Iterator[tuple[Scene, HttpProxy]]:
    """A scene with a full in a repository behind a server, and the proxy before that server."""
    with (
        scene(folder, "repository") as stage,
        RestServer(folder / "served", append_only=append_only) as server,
        HttpProxy(server.url) as proxy,
    ):
        caches = folder / "caches"
        stage.repository = made(Repository(f"rest:{proxy.url}/", caches))
        stage.run("full").check()
        yield stage, proxy
        proxy.hook = healthy
        # restic's own check locks the repository, and an append-only server lets it.
        stage.repository.assert_whole(read_data=True)


class OnceEach:
    """Each request fails the first time, each in another way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: Counter[tuple[str, str]] = Counter()
        self.failed: Counter[Fate] = Counter()
        self._failing: dict[int, Fate] = {}

    def __call__(self, request: Request) -> Fate:
        with self._lock:
            if request.when == "after":
                return self._failing.pop(request.number, "pass")
            self._seen[request.method, request.path] += 1
            if self._seen[request.method, request.path] > 1:
                return "pass"
            fate = FATES[len(self._seen) % len(FATES)]
            self.failed[fate] += 1
            if fate in {"lose the answer", "cut the answer"}:
                self._failing[request.number] = fate
                return "pass"
            return fate


def test_every_request_fails_once_in_some_way(tmp_path: Path) -> None:
    with remote(tmp_path) as (stage, proxy):
        stage.write()
        proxy.hook = faults = OnceEach()
        stage.run("inc").check()
        assert set(faults.failed) == set(FATES)
        proxy.hook = healthy
        assert_clean(stage.vm, stage.place)
        assert len(manifests(stage.place)) == 2
        stage.make_good("inc")


def test_killed_around_what_is_stored(tmp_path: Path) -> None:
    """On a server that only appends."""
    with remote(tmp_path, append_only=True) as (stage, proxy):
        kill_at(stage, proxy, [at for at in places_of_a_run(stage, proxy) if at.stores])


@pytest.mark.slow
def test_killed_around_every_request(tmp_path: Path) -> None:
    with remote(tmp_path) as (stage, proxy):
        kill_at(stage, proxy, places_of_a_run(stage, proxy))


def places_of_a_run(stage: Scene, proxy: HttpProxy) -> list[Request]:
    """Before and after each request of a recorded run."""
    stage.write()
    start = len(proxy.log)
    stage.run("inc").check()
    requests = enumerate(proxy.log[start:])
    return [
        Request(number, when, each.method, each.path)
        for number, each in requests
        for when in ("before", "after")
    ]


def kill_at(stage: Scene, proxy: HttpProxy, places: list[Request]) -> None:
    """Kill runs at all these places; each next run makes good."""
    print("at", *(f"{at.when} {at.number} {at.method} {at.path[:12]}," for at in places))
    kills = 0
    for place in places:
        stage.write()
        before = len(manifests(stage.place))
        start = len(proxy.log)
        result = run_signalled(stage, proxy, place, signal.SIGKILL)
        sent = [each.path for each in proxy.log[start:] if each.stores]
        made = len(manifests(stage.place)) - before
        assert made in ({0, 1} if any("/snapshots/" in path for path in sent) else {0}), place
        kills += result.code != 0
        try:
            stage.make_good("inc")
        except BaseException as error:
            error.add_note(f"killed at {place}")
            raise
    assert kills > len(places) // 2


def run_signalled(
    stage: Scene, proxy: HttpProxy, place: Request, number: signal.Signals
) -> cli.Result:
    """A run that gets a signal at a place; the request then goes on, if only SIGTERM came."""
    started, sent = threading.Event(), threading.Event()
    start = len(proxy.log)
    pid = 0

    def hook(request: Request) -> Fate:
        if (request.number - start, request.when) == (place.number, place.when):
            assert started.wait(PATIENCE)
            if not sent.is_set():
                sent.set()
                send(pid, number)
        return "pass"

    proxy.hook = hook
    try:
        with cli.start(*stage.arguments("inc", stage.vm.socket), env=stage.environment) as running:
            pid = running.pid
            started.set()
            return running.wait()
    finally:
        proxy.hook = healthy


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal; return only when a process that is killed by it is gone."""
    death = os.pidfd_open(pid)
    os.kill(pid, number)
    if number == signal.SIGKILL:
        select.select([death], [], [], 30)
    os.close(death)


def test_told_to_end_around_requests(tmp_path: Path) -> None:
    with remote(tmp_path) as (stage, proxy):
        for place in places_of_a_run(stage, proxy)[::13]:
            stage.write()
            before = len(manifests(stage.place))
            result = run_signalled(stage, proxy, place, signal.SIGTERM)
            made = len(manifests(stage.place)) - before
            assert (result.code, made) in {(143, 0), (0, 1)}, (place, str(result))
            assert_clean(stage.vm, stage.place)
        stage.make_good("inc")


def test_told_to_end_while_nobody_knows_whether_the_snapshot_is_there(tmp_path: Path) -> None:
    with remote(tmp_path) as (stage, proxy):
        started = threading.Event()
        pid = 0

        def hook(request: Request) -> Fate:
            if not (request.stores and request.path.startswith("/snapshots/")):
                return "pass"
            if request.when == "before":
                return "pass"
            assert started.wait(PATIENCE)
            send(pid, signal.SIGTERM)
            return "lose the answer"

        proxy.hook = hook
        stage.write()
        with cli.start(*stage.arguments("inc", stage.vm.socket), env=stage.environment) as running:
            pid = running.pid
            started.set()
            running.wait().check(143)
        proxy.hook = healthy
        assert len(manifests(stage.place)) == 1
        assert_clean(stage.vm, stage.place)
        stage.make_good("inc")


@pytest.mark.parametrize("fate", ["stall", "503"])
def test_told_to_end_while_the_server_fails(tmp_path: Path, fate: Fate) -> None:
    """Whatever the server does, the run ends soon; the views are gone from QEMU."""
    with remote(tmp_path) as (stage, proxy):
        stage.vm.qemu_io("vda", "write -P 7 0 1M")
        failing = threading.Event()

        def hook(request: Request) -> Fate:
            if request.stores and "/data/" in request.path:
                failing.set()
            return fate if failing.is_set() and request.when == "before" else "pass"

        proxy.hook = hook
        arguments = stage.arguments("inc", stage.vm.socket)
        with cli.start(*arguments, env=stage.environment) as running:
            assert failing.wait(PATIENCE)
            running.signal(signal.SIGTERM)
            running.wait(45).check(143)
        assert leftovers(stage.vm) == []
        # Its lock may have stayed, as the server did not let go of it: it is stale, as we are dead.
        proxy.hook = healthy
        assert len(manifests(stage.place)) == 1
        stage.make_good("inc")


@pytest.mark.parametrize(
    "kind", ["locks", "data", pytest.param("index", marks=pytest.mark.slow), "snapshots"]
)
def test_a_server_that_forbids_one_kind_of_file(tmp_path: Path, kind: str) -> None:
    with remote(tmp_path) as (stage, proxy):
        stage.vm.qemu_io("vda", f"write -P 9 {3 * MIB} 1M")

        def hook(request: Request) -> Fate:
            return "403" if request.stores and request.path.startswith(f"/{kind}/") else "pass"

        proxy.hook = hook
        failed = stage.run("inc").check(STORAGE)
        assert "Traceback" not in failed.err
        proxy.hook = healthy
        assert len(manifests(stage.place)) == 1
        assert_clean(stage.vm, stage.place)
        stage.make_good("inc")


@pytest.mark.slow
def test_a_server_that_goes_away_for_good(tmp_path: Path) -> None:
    """After some minutes the run gives up; the guest writes all the while."""
    with remote(tmp_path) as (stage, proxy):
        stage.vm.qemu_io("vda", "write -P 5 0 1M")
        gone = threading.Event()

        def hook(request: Request) -> Fate:
            if request.stores and "/data/" in request.path:
                gone.set()
            return "503" if gone.is_set() else "pass"

        proxy.hook = hook
        arguments = stage.arguments("inc", stage.vm.socket)
        with cli.start(*arguments, env=stage.environment) as running:
            assert gone.wait(PATIENCE)
            for block in range(8):
                stage.vm.qemu_io("vda", f"write -P {block + 1} {block * MIB} 1M")
            running.wait(700).check(STORAGE)
        assert leftovers(stage.vm) == []
        proxy.hook = healthy
        assert len(manifests(stage.place)) == 1
        stage.make_good("inc")


@contextmanager
def remote_s3(folder: Path) -> Iterator[tuple[Scene, HttpProxy]]:
    """A scene with a full in a repository in an S3 bucket, and the proxy before that S3."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        with scene(folder, "repository") as stage, HttpProxy(f"http://{host}:{port}") as proxy:
            bucket = http.client.HTTPConnection(host, port)
            bucket.request("PUT", "/backups")
            assert bucket.getresponse().status == 200
            bucket.close()
            keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "not so secret"}
            place = f"s3:{proxy.url}/backups/vm"
            stage.repository = made(Repository(place, folder / "caches", variables=keys))
            stage.run("full").check()
            yield stage, proxy
            proxy.hook = healthy
            stage.repository.assert_whole(read_data=True)
    finally:
        server.stop()


def test_every_request_to_s3_fails_once_in_some_way(tmp_path: Path) -> None:
    with remote_s3(tmp_path) as (stage, proxy):
        stage.write()
        proxy.hook = faults = OnceEach()
        stage.run("inc").check()
        assert set(faults.failed) == set(FATES)
        proxy.hook = healthy
        assert_clean(stage.vm, stage.place)
        assert len(manifests(stage.place)) == 2
        stage.make_good("inc")


@pytest.mark.slow
def test_killed_around_every_request_to_s3(tmp_path: Path) -> None:
    with remote_s3(tmp_path) as (stage, proxy):
        kill_at(stage, proxy, places_of_a_run(stage, proxy))

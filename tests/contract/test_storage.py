# SPDX-License-Identifier: Apache-2.0
"""The promises that a storage makes, put to every backend.

A folder, moto's S3, rclone's REST server (also one that only appends), and a storage that fails and
forgets all the time; each with the retries that `connect` puts around it.
"""

import errno
import hashlib
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from http import HTTPStatus
from pathlib import Path

import pytest

from lab.http_proxy import Fate, HttpProxy, Request
from lab.patience import PATIENCE, wait_until
from lab.rest_server import RestServer
from lab.restic import Restic
from lab.servers import BUCKET, KEYS, answering, certificate, s3_server
from lab.small import fill, fuse_folder, needs_root, small_folder
from qmpbackup import interrupt
from qmpbackup.errors import Interrupted, StorageError
from qmpbackup.restic.storage import rest
from qmpbackup.restic.storage.interface import (
    CONFIG,
    Buffer,
    File,
    Kind,
    Missing,
    Refused,
    Storage,
    Strange,
    Temporary,
)
from qmpbackup.restic.storage.local import LocalStorage
from qmpbackup.restic.storage.location import connect
from qmpbackup.restic.storage.rest import RestStorage
from qmpbackup.restic.storage.wrappers import Limited, Logged, Retries, Retrying
from stock.faulty import FaultyStorage

MIB = 1024 * 1024
MANY = 1050
QUICK = Retries(first=0.001, longest=0.01, total=30.0)
AT_ONCE = Retries(total=0.0, strange=0.0)
KINDS = [kind for kind in Kind if kind is not Kind.CONFIG]
CHOOSE = random.Random(20260301)  # noqa: S311 - bytes for tests

Make = Callable[[ExitStack, Path], Storage]


def file_of(data: bytes, kind: Kind = Kind.DATA) -> File:
    """The name that a file with these contents has."""
    return File(kind, hashlib.sha256(data).hexdigest())


def put(storage: Storage, data: bytes, kind: Kind = Kind.DATA) -> File:
    """Save a file under its name."""
    file = file_of(data, kind)
    storage.save(file, [data])
    return file


def _local(_stack: ExitStack, folder: Path) -> Storage:
    return connect(str(folder / "repository"), {})


def _s3(stack: ExitStack, _folder: Path) -> Storage:
    url = stack.enter_context(s3_server())
    return connect(f"s3:{url}/{BUCKET}/some/prefix", KEYS)


def _rest(stack: ExitStack, folder: Path) -> Storage:
    server = stack.enter_context(RestServer(folder / "served"))
    return connect(f"rest:{server.url}/vm/", {})


def _appending(stack: ExitStack, folder: Path) -> Storage:
    server = stack.enter_context(RestServer(folder / "served", append_only=True))
    return connect(f"rest:{server.url}/vm/", {})


def _faulty(_stack: ExitStack, _folder: Path) -> Storage:
    return Retrying(Limited(Logged(FaultyStorage()), 4), QUICK)


BACKENDS: dict[str, Make] = {
    "local": _local,
    "s3": _s3,
    "rest": _rest,
    "rest, append-only": _appending,
    "faulty": _faulty,
}
REMOVING = [name for name in BACKENDS if name != "rest, append-only"]


@pytest.fixture(params=BACKENDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """An empty repository's place."""
    with ExitStack() as stack:
        made = stack.enter_context(BACKENDS[request.param](stack, tmp_path))
        made.create()
        yield made


def test_what_is_saved_is_read_whole_and_in_parts(storage: Storage) -> None:
    storage.create()  # no harm
    parts: list[Buffer] = [b"one", bytearray(b"two"), b"", memoryview(b"three")]
    data = b"".join(parts)
    for kind in KINDS:
        file = file_of(data, kind)
        storage.save(file, parts)
        assert storage.load(file) == data
        assert storage.load(file, 3) == data[3:]
        assert storage.load(file, 2, 5) == data[2:7]
        assert storage.load(file, len(data) - 1, 1) == data[-1:]
        assert storage.load(file, 4, 0) == b""
        assert storage.size(file) == len(data)
        assert [*storage.list(kind)] == [(file.name, len(data))]
    storage.save(CONFIG, [b"config"])
    assert storage.load(CONFIG) == b"config"
    assert storage.size(CONFIG) == len(b"config")


def test_a_config_that_is_there_stays(storage: Storage) -> None:
    storage.save(CONFIG, [b"first"])
    storage.save(CONFIG, [b"other"])
    assert storage.load(CONFIG) == b"first"


def test_a_file_may_be_saved_again(storage: Storage) -> None:
    """Also a large one, to which a server says no before it has read it."""
    data = CHOOSE.randbytes(16 * MIB)
    file = file_of(data)
    halves = [memoryview(data)[: 5 * MIB], memoryview(data)[5 * MIB :]]
    storage.save(file, halves)
    storage.save(file, halves)
    assert storage.load(file) == data
    assert storage.load(file, 7 * MIB + 1, MIB) == data[7 * MIB + 1 : 8 * MIB + 1]
    assert [*storage.list(Kind.DATA)] == [(file.name, len(data))]


def test_many_small_parts(storage: Storage) -> None:
    parts = [bytes([number % 251]) for number in range(5000)]
    file = file_of(b"".join(parts))
    storage.save(file, parts)
    assert storage.load(file) == b"".join(parts)


def test_what_is_not_there_is_missing(storage: Storage) -> None:
    put(storage, b"another")
    gone = file_of(b"never there")
    for ask in (
        lambda: storage.load(gone),
        lambda: storage.load(gone, 3, 4),
        lambda: storage.size(gone),
        lambda: storage.load(CONFIG),
        lambda: storage.size(CONFIG),
    ):
        with pytest.raises(Missing):
            ask()
    assert [*storage.list(Kind.SNAPSHOT)] == []


@pytest.mark.parametrize(("offset", "length"), [(0, 11), (9, 2), (10, 1), (1000, 5)])
def test_no_fewer_bytes_than_asked_for(storage: Storage, offset: int, length: int) -> None:
    """And nothing is tried again for it."""
    file = put(storage, b"ten bytes.")
    with pytest.raises(StorageError) as raised:
        storage.load(file, offset, length)
    assert not isinstance(raised.value, Temporary | Missing)


@pytest.mark.parametrize("backend", REMOVING)
def test_removed_is_gone(backend: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        storage = stack.enter_context(BACKENDS[backend](stack, tmp_path))
        storage.create()
        for kind in KINDS:
            stays, goes = put(storage, b"stays", kind), put(storage, b"goes", kind)
            storage.remove(goes)
            with pytest.raises(Missing):
                storage.load(goes)
            assert [*storage.list(kind)] == [(stays.name, 5)]
            put(storage, b"goes", kind)
            assert storage.load(goes) == b"goes"


@pytest.mark.parametrize("backend", ["local", "s3", "rest"])
def test_what_was_never_there_cannot_be_removed(backend: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        storage = stack.enter_context(BACKENDS[backend](stack, tmp_path))
        storage.create()
        with pytest.raises(Missing):
            storage.remove(file_of(b"never there"))


def test_lists_are_whole(storage: Storage) -> None:
    """More files than an object store lists at once."""
    expected = {}
    for number in range(MANY):
        data = b"%d" % number
        expected[file_of(data, Kind.INDEX).name] = len(data)
    with ThreadPoolExecutor(4) as threads:
        [*threads.map(lambda number: put(storage, b"%d" % number, Kind.INDEX), range(MANY))]
    found = [*storage.list(Kind.INDEX)]
    assert len(found) == len(expected)
    assert dict(found) == expected


def test_from_many_threads_at_once(storage: Storage) -> None:
    def work(number: int) -> None:
        choose = random.Random(number)  # noqa: S311 - bytes for tests
        for _ in range(8):
            data = choose.randbytes(choose.randrange(200_000))
            file = put(storage, data)
            start = choose.randrange(len(data) + 1)
            length = choose.randrange(len(data) - start + 1)
            assert storage.load(file, start, length) == data[start : start + length]
            assert storage.load(file) == data
            assert storage.size(file) == len(data)
            assert (file.name, len(data)) in [*storage.list(Kind.DATA)]

    with ThreadPoolExecutor(8) as threads:
        [*threads.map(work, range(8))]
    assert len([*storage.list(Kind.DATA)]) == 64


def test_the_same_file_from_many_threads_at_once(storage: Storage) -> None:
    data = CHOOSE.randbytes(3 * MIB)
    with ThreadPoolExecutor(6) as threads:
        [*threads.map(lambda _number: put(storage, data), range(6))]
    assert storage.load(file_of(data)) == data
    assert [*storage.list(Kind.DATA)] == [(file_of(data).name, len(data))]


@pytest.mark.parametrize("backend", ["local", "s3", "rest"])
def test_the_real_restic_finds_what_lies_there(backend: str, tmp_path: Path) -> None:
    """Laid out as restic does, in both directions."""
    with ExitStack() as stack:
        storage = stack.enter_context(BACKENDS[backend](stack, tmp_path))
        restic = Restic(storage.name, tmp_path / "cache", environment=KEYS).init()
        (tmp_path / "file").write_bytes(CHOOSE.randbytes(100_000))
        restic("backup", tmp_path / "file")
        listed = {
            kind: set(restic("list", said, "--no-lock").text.split())
            for kind, said in {
                Kind.KEY: "keys",
                Kind.SNAPSHOT: "snapshots",
                Kind.INDEX: "index",
                Kind.DATA: "packs",
            }.items()
        }
        for kind, names in listed.items():
            found = dict(storage.list(kind))
            assert set(found) == names
            assert names
            for name, size in found.items():
                data = storage.load(File(kind, name))
                assert hashlib.sha256(data).hexdigest() == name
                assert len(data) == size
        assert storage.load(CONFIG)
        put(storage, b"new", Kind.DATA)
        assert file_of(b"new").name in restic("list", "packs", "--no-lock").text


def test_an_append_only_server_refuses_to_forget(tmp_path: Path) -> None:
    with (
        RestServer(tmp_path / "served", append_only=True) as server,
        connect(f"rest:{server.url}/", {}) as storage,
    ):
        storage.create()
        for kind in (Kind.DATA, Kind.SNAPSHOT, Kind.INDEX, Kind.KEY):
            file = put(storage, b"kept", kind)
            with pytest.raises(Refused, match="append-only"):
                storage.remove(file)
            assert storage.load(file) == b"kept"
        storage.remove(put(storage, b"lock", Kind.LOCK))


# Folders


def test_names_of_others_are_in_no_list(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "repository")
    storage.create()
    file = put(storage, b"ours")
    folder = tmp_path / "repository" / "data" / file.name[:2]
    other = file_of(b"other").name
    for strange in (f"{file.name}-tmp-1", "README", file.name.upper(), f"{file.name[:-1]}\n"):
        (folder / strange).touch()
    (tmp_path / "repository" / "data" / other).touch()  # where no pack lies
    (tmp_path / "repository" / "data" / "zz").mkdir()
    (tmp_path / "repository" / "snapshots" / other).mkdir()
    assert [*storage.list(Kind.DATA)] == [(file.name, 4)]
    assert [*storage.list(Kind.SNAPSHOT)] == [
        (other, 1)
    ]  # whoever reads it is told that it is none


def test_folders_that_are_gone(tmp_path: Path) -> None:
    """Some programs copy no empty folders; but where all is gone, nothing is said to be empty."""
    storage = LocalStorage(tmp_path / "repository")
    with pytest.raises(Missing):
        [*storage.list(Kind.LOCK)]
    storage.create()
    storage.save(CONFIG, [b"config"])
    (tmp_path / "repository" / "locks").rmdir()
    assert [*storage.list(Kind.LOCK)] == []
    assert storage.load(put(storage, b"lock", Kind.LOCK)) == b"lock"


@needs_root
def test_a_full_folder_shows_no_part_of_a_file(tmp_path: Path) -> None:
    with (
        small_folder(tmp_path / "small", 4 * MIB) as folder,
        LocalStorage(folder) as storage,
    ):
        storage.create()
        filler = fill(folder)
        data = CHOOSE.randbytes(MIB)
        with pytest.raises(StorageError, match=os.strerror(errno.ENOSPC)):
            put(storage, data)
        assert [path for path in (folder / "data").rglob("*") if path.is_file()] == []
        filler.unlink()
        assert storage.load(put(storage, data)) == data


IN_THE_MIDDLE = """
import resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, 5 << 20))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # at the first byte too many
"""
BEFORE_THE_NAME = """
names = {"os.rename", "os.link"}
sys.addaudithook(lambda event, _: event in names and os.kill(os.getpid(), signal.SIGKILL))
"""
SAVE = """
import os, signal, sys
from pathlib import Path
from qmpbackup.restic.storage.interface import File, Kind
from qmpbackup.restic.storage.local import LocalStorage
data = Path(sys.argv[1]).read_bytes()
exec(sys.argv[4])
LocalStorage(Path(sys.argv[2])).save(File(Kind.DATA, sys.argv[3]), [data])
"""


@pytest.mark.parametrize("nameless", [True, False], ids=["usual", "without O_TMPFILE"])
@pytest.mark.parametrize("accident", [IN_THE_MIDDLE, BEFORE_THE_NAME], ids=["middle", "end"])
def test_killed_while_saving_no_part_is_shown(
    accident: str, nameless: bool, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        folder = tmp_path if nameless else stack.enter_context(fuse_folder(tmp_path / "mounted"))
        storage = LocalStorage(folder / "repository")
        storage.create()
        data = CHOOSE.randbytes(8 * MIB)
        file = file_of(data)
        source = tmp_path / "data"
        source.write_bytes(data)
        command = [sys.executable, "-c", SAVE, source, folder / "repository", file.name, accident]
        done = subprocess.run(list(map(str, command)), check=False)
        assert done.returncode in {-signal.SIGXFSZ, -signal.SIGKILL}
        left = [path for path in (folder / "repository" / "data").rglob("*") if path.is_file()]
        assert len(left) == (0 if nameless else 1)
        assert [*storage.list(Kind.DATA)] == []
        with pytest.raises(Missing):
            storage.load(file)
        assert storage.load(put(storage, data)) == data
        assert storage.load(put(storage, data)) == data
        assert [*storage.list(Kind.DATA)] == [(file.name, len(data))]


# Servers that fail


class Failing:
    """The first requests of each kind fail."""

    def __init__(self, fate: Fate, times: int = 1) -> None:
        self._fate, self._times = fate, times
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, str], int] = {}
        self._failing: set[int] = set()

    def __call__(self, request: Request) -> Fate:
        late = self._fate in {"lose the answer", "cut the answer"}
        with self._lock:
            if request.when == "before":
                key = request.method, request.path
                self._seen[key] = self._seen.get(key, 0) + 1
                if self._seen[key] <= self._times:
                    self._failing.add(request.number)
            failing = request.number in self._failing
        return self._fate if failing and late == (request.when == "after") else "pass"


PASSING: list[Fate] = ["503", "500", "cut", "lose the answer", "cut the answer"]


@pytest.mark.parametrize("fate", PASSING)
@pytest.mark.parametrize("kind", ["s3", "rest", "rest, append-only"])
def test_what_may_pass_is_tried_again(kind: str, fate: Fate, tmp_path: Path) -> None:
    data = CHOOSE.randbytes(MIB)
    with ExitStack() as stack:
        if kind == "s3":
            upstream = stack.enter_context(s3_server())
            location = f"/{BUCKET}"
        else:
            only = kind == "rest, append-only"
            server = RestServer(tmp_path / "served", append_only=only)
            upstream, location = stack.enter_context(server).url, "/"
        proxy = stack.enter_context(HttpProxy(upstream, Failing(fate)))
        prefix = "s3" if kind == "s3" else "rest"
        bare = connect(f"{prefix}:{proxy.url}{location}", KEYS)
        assert isinstance(bare, Retrying)
        with Retrying(bare._storage, QUICK) as storage:
            storage.create()
            file = put(storage, data, Kind.LOCK)
            assert storage.load(file) == data
            assert storage.load(file, 5, 1000) == data[5:1005]
            assert storage.size(file) == len(data)
            assert [*storage.list(Kind.LOCK)] == [(file.name, len(data))]
            storage.remove(file)
            assert [*storage.list(Kind.LOCK)] == []


def test_a_silent_server_is_not_waited_for_forever(tmp_path: Path) -> None:
    with (
        RestServer(tmp_path / "served") as server,
        HttpProxy(server.url, lambda _request: "stall") as proxy,
        RestStorage(f"{proxy.url}/", {}, seconds=0.2) as storage,
        pytest.raises(Temporary),
    ):
        storage.load(CONFIG)


@pytest.mark.parametrize(
    ("status", "raised"),
    [
        (400, StorageError),
        (401, Refused),
        (403, Refused),
        (404, Missing),
        (405, StorageError),
        (408, Temporary),
        (416, StorageError),
        (429, Temporary),
        (500, Temporary),
        (503, Temporary),
        (507, StorageError),
    ],
)
@pytest.mark.parametrize("kind", ["s3", "rest"])
def test_what_the_answers_of_servers_mean(
    kind: str, status: int, raised: type[StorageError]
) -> None:
    with answering(status) as url:
        bare = connect(f"{kind}:{url}/{BUCKET}/", KEYS)
        assert isinstance(bare, Retrying)
        with Retrying(bare._storage, AT_ONCE) as storage:
            for ask in (
                lambda: storage.load(file_of(b"a")),
                lambda: storage.load(file_of(b"a"), 1, 1),
                lambda: [*storage.list(Kind.DATA)],
                lambda: (
                    put(storage, b"new") if status != HTTPStatus.NOT_FOUND else storage.load(CONFIG)
                ),
            ):
                with pytest.raises(StorageError) as error:
                    ask()
                assert isinstance(error.value, raised), error.value
                assert isinstance(error.value, Temporary) == (raised is Temporary), error.value


def test_a_conflict_does_not_count_as_stored() -> None:
    """Stores say 409 of two operations that meet, whether or not there is anything."""
    with answering(409) as url:
        bare = connect(f"s3:{url}/{BUCKET}", KEYS)
        assert isinstance(bare, Retrying)
        with Retrying(bare._storage, AT_ONCE) as storage:
            for file in (file_of(b"data"), CONFIG):
                with pytest.raises(StorageError):
                    storage.save(file, [b"data"])


def test_a_server_that_says_no_at_once() -> None:
    """What it says counts, although it does not read what it is sent."""
    with (
        answering(403, reads=False) as url,
        RestStorage(f"{url}/", {}) as storage,
        pytest.raises(Refused),
    ):
        put(storage, bytes(32 * MIB))


def test_a_server_that_cannot_have_read_it_all() -> None:
    with (
        answering(200, reads=False) as url,
        RestStorage(f"{url}/", {}) as storage,
        pytest.raises(Temporary),
    ):
        put(storage, bytes(64 * MIB))


def test_a_connection_serves_whoever_asks_next(monkeypatch: pytest.MonkeyPatch) -> None:
    connections: list[http.client.HTTPConnection] = []
    connect_to = http.client.HTTPConnection.connect

    def counted(connection: http.client.HTTPConnection) -> None:
        connections.append(connection)
        connect_to(connection)

    monkeypatch.setattr(http.client.HTTPConnection, "connect", counted)
    with answering(200, b"config") as url, RestStorage(f"{url}/", {}) as storage:
        for _ in range(3):
            with ThreadPoolExecutor(1) as thread:
                assert thread.submit(storage.load, CONFIG).result(PATIENCE) == b"config"
    assert len(connections) == 1


def test_a_connection_on_which_the_server_hung_up_serves_nobody() -> None:
    with answering(200, b"config", reads=False) as url, RestStorage(f"{url}/", {}) as storage:
        for _ in range(3):
            assert storage.load(CONFIG) == b"config"
            wait_until(lambda: all(rest._has_ended(each.sock) for each in storage._idle), "its end")


def test_only_certificates_that_are_trusted(tmp_path: Path) -> None:
    own, other = certificate(tmp_path / "own"), certificate(tmp_path / "other")
    with answering(200, b"config", certificate=own) as url:
        for environment in ({}, {"RESTIC_CACERT": str(other)}):
            with (
                RestStorage(f"{url}/", environment) as storage,
                pytest.raises(StorageError, match="certificate is not trusted") as raised,
            ):
                storage.load(CONFIG)
            assert not isinstance(raised.value, Temporary)
        with RestStorage(f"{url}/", {"RESTIC_CACERT": str(own)}) as storage:
            assert storage.load(CONFIG) == b"config"


def test_no_server_at_all() -> None:
    for location in ("s3:http://127.0.0.1:1/bucket", "rest:http://127.0.0.1:1/"):
        bare = connect(location, KEYS)
        assert isinstance(bare, Retrying)
        with Retrying(bare._storage, AT_ONCE) as storage, pytest.raises(Temporary) as raised:
            storage.load(CONFIG)
        assert raised.value.hint
        assert "error" not in raised.value.message


def test_an_object_store_that_cannot_be_spoken_to(tmp_path: Path) -> None:
    """What is wrong is said, though the library hides it, and is not tried again."""
    own = certificate(tmp_path / "own")
    with answering(200, certificate=own) as strange, answering(200) as without:
        said = {
            strange: "certificate is not trusted",
            without.replace("http", "https"): "does not speak TLS",
        }
        for url, sentence in said.items():
            bare = connect(f"s3:{url}/{BUCKET}", KEYS)
            assert isinstance(bare, Retrying)
            with (
                Retrying(bare._storage, AT_ONCE) as storage,
                pytest.raises(StorageError, match=sentence) as raised,
            ):
                storage.load(CONFIG)
            assert not isinstance(raised.value, Temporary)
    with answering(400) as url, connect(f"s3:{url}/{BUCKET}", KEYS) as storage:
        with pytest.raises(StorageError, match="answers 400 Bad Request") as raised:
            storage.load(CONFIG)
        assert "AWS_DEFAULT_REGION" in raised.value.hint


# Wrappers


class Down(FaultyStorage):
    """It fails always."""

    def _fault(self) -> int:
        self.faults += 1
        return 1


def test_retries_end() -> None:
    down = Down()
    with pytest.raises(Temporary):
        Retrying(down, Retries(first=0.001, longest=0.002, strange=0.05)).load(CONFIG)
    assert down.faults > 5


def test_a_storage_that_never_answered_is_given_up_sooner() -> None:
    class Flaky(FaultyStorage):
        down = True

        def _fault(self) -> int:
            self.faults += 1
            return int(self.down)

    storage = Flaky()
    retrying = Retrying(storage, Retries(first=0.001, longest=0.002, total=30.0, strange=0.0))
    with pytest.raises(Temporary):
        retrying.load(CONFIG)
    assert storage.faults == 1
    storage.down = False
    file = put(retrying, b"data")
    storage.down, storage.faults = True, 0
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(retrying.load, file)
        while storage.faults < 5:
            assert not loading.done()
        storage.down = False
        assert loading.result(30) == b"data"


def test_nothing_is_tried_again_for_what_will_not_pass() -> None:
    storage = FaultyStorage()
    with pytest.raises(Missing):
        Retrying(storage, QUICK).load(CONFIG)
    assert storage.faults == 1


def test_a_listing_that_breaks_off_names_each_once() -> None:
    storage = FaultyStorage()
    retrying = Retrying(storage, QUICK)
    for number in range(10):
        put(retrying, b"%d" % number)
    for _ in range(6):
        names = [name for name, _ in retrying.list(Kind.DATA)]
        assert len(names) == len(set(names)) == 10
    lagging = file_of(b"0")
    storage.lagging.add(lagging)
    assert lagging.name not in dict(retrying.list(Kind.DATA))
    assert retrying.load(lagging) == b"0"


def test_a_signal_ends_the_wait() -> None:
    down = Down()
    slow = Retrying(down, Retries(first=600.0, longest=600.0, strange=6000.0))
    with interrupt.held():
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            slow.load(CONFIG)
    assert down.faults == 1


def test_a_folder_in_which_links_are_forbidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_args: object, **_more: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "link", forbidden)
    storage = LocalStorage(tmp_path)
    storage.create()
    assert storage.load(put(storage, b"data")) == b"data"


def test_a_link_that_leads_nowhere_is_no_file(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.create()
    file = file_of(b"data", Kind.LOCK)
    (tmp_path / file.kind / file.name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(Strange):
        put(storage, b"data", Kind.LOCK)
    assert not (tmp_path / "nowhere").exists()


def test_giving_up_ends_the_wait_of_all_threads() -> None:
    down = Down()
    slow = Retrying(down, Retries(first=600.0, longest=600.0, strange=6000.0))
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(slow.load, CONFIG) for _ in range(3)]
        while down.faults < 3:
            pass
        slow.give_up()
        for each in waiting:
            with pytest.raises(Temporary):
                each.result(30)


def test_giving_up_also_holds_for_who_is_just_connecting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "_LAST_SECONDS", 0.1)
    connect_to = http.client.HTTPConnection.connect

    def give_up_first(connection: http.client.HTTPConnection) -> None:
        hasty.give_up()
        connect_to(connection)

    monkeypatch.setattr(http.client.HTTPConnection, "connect", give_up_first)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hasty = RestStorage(f"http://127.0.0.1:{silent.getsockname()[1]}/", {}, seconds=600.0)
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(hasty.load, CONFIG)
            try:
                with pytest.raises(Temporary):
                    waiting.result(30)
            finally:
                hasty.give_up()
    hasty.close()


def test_a_file_is_removed_also_by_who_has_given_up() -> None:
    storage = FaultyStorage()
    retrying = Retrying(storage, QUICK)
    file = put(retrying, b"a lock")
    retrying.give_up()
    for _ in range(4):  # wherever the faults fall
        with suppress(Missing):
            retrying.remove(file)
    assert storage.faults > 1
    with pytest.raises(Missing):
        Retrying(storage, QUICK).size(file)


def test_only_so_many_at_once() -> None:
    class Counting(FaultyStorage):
        """Notes how many are in it."""

        now = most = 0
        gate = threading.Barrier(2)

        def size(self, file: File) -> int:
            with self._lock:
                self.now += 1
                self.most = max(self.most, self.now)
            self.gate.wait(PATIENCE)  # two are let in together
            with self._lock:
                self.now -= 1
            return len(str(file))

    counting = Counting()
    limited = Limited(counting, 2)
    with ThreadPoolExecutor(8) as threads:
        [*threads.map(limited.size, [CONFIG] * 8)]
    assert counting.most == 2

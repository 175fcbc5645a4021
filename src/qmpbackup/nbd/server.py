# SPDX-License-Identifier: Apache-2.0
"""A server of read-only exports on a unix socket.

    main thread       accepts, looks at signals, at idleness, and at whether somebody wants the end
    a thread a client shakes hands, takes requests; what can be had without waiting it answers itself
    a pool            reads what has to be waited for, in pieces, and answers

Memory is bounded by the number of threads: each holds one piece. `base:allocation` is offered only
where that is asked for. QEMU must never see it on something that it boots from: while a block job
copies from a backing file whose connection is lost, QEMU reads `success` with wrong bytes, because it
asks for the status of blocks and takes the failure for an end (seen with 7.2 and 10.0).

Knows the protocol; must not know what the exports show, nor where it comes from.
"""

import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from qmpbackup import interrupt
from qmpbackup.errors import Interrupted, lack_of
from qmpbackup.nbd.session import Conversation, Export

log = logging.getLogger(__name__)

THREADS: Final = 16
_CLIENTS: Final = 64
_POLL_SECONDS: Final = 0.2
_NONE: Final[Mapping[str, str]] = {}


class Server:
    """Serves exports by their names on a socket that listens.

    `allocation` offers `base:allocation`. `let_go` has reads that are under way end soon. `relayed` are the
    sockets of servers that answer for exports in our place, each for the only one that it has.
    """

    def __init__(
        self,
        listener: socket.socket,
        exports: Mapping[str, Export],
        *,
        allocation: bool = False,
        let_go: Callable[[], None] = lambda: None,
        relayed: Mapping[str, str] = _NONE,
        threads: int = THREADS,
    ) -> None:
        self.exports = exports
        self.allocation = allocation
        self.relayed = relayed
        self.pool = ThreadPoolExecutor(threads, "nbd")
        self._listener = listener
        self._let_go = let_go
        self._lock = threading.Lock()
        self._clients: set[Conversation] = set()
        self._last_seen = time.monotonic()
        self._interrupted: Interrupted | None = None

    def run(self, until_idle: float | None = None) -> None:
        """Serve until nobody has been connected for `until_idle` seconds.

        Raises:
            Interrupted: a signal came.
        """
        self._listener.setblocking(False)
        try:
            while True:
                interrupt.check()
                if self._interrupted is not None:
                    raise self._interrupted
                if select.select([self._listener], [], [], _POLL_SECONDS)[0]:
                    self._accept()
                elif self._is_idle(until_idle):
                    return
        finally:
            self._end()

    def withdraw(self, name: str) -> None:
        """Serve an export no more, and cut off those who use it."""
        with self._lock:
            self.exports = {key: each for key, each in self.exports.items() if key != name}
            using = [client for client in self._clients if client.export_name in {name, ""}]
        for client in using:
            client.hang_up()

    def left(self, client: "Conversation") -> None:
        """A client has gone."""
        with self._lock:
            self._clients.discard(client)
            self._last_seen = time.monotonic()

    def interrupted(self, signal: Interrupted) -> None:
        """A thread that reads has been given a signal that is the main thread's."""
        self._interrupted = signal

    def _is_idle(self, seconds: float | None) -> bool:
        with self._lock:
            if self._clients:
                self._last_seen = time.monotonic()
                return False
            return seconds is not None and time.monotonic() - self._last_seen > seconds

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            lacking = lack_of(error)
            if lacking is None:
                raise
            log.warning("One more client has to wait: %s", lacking.message)
            time.sleep(_POLL_SECONDS)  # those who are there are served on
            return
        with self._lock:
            if len(self._clients) >= _CLIENTS:
                log.warning("There are %d clients already; one more was sent away.", _CLIENTS)
                connection.close()
                return
            client = Conversation(self, connection)
            self._clients.add(client)
        client.start()

    def _end(self) -> None:
        with self._lock:
            clients = list(self._clients)
        for client in clients:
            client.hang_up()
        self._let_go()
        for client in clients:
            client.join()
        self.pool.shutdown(cancel_futures=True)

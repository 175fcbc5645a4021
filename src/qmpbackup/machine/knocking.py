# SPDX-License-Identifier: Apache-2.0
"""The other end of the closed network of a machine in a sandbox: sockets at which its network cards' frames arrive.

Knows QEMU's options and sockets; what is answered is decided elsewhere (`plan.segment`). No frame leaves here.
"""

import re
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from qmpbackup.durable import storage_errors
from qmpbackup.plan.segment import LARGEST, Segment

_HUB = re.compile(r"\bhubid=(\d+)")
_AT_ONCE = 100
_REST_SECONDS = 0.01
"""So many frames, and so long a pause: a guest that sends without an end costs no more."""

_KNOCK_SECONDS = 1.0
_SOCKET = "segment"


class Knocking:
    """Knocks at ports of a guest until it has answered at all of them; a context manager."""

    def __init__(self, folder: Path, ports: Sequence[int]) -> None:
        self.segment = Segment()
        self._folder = folder
        self._ports = ports
        self._over = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="segment", daemon=True)
        self._cards: set[str] = set()
        self._heard: dict[str, None] = {}

    def __enter__(self) -> Self:
        if self._ports:
            with storage_errors(f"listen in {self._folder}"):
                self._socket.bind(str(self._folder / _SOCKET))
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._ports:
            self._thread.join()
        self._socket.close()

    def options(self, argv: Sequence[str]) -> list[str]:
        """What puts us on the hubs of a command line; nothing, where nobody has to answer."""
        if not self._ports:
            return []
        hubs = dict.fromkeys(found for word in argv for found in _HUB.findall(word))
        words: list[str] = []
        for hub in hubs:
            ours, theirs = f"{self._folder}/{_SOCKET}", f"{self._folder}/{_SOCKET}-{hub}"
            remote = f"remote.type=unix,remote.path={ours}"
            local = f"local.type=unix,local.path={theirs}"
            self._cards.add(theirs)
            words += ["-netdev", f"dgram,id=segment{hub},{local},{remote}"]
            words += ["-netdev", f"hubport,id=segment-port{hub},hubid={hub},netdev=segment{hub}"]
        return words

    @property
    def closed(self) -> list[int]:
        """Ports at which the guest has not answered."""
        return [port for port in self._ports if port not in self.segment.open_ports]

    def _run(self) -> None:
        last = 0.0
        while not self._over.wait(_REST_SECONDS):
            for _ in range(_AT_ONCE):
                if not self._receive():
                    break
            if time.monotonic() - last >= _KNOCK_SECONDS:
                last = time.monotonic()
                for port in self.closed:
                    self._send(self.segment.knock(port), list(self._heard))

    def _receive(self) -> bool:
        try:
            frame, sender = self._socket.recvfrom(LARGEST)
        except OSError:
            return False
        if sender in self._cards:
            self._heard[sender] = None
            self._send(self.segment.receive(frame), [sender])
        return True

    def _send(self, frames: Sequence[bytes], peers: Sequence[str]) -> None:
        for frame in frames:
            for peer in peers:
                with suppress(OSError):  # a queue that is full, or a machine that has ended
                    self._socket.sendto(frame, peer)

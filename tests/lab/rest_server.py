# SPDX-License-Identifier: Apache-2.0
"""`rclone serve restic`: a real REST server for repositories, on loopback."""

import socket
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import Self


class RestServer:
    """Serves a folder. A context manager."""

    def __init__(self, folder: Path, *, append_only: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            self._port: int = free.getsockname()[1]
        command = ["rclone", "serve", "restic", "--addr", f"127.0.0.1:{self._port}"]
        command += ["--append-only"] if append_only else []
        self._command = [*command, "--config", "/dev/null", str(folder)]

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port)).close()
                return self
            except ConnectionRefusedError:
                assert self._process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)

    def __exit__(self, *_exc: object) -> None:
        self._process.kill()
        self._process.wait()

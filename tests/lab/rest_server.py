# SPDX-License-Identifier: Apache-2.0
"""`rclone serve restic`: a real REST server for repositories, on loopback."""

import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Self

from lab.patience import wait_until
from lab.ports import free_port


class RestServer:
    """Serves a folder. A context manager."""

    def __init__(self, folder: Path, *, append_only: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._port = free_port()
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
        wait_until(self._answers, "a server")
        return self

    def _answers(self) -> bool:
        assert self._process.poll() is None, "rclone serves nothing"
        with suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", self._port)).close()
            return True
        return False

    def __exit__(self, *_exc: object) -> None:
        self._process.kill()
        self._process.wait()

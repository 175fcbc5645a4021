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
    """Serves a folder. A context manager.

    With a `certificate` (a PEM file with its key) it speaks TLS, and then wants one of its clients
    that a certificate in `clients` has signed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        append_only: bool = False,
        certificate: Path | None = None,
        clients: Path | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._port = free_port()
        command = ["rclone", "serve", "restic", "--addr", f"127.0.0.1:{self._port}"]
        command += ["--append-only"] if append_only else []
        if certificate:
            command += ["--cert", str(certificate), "--key", str(certificate)]
        if clients:
            command += ["--client-ca", str(clients)]
        self._scheme = "https" if certificate else "http"
        self._command = [*command, "--config", "/dev/null", str(folder)]

    @property
    def place(self) -> tuple[str, int]:
        """Its address and port."""
        return "127.0.0.1", self._port

    @property
    def url(self) -> str:
        """Where it is."""
        return f"{self._scheme}://127.0.0.1:{self._port}"

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

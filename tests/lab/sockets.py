# SPDX-License-Identifier: Apache-2.0
"""Sockets that nobody listens at, as VMs leave them."""

import os
import socket
from pathlib import Path


def bind(folder: Path, *names: str) -> None:
    """Sockets in a folder, however long its path is."""
    folder.mkdir(parents=True, exist_ok=True)
    there = os.open(folder, os.O_RDONLY)
    for name in names:
        with socket.socket(socket.AF_UNIX) as each:
            each.bind(f"/proc/self/fd/{there}/{name}")
    os.close(there)

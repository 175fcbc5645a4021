# SPDX-License-Identifier: Apache-2.0
"""Ports for servers that cannot be told to take any that is free."""

import socket
from contextlib import suppress
from random import SystemRandom


def free_port() -> int:
    """A TCP port of loopback. It is free, and will be still in a moment: it is from below the range
    that the kernel gives to whoever asks for any port, and by chance."""
    while True:
        port = SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port

# SPDX-License-Identifier: Apache-2.0
"""How a server of Python's library serves in a thread of its own, and is over with a block."""

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def serving(server: socketserver.ThreadingMixIn) -> Iterator[int]:
    """Have a server on loopback serve inside the block; its port. Nobody waits for what it still answers."""
    assert isinstance(server, socketserver.TCPServer)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="server", daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join(30)

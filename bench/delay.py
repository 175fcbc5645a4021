# SPDX-License-Identifier: Apache-2.0
"""A proxy in front of a local server that has it answer as from far away: half a round trip each way.

    python -m bench.delay PORT SERVER_PORT [MILLISECONDS]

It delays and does not narrow: what is sent in a row arrives in a row.
"""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PIECE = 1 << 18
_WAITING = 256
"""Pieces that are on their way at most, in each direction."""


async def _pass_on(
    source: asyncio.StreamReader, sink: asyncio.StreamWriter, seconds: float
) -> None:
    loop = asyncio.get_running_loop()
    way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_WAITING)

    async def arrive() -> None:
        data = b"\0"
        while data:
            due, data = await way.get()
            await asyncio.sleep(due - loop.time())
            sink.write(data)
            await sink.drain()
        sink.close()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(arrive())
        data = b"\0"
        while data:
            data = await source.read(_PIECE)
            await way.put((loop.time() + seconds, data))


async def serve(port: int, server: int, milliseconds: float) -> None:
    """Serve for ever."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seconds = milliseconds / 2000
        await asyncio.sleep(seconds * 2)  # TCP asks once before it sends anything
        there = await asyncio.open_connection("127.0.0.1", server)
        try:
            await asyncio.gather(
                _pass_on(reader, there[1], seconds), _pass_on(there[0], writer, seconds)
            )
        except* OSError:
            writer.close()
            there[1].close()

    async with await asyncio.start_server(connected, "127.0.0.1", port, limit=_PIECE) as proxy:
        await proxy.serve_forever()


@contextmanager
def far(folder: Path, milliseconds: int) -> Iterator[str]:
    """A REST server of all repositories in a folder, as from far away; gives its address."""
    near, away = _free_port(), _free_port()
    commands = [
        ["rclone", "serve", "restic", "--addr", f"127.0.0.1:{near}", str(folder)],
        [sys.executable, "-m", "bench.delay", str(away), str(near), str(milliseconds)],
    ]
    running = [
        subprocess.Popen(each, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for each in commands
    ]
    try:
        _wait_for(near)
        _wait_for(away)
        yield f"http://127.0.0.1:{away}"
    finally:
        for process in running:
            process.terminate()
            process.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait_for(port: int) -> None:
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit("A server did not start.")


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2]), float((sys.argv[3:] or ["50"])[0])))

# SPDX-License-Identifier: Apache-2.0
"""Monitors of very many VMs that do not fit on one machine: each answers as a VM did that was recorded.

What asks for something (`query-…`, `qom-…`) is answered with what the real VM said to the same words, which
is asked but once; what would change something is refused, as QEMU refuses it.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lab.qmp import Monitor, QmpError

_ASKS = ("query-", "qom-list", "qom-get", "qmp_capabilities", "device-list-properties")


class Recording:
    """What a real VM answers, as far as it was asked."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._known: dict[str, dict[str, Any]] = {}
        self.greeting = _line(monitor.greeting)

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """What it says to a message, without the id of that."""
        name, arguments = (
            str(message.get("execute") or message["exec-oob"]),
            message.get("arguments", {}),
        )
        words = json.dumps([name, arguments], sort_keys=True)
        if words not in self._known:
            self._known[words] = self._asked(name, arguments)
        return self._known[words]

    def _asked(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if name == "qmp_capabilities":
            return {"return": {}}
        if not name.startswith(_ASKS):
            return {"error": {"class": "GenericError", "desc": "A recording changes nothing."}}
        try:
            return {"return": self._monitor.command(name, arguments)}
        except QmpError as error:
            return {"error": error.error}


@contextmanager
def replayed(monitor: Monitor, sockets: Sequence[Path]) -> Iterator[None]:
    """Have somebody listen at each of these sockets who answers as the VM of that monitor does."""
    recording = Recording(monitor)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="replayed")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            writer.write(recording.greeting)
            async for message in _messages(reader):
                of = {"id": message["id"]} if "id" in message else {}
                writer.write(_line(recording.answer(message) | of))
                await writer.drain()
        writer.close()

    async def listen() -> list[asyncio.Server]:
        return [await asyncio.start_unix_server(serve, path, limit=1 << 20) for path in sockets]

    async def close(servers: Sequence[asyncio.Server]) -> None:
        for server in servers:
            server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    thread.start()
    try:
        servers = asyncio.run_coroutine_threadsafe(listen(), loop).result()
        try:
            yield
        finally:
            asyncio.run_coroutine_threadsafe(close(servers), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """What a client sends, which need not end its lines."""
    text, decoder = "", json.JSONDecoder()
    while chunk := await reader.read(65536):
        text += chunk.decode()
        with suppress(ValueError):  # the rest of it is yet to come
            while text := text.lstrip():
                message, end = decoder.raw_decode(text)
                text = text[end:]
                yield message


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\r\n"

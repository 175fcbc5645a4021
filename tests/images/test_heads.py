# SPDX-License-Identifier: Apache-2.0
"""Heads of images that we write ourselves: qemu-img reads the image by them as by its own, and never
what the file's own head says."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from qmpbackup.errors import DamagedError, StorageError
from qmpbackup.images import qemu_img, relink
from qmpbackup.images.layers import Layer, opened, require_unchanged
from stock.stored import run

SIZE = 4 * 1024 * 1024
KINDS = {
    "usual": [],
    "v2": ["compat=0.10"],
    "small clusters": ["cluster_size=512"],
    "large clusters": ["cluster_size=2M"],
    "extended L2": ["extended_l2=on"],
    "zstd": ["compression_type=zstd"],
    "small refcounts": ["refcount_bits=1"],
}


def image(path: Path, options: Sequence[str] = (), below: Path | None = None) -> Path:
    chosen = ["-o", ",".join(options)] if options else []
    link = ["-b", below.name, "-F", "qcow2"] if below else []
    run("qemu-img", "create", "-q", "-f", "qcow2", *chosen, *link, str(path), str(SIZE))
    return path


def write(path: Path, pattern: int, at: int, length: int) -> None:
    run("qemu-io", "-c", f"write -P {pattern} {at} {length}", str(path))


def converted(paths: Sequence[Path], output: Path) -> bytes:
    """The contents of a chain as qemu-img sees them through our heads."""
    files = [path.open("rb") for path in paths]
    try:
        layers = [
            Layer.of(file.fileno(), path.name) for file, path in zip(files, paths, strict=True)
        ]
        with (
            output.open("w+b") as written,
            qemu_img.converting(layers, written.fileno(), "raw") as child,
        ):
            result = child.wait()
        assert result.code == 0, result.messages
        return output.read_bytes()
    finally:
        for file in files:
            file.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_is_read_by_our_heads_as_by_its_own(tmp_path: Path, kind: str) -> None:
    full = image(tmp_path / "full", KINDS[kind])
    write(full, 1, 0, SIZE // 2)
    inc = image(tmp_path / "inc", KINDS[kind], full)
    write(inc, 2, 65536 * 3 + 512, 70000)
    run("qemu-img", "convert", "-O", "raw", str(inc), str(tmp_path / "expected"))
    assert converted([full, inc], tmp_path / "out") == (tmp_path / "expected").read_bytes()
    with inc.open("rb") as file:
        found = qemu_img.check(Layer.of(file.fileno(), "inc"))
        assert (found.errors, found.leaks) == (0, 0)


def test_a_chain_may_be_deep(tmp_path: Path) -> None:
    paths = [image(tmp_path / "0")]
    for number in range(1, 100):
        paths.append(image(tmp_path / str(number), below=paths[-1]))
    write(paths[50], 7, 65536, 65536)
    found = converted(paths, tmp_path / "out")
    assert found == bytes(65536) + b"\7" * 65536 + bytes(SIZE - 2 * 65536)


def test_what_the_file_itself_says_meanwhile_is_not_read(tmp_path: Path) -> None:
    """Whatever somebody writes over the head once it was read is not what qemu-img sees."""
    full, secret = image(tmp_path / "full"), tmp_path / "secret"
    write(full, 5, 0, SIZE)
    secret.write_bytes(b"secret" * SIZE)
    with full.open("r+b") as file:
        layer = Layer.of(file.fileno(), "full")
        other = image(tmp_path / "other", [f"data_file={tmp_path / 'data'}", "data_file_raw=on"])
        forged = other.read_bytes()[:65536].replace(
            str(tmp_path / "data").encode(), b"secret".ljust(len(str(tmp_path / "data")), b"\0")
        )
        os.pwrite(file.fileno(), forged, 0)
        with (
            (tmp_path / "out").open("w+b") as output,
            qemu_img.converting([layer], output.fileno(), "raw") as child,
        ):
            assert child.wait().code == 0
        assert (tmp_path / "out").read_bytes() == b"\5" * SIZE
        with pytest.raises(StorageError, match="was changed while it was read"):
            require_unchanged([layer])
        with (
            pytest.raises(DamagedError, match="does not hold its data itself"),
            opened([Layer.of(file.fileno(), "full")]),
        ):
            pass


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_is_put_into_any_head_as_qemu_img_would(tmp_path: Path, kind: str) -> None:
    image(tmp_path / "full")
    write(tmp_path / "full", 3, 0, SIZE)
    alone = image(tmp_path / "alone", KINDS[kind])
    write(alone, 4, 0, SIZE // 2)
    for parent in ("a/name/that/is/longer", "full"):
        with alone.open("r+b") as file:
            head = file.read(relink.HEAD)
            file.seek(0)
            file.write(relink.linked(head, "alone", parent))
    info = json.loads(run("qemu-img", "info", "--output=json", str(alone)))
    assert (info["backing-filename"], info["backing-filename-format"]) == ("full", "qcow2")
    assert subprocess.run(["qemu-img", "check", "-q", str(alone)], check=False).returncode == 0
    run("qemu-img", "convert", "-O", "raw", str(alone), str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == b"\4" * (SIZE // 2) + b"\3" * (SIZE // 2)


def test_a_link_that_finds_no_room_is_refused(tmp_path: Path) -> None:
    alone = image(tmp_path / "alone", ["cluster_size=512"])
    with pytest.raises(StorageError, match="no room for a link"):
        relink.linked(alone.read_bytes()[: relink.HEAD], "alone", "x" * 500)

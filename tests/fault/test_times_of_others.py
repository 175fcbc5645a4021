# SPDX-License-Identifier: Apache-2.0
"""File systems whose times mean nothing: what nobody has changed is read all the same."""

from pathlib import Path

from lab import cli
from lab.small import fuse_folder
from qmpbackup.images.layers import Layer, require_unchanged
from qmpbackup.model import Level
from stock.stored import MIB, Stored, Write


def test_a_file_over_fuse_may_change_its_times_by_itself(tmp_path: Path) -> None:
    with fuse_folder(tmp_path / "fuse") as folder:
        stored = Stored(folder / "target")
        for level in (Level.FULL, Level.INC):
            stored.add(level, {"hd0": [Write(7, 0, MIB)]})
        for number in range(3):
            cli.run("verify", "--target", stored.path).check()
            out = tmp_path / str(number)
            cli.run("restore", "--target", stored.path, "--output", out).check()
        with stored.file(stored.points[0], "hd0").open("rb") as file:
            layer = Layer.of(file.fileno(), "FULL")
            Path(file.name).touch()
            require_unchanged([layer])


def test_restores_and_merges_over_fuse(tmp_path: Path) -> None:
    """Where numbers of files and times are those of a program, what was written is still known again."""
    with fuse_folder(tmp_path / "fuse") as folder:
        stored = Stored(folder / "target")
        for level in (Level.FULL, Level.INC, Level.INC):
            stored.add(level, {"hd0": [Write(7, 0, MIB)]})
        for format_ in ("qcow2", "raw"):
            place: list[cli.Argument] = ["--output", folder / "out", "--format", format_]
            cli.run("restore", "--target", stored.path, *place).check()
            cli.run("restore", "--target", stored.path, *place, "--force").check()
        export: list[cli.Argument] = ["--dir", stored.path / "hd0", "--targetfile", folder / "one"]
        cli.run("merge", *export, program="qmprestore").check()
        cli.run("snapshotrebase", *export[:2], program="qmprestore").check()
        cli.run("prune", "--target", stored.path, "--keep-last", "1").check()
        cli.run("verify", "--target", stored.path).check()

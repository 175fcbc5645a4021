# SPDX-License-Identifier: Apache-2.0
"""Runs that may have few descriptors or little memory: a sentence, an exit code, and nothing left.

The limits of a process hit another place with each value, so every command gets a range of them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lab import cli
from lab.disks import MIB, create
from stock.scene import WHERE, Scene, Where, scene

LIMITS = {
    "descriptors": [f"--nofile={number}:{number}" for number in range(6, 40, 2)],
    "memory": [
        f"--as={mib << 20}:{mib << 20}"
        for mib in (260, 60, 120, 420, 40, 50, 75, 90, 160, 200, 330, 520, 600, 700)
    ],
}
OFFLINE = {
    "descriptors": [f"--nofile={number}:{number}" for number in (10, 14, 15, 16)],
    "memory": [f"--as={mib << 20}:{mib << 20}" for mib in (60, 330, 1350, 1450)],
}
"""The last ones of each are those at which something has begun (QEMU 7.2)."""

SPREAD = 4
"""How many of these `make test` takes."""

KNOWN = {0, 1, 3, 4, 6, 7}
"""How such a run may end: well, or for a lack of ours, QEMU's, or of the programs that we start."""

PROGRAM_FAILS = {127, 134, -6, 139, -11}
"""How it ends where the interpreter itself, or a library that knows no errors, finds no memory."""


@pytest.fixture(scope="module", params=WHERE)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    """A VM, and a target with a full in it."""
    where: Where = request.param
    with scene(tmp_path_factory.mktemp("scarce"), where) as it:
        it.renew("full")
        yield it


def commands(it: Scene, folder: Path) -> dict[str, tuple[cli.Argument, ...]]:
    target = ("--target", str(it.place))
    return {
        "backup": it.arguments("inc", it.vm.socket),
        "full": it.arguments("full", it.vm.socket),
        "list": ("list", *target),
        "verify": ("verify", *target),
        "restore": ("restore", *target, "--output", folder / "restored", "--force"),
        "doctor": ("--socket", it.vm.socket, "doctor", *target),
    }


COMMANDS = ("backup", "full", "list", "verify", "restore", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", LIMITS)
def test_a_run_with_little(kind: str, command: str, made: Scene, tmp_path: Path) -> None:
    step = len(LIMITS[kind]) // SPREAD if kind == "descriptors" else 1
    examine(made, commands(made, tmp_path)[command], LIMITS[kind][::step][:SPREAD])


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", LIMITS)
def test_a_run_with_little_of_any_size(
    kind: str, command: str, made: Scene, tmp_path: Path
) -> None:
    examine(made, commands(made, tmp_path)[command], LIMITS[kind])


def examine(made: Scene, arguments: Sequence[cli.Argument], limits: Sequence[str]) -> None:
    """Run a command with each limit; the next run without one works, and nothing is left."""
    program = cli.executable("qmpbackup")
    for limit in limits:
        argv = ("prlimit", limit, program, *map(str, arguments))
        with cli.Running(argv, made.environment) as running:
            result = running.wait()
        assert "Unexpected" not in result.err, str(result)
        assert result.code in KNOWN | PROGRAM_FAILS, str(result)
        if result.code in {0, 3}:
            assert "Traceback" not in result.err, str(result)
    made.make_good("inc")


@pytest.mark.parametrize("kind", LIMITS)
def test_images_of_a_vm_that_is_off(kind: str, tmp_path: Path) -> None:
    """QEMU, which we start for them, has no more than we have."""
    image, target = create(tmp_path / "a.qcow2", MIB), tmp_path / "target"
    arguments = ("backup", "--offline", "--vm", "x", "--image", f"vda={image},format=qcow2")
    for limit in OFFLINE[kind]:
        argv = ("prlimit", limit, cli.executable("qmpbackup"), *arguments, "--target", str(target))
        with cli.Running(argv) as running:
            result = running.wait()
        assert result.code in KNOWN | PROGRAM_FAILS, str(result)
        assert "Unexpected" not in result.err, str(result)
        if result.code == 1:
            assert "of the unit)" in result.err, str(result)
        if kind == "descriptors":
            assert list(target.rglob("*.p*")) == [], str(result)
    cli.run(*arguments, "--target", target).check()

# SPDX-License-Identifier: Apache-2.0
"""Measure the worst day: a VM from a point against one from its restored disk, and what serves and moves it.

    PYTHONPATH=tests python -m bench.worstday [--megabytes 512] [--runs 3] [--disk DIR]

The small guest of the tests, with a second disk full of this machine's own files, is backed up into a
repository and a folder:

    boot      from the command to a guest that answers; against QEMU on restored disks; the fastest run; also from a
              repository 50 ms away, and of a guest with an empty disk of 1 TiB besides, against one without
    server    all bytes by nbdcopy, the first time and then; against qemu-nbd on the chain; medians, in turn
    settle    of a VM that runs; against `restore`; medians, in turn
    drill     to its verdict; the fastest run
    files     the first list of file systems, 10,000 small files, and a large one: whole commands

`--only` names those that are wanted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median

from bench.delay import far
from bench.machine import PASSWORD, QMPBACKUP, call, make_repository, measure, real_files

from lab.booted import kill, listener
from lab.disks import MIB, Disk, create
from lab.guest import Guest, Shell
from lab.patience import PATIENCE
from stock import guest_disks

SMALL_FILES = 10_000
LARGE_MIB = 512
FIRST_LIST = 5.0

MILLISECONDS = 50


def main() -> None:
    """Measure everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=512, help="real files on the disk")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side (default: 3)")
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"), help="a folder on a disk")
    parts = ["boot", "server", "settle", "drill", "files"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    options = parser.parse_args()
    print(f"{'what':<34} {'ours':>8} {'peer':>8} {'ratio':>6} {'bar':>5}  peer", flush=True)
    with tempfile.TemporaryDirectory(dir=options.disk) as scratch:
        os.environ["XDG_STATE_HOME"] = f"{scratch}/state"
        os.environ.update(PASSWORD)
        bench = _Bench(Path(scratch), options.runs)
        bench.make(options.megabytes)
        for part in options.only:
            {
                "boot": bench.boot,
                "server": bench.server,
                "settle": bench.settle,
                "drill": bench.drill,
                "files": bench.files,
            }[part]()


class _Bench:
    def __init__(self, folder: Path, runs: int) -> None:
        self.folder = folder
        self.runs = runs
        self.megabytes = 0
        self.targets = {
            "repository": f"restic:{folder / 'repository'}",
            "folder": f"{folder / 'chain'}",
        }
        self.large = {
            "repository": f"restic:{folder / 'large-repository'}",
            "folder": f"{folder / 'large-chain'}",
        }

    def make(self, megabytes: int) -> None:
        """A guest on its disk, backed up into both kinds of target, and restored."""
        self.megabytes = megabytes
        system, data = self.folder / "vda.qcow2", self.folder / "vdb.qcow2"
        create(system, 256 * MIB)
        real_files(data, megabytes)
        disks = [Disk("vda", system), Disk("vdb", data)]
        make_repository(self.folder / "repository")
        with Guest(disks, boot="install") as guest:
            guest.sync()
        with Guest(disks, boot="disk") as guest:
            for target in self.targets.values():
                call([*QMPBACKUP, "--socket", str(guest.socket), "backup", "--target", target])
        large = Disk("vdc", create(self.folder / "vdc.qcow2", 1024 * 1024 * MIB))
        make_repository(self.folder / "large-repository")
        with Guest([*disks, large], boot="disk") as guest:
            for target in self.large.values():
                call([*QMPBACKUP, "--socket", str(guest.socket), "backup", "--target", target])
        large.image.unlink()
        system.unlink()
        data.unlink()
        local = str(self.folder / "local")
        call([*QMPBACKUP, "restore", "--target", self.targets["folder"], "--output", local])

    def boot(self) -> None:
        """To a guest that answers."""
        peer = self._fastest(self._from_local_disk)
        taken: dict[str, float] = {}
        for kind, target in self.targets.items():
            taken[kind] = self._fastest(partial(self._until_it_answers, target))
            _row(f"boot from a {kind}", taken[kind], peer, "+3 s", "restored disk")
        with far(self.folder, MILLISECONDS) as address:
            target = f"restic:rest:{address}/repository/"
            from_far = self._fastest(partial(self._until_it_answers, target))
        _row(f"boot from a repository, {MILLISECONDS} ms", from_far, peer, "2.00", "restored disk")
        for kind, target in self.large.items():
            large = self._fastest(partial(self._until_it_answers, target))
            _row(f"boot from a {kind}, 1 TiB", large, taken[kind], "+1 s", "without that disk")

    def _until_it_answers(self, target: str) -> float:
        with self._booted(target) as (_, seconds):
            return seconds

    def _from_local_disk(self) -> float:
        disks = [Disk(each, self.folder / "local" / f"{each}.qcow2") for each in ("vda", "vdb")]
        begun = time.monotonic()
        with Guest(disks, boot="disk"):
            return time.monotonic() - begun

    @contextmanager
    def _booted(self, target: str) -> Iterator[tuple[Path, float]]:
        """A VM from the newest point, its folder, and how long it took until its guest answered."""
        folder = self.folder / "booted"
        begun = time.monotonic()
        command = [*QMPBACKUP, "boot", "--target", target, "--to", str(folder), "--json"]
        said = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        sockets = Path(said["qmp"]).parent
        try:
            shell = Shell(sockets / "guest-shell", PATIENCE)
            shell.run("true")
            shell.close()
            yield folder, time.monotonic() - begun
        finally:
            done = subprocess.run(
                [*QMPBACKUP, "boot", "--end", "--to", str(folder)], check=False, capture_output=True
            )
            if done.returncode:  # it is settled
                pid = listener(sockets / "settle")
                if pid:
                    kill(pid)
                call(["rm", "-rf", str(folder), str(sockets)])

    def server(self) -> None:
        """All bytes of the data disk, cold and warm."""
        newest = next((self.folder / "chain" / "vdb").iterdir())
        native = ["qemu-nbd", "-r", "-t", "-e", "16", "-f", "qcow2", str(newest), "-k"]
        ours = [*QMPBACKUP, "serve", "--disk", "vdb", "--allocation", "--target"]
        commands = {"qemu-nbd": native}
        commands |= {kind: [*ours, each, "--socket"] for kind, each in self.targets.items()}
        with ExitStack() as stack:
            servers = {
                name: stack.enter_context(_serving(command, self.folder / f"nbd-{name}"))
                for name, command in commands.items()
            }
            copies = {
                name: partial(self._read_whole, name, "" if name == "qemu-nbd" else "vdb")
                for name in servers
            }
            cold = {name: copy() for name, copy in copies.items()}
            warm = self._in_turn(copies)
            for kind in self.targets:
                _row(f"serve from a {kind}, first", cold[kind], cold["qemu-nbd"], "", "qemu-nbd")
                _row(f"serve from a {kind}, warm", warm[kind], warm["qemu-nbd"], "1.25", "qemu-nbd")
                most, size = _most_memory(servers[kind]), self.megabytes
                print(f"  {size / cold[kind]:.0f} MiB/s at first; {most:.0f} MiB of memory at most")

    def _read_whole(self, server: str, export: str) -> float:
        socket = self.folder / f"nbd-{server}"
        return measure(["nbdcopy", f"nbd+unix:///{export}?socket={socket}", "null:"]).time

    def settle(self) -> None:
        """Of a VM that runs."""
        for kind, target in self.targets.items():

            def ours(target: str = target) -> float:
                with self._booted(target) as (folder, _):
                    return measure([*QMPBACKUP, "settle", "--to", str(folder)]).time

            def peer(target: str = target) -> float:
                output = self.folder / "restored"
                taken = measure(
                    [*QMPBACKUP, "restore", "--target", target, "--output", str(output)]
                ).time
                call(["rm", "-r", str(output)])
                return taken

            taken = self._in_turn({"settle": ours, "restore": peer})
            _row(f"settle from a {kind}", taken["settle"], taken["restore"], "1.30", "restore")

    def drill(self) -> None:
        """To its verdict."""
        for kind, target in self.targets.items():
            command = [*QMPBACKUP, "drill", "--target", target]
            taken = self._fastest(lambda: measure(command).time)  # noqa: B023
            _row(f"drill from a {kind}", taken, 30.0, "1.00", "30 s")

    def files(self) -> None:
        """Out of a point of two file systems, into memory: a disk would be measured, too."""
        tree = self.folder / "files"
        for number in range(SMALL_FILES):
            file = tree / "small" / str(number // 100) / str(number)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(os.urandom(300 + number % 8000))
        (tree / "large").mkdir()
        (tree / "large" / "file").write_bytes(os.urandom(LARGE_MIB * MIB))
        sizes = {"small": 160 * MIB, "large": (LARGE_MIB + 128) * MIB}
        disks = {
            each: guest_disks.ext4(self.folder / each, tree / each, size)
            for each, size in sizes.items()
        }
        for kind, target in (
            ("repository", self.targets["repository"]),
            ("folder", f"{self.folder / 'more'}"),
        ):
            guest_disks.backed_up(target, disks)
            words = [*QMPBACKUP, "files"]
            first = self._fastest(lambda: measure([*words, "ls", "--target", target]).time)  # noqa: B023
            _row(f"files ls from a {kind}", first, FIRST_LIST, "1.00", "5 s")
            small = self._copied(["-r", "--target", target, "small:/"])
            _row(f"files cp, {SMALL_FILES} small", small, 10.0, "1.00", "10 s")
            large = self._copied(["--target", target, "large:/file"])
            bar = FIRST_LIST + LARGE_MIB / 100
            _row(f"files cp, {LARGE_MIB} MiB", large, bar, "1.00", "5 s and 100 MiB/s")

    def _copied(self, words: list[str]) -> float:
        taken = []
        for _ in range(self.runs):
            with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
                command = [*QMPBACKUP, "files", "cp", *words, f"{folder}/out"]
                taken.append(measure(command).time)
        return min(taken)

    def _fastest(self, run: Callable[[], float]) -> float:
        return min(run() for _ in range(self.runs))

    def _in_turn(self, sides: Mapping[str, Callable[[], float]]) -> dict[str, float]:
        """The median of each side, all run in turn."""
        rounds = [{name: run() for name, run in sides.items()} for _ in range(self.runs)]
        return {name: median(each[name] for each in rounds) for name in sides}


@contextmanager
def _serving(command: list[str], socket: Path) -> Iterator[int]:
    """Run a server that is told its socket at last; gives its process id."""
    command = [*command, str(socket)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while listener(socket) is None:
            if process.poll() is not None:
                sys.exit(f"{' '.join(command)} ended.")
            time.sleep(0.05)
        yield process.pid
    finally:
        process.terminate()
        process.wait()
        socket.unlink(missing_ok=True)


def _most_memory(pid: int) -> float:
    """MiB that a process has had at most."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def _row(what: str, ours: float, peer: float, bar: str, name: str) -> None:
    print(
        f"{what:<34} {ours:>7.2f}s {peer:>7.2f}s {ours / peer:>6.2f} {bar:>5}  {name}", flush=True
    )


if __name__ == "__main__":
    main()

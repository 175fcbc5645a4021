# SPDX-License-Identifier: Apache-2.0
"""What the place of a scratch costs a guest that writes: the time of a write that has to save old data.

    PYTHONPATH=tests python -m bench.scratch [--writes 400] [--disk DIR] [--tmpfs DIR]

One disk, opened without the host's cache as hypervisors do, whose clusters are written in random order,
each once: so each write first has its old contents saved. In turn: no filter at all; a scratch beside the
image; a scratch in memory; and one beside the image that QEMU compresses. Milliseconds, of which the way
through the monitor is a part that all of them share.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.disks import CLUSTER, MIB, Disk, create
from lab.qemu import Qemu

SIZE = 512 * MIB
KINDS = ("no view", "beside the image", "in memory", "beside, compressed")


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--writes", type=int, default=400)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--disk", type=Path, default=Path("/var/tmp"))
    options.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"))
    chosen = options.parse_args()
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with (
        tempfile.TemporaryDirectory(dir=chosen.disk) as disk,
        tempfile.TemporaryDirectory(dir=chosen.tmpfs) as memory,
    ):
        contents = random.Random(1).randbytes(64 * MIB) * (SIZE // (64 * MIB))
        create(Path(disk) / "vda.raw", SIZE, "raw", contents=contents)
        for _ in range(chosen.rounds):
            for kind in KINDS:
                folder = Path(memory if kind == "in memory" else disk)
                times[kind] += _measured(Path(disk) / "vda.raw", folder, kind, chosen.writes)
    base = statistics.median(times[KINDS[0]])
    for kind, found in times.items():
        found.sort()
        median, late = statistics.median(found), found[len(found) * 99 // 100]
        print(f"{kind:<20} median {median:6.2f}  99 % {late:7.2f}  ratio {median / base:5.2f}")


def _measured(image: Path, folder: Path, kind: str, writes: int) -> list[float]:
    file = {"driver": "file", "filename": str(image), "cache": {"direct": True}}
    with Qemu([Disk("vda", image, "raw", options={"file": file})]) as vm:
        with _view(vm, folder / "scratch", kind):
            places = random.Random(2).sample(range(SIZE // CLUSTER), writes)
            qdev, found = vm.qdev("vda"), []
            for place in places:
                started = time.perf_counter()
                vm.qemu_io_at(qdev, f"write -P 7 {place * CLUSTER} {CLUSTER}")
                found.append((time.perf_counter() - started) * 1000)
        return found


@contextmanager
def _view(vm: Qemu, scratch: Path, kind: str) -> Iterator[None]:
    if kind == "no view":
        yield
        return
    packed = "compressed" in kind
    create(
        scratch,
        SIZE,
        "qcow2" if packed else "raw",
        options="compression_type=zstd" if packed else "",
    )
    file = {"driver": "file", "filename": str(scratch)}
    node = {"driver": "qcow2" if packed else "raw", "file": file}
    target = {"driver": "compress", "file": node} if packed else node
    vm.qmp("blockdev-add", **target, **{"node-name": "scratch"})
    vm.qmp("stop")
    filter_ = {"driver": "copy-before-write", "node-name": "cbw", "file": "node-vda"}
    vm.qmp("blockdev-add", **filter_, target="scratch", **{"on-cbw-error": "break-snapshot"})
    path = vm.qdev("vda").removesuffix("/virtio-backend")
    vm.qmp("qom-set", path=path, property="drive", value="cbw")
    vm.qmp("cont")
    try:
        yield
    finally:
        vm.qmp("qom-set", path=path, property="drive", value="node-vda")
        vm.qmp("blockdev-del", **{"node-name": "cbw"})
        vm.qmp("blockdev-del", **{"node-name": "scratch"})
        scratch.unlink()


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Fixtures that all tiers share."""

import compileall
import pwd
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from lab.qemu import Qemu, StartQemu

# How long an example takes says more about what else the machine does than about us.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    # Where the tests run in the background of a script, what they start would ignore these.
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)


def pytest_configure(config: pytest.Config) -> None:
    """Compile the product once: where PYTHONDONTWRITEBYTECODE is set, each of thousands of processes
    would do so, which is more than half of their time."""
    if not hasattr(config, "workerinput"):
        compileall.compile_dir(Path(__file__).parents[1] / "src", quiet=2)


@pytest.fixture
def start_qemu() -> Iterator[StartQemu]:
    """Starts VMs that are ended with the test: `vm = start_qemu([Disk(…)])`, see `lab.qemu.Qemu`."""
    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(Qemu(*args, **options))


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder of the user `nobody`, where a QEMU of that user finds its images."""
    folder = Path(tempfile.mkdtemp(prefix="qmpb-nobody-", dir="/tmp"))
    folder.chmod(0o755)
    shutil.chown(folder, "nobody", pwd.getpwnam("nobody").pw_gid)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)

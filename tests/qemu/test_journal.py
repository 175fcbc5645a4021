# SPDX-License-Identifier: Apache-2.0
"""What `journalctl` finds of runs and backups of real VMs: in a real journald, of this test alone."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab import cli
from lab.disks import MIB, Disk, create
from lab.patience import PATIENCE
from lab.qemu import Qemu
from qmpbackup.cli.journal import MESSAGE_IDS
from qmpbackup.cli.log_fields import Happening

NO_JOURNAL = 99
JOURNALD = Path("/usr/lib/systemd/systemd-journald")

IN_A_JOURNAL = """
mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /var/log && mkdir -p /run/systemd/journal || exit 99
setpriv --pdeathsig KILL "$1" &
until [ -S /run/systemd/journal/stdout ] && [ -S /run/systemd/journal/socket ]; do
    kill -0 $! || exit 99
    sleep 0.01
done
shift
systemd-cat sh -c 'JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2) exec "$@"' sh "$@"
code=$?
journalctl --sync
journalctl --no-pager --all -o json SYSLOG_IDENTIFIER=qmpbackup
kill %1
wait
exit $code
"""
"""A command whose streams lead to a journald of its own, as in a unit; then what that has of it."""


def can_start_one() -> bool:
    """Whether a journald can be started that nobody else sees."""
    alone = ("unshare", "--mount", "true")
    return (
        JOURNALD.exists()
        and subprocess.run(alone, check=False, capture_output=True).returncode == 0
    )


pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not can_start_one(), reason="only root can start a journald"
)


@dataclass
class Logged:
    """What the journal has of a command."""

    code: int
    entries: list[Mapping[str, str]]

    def of(self, **fields: str) -> list[Mapping[str, str]]:
        """Entries with these fields."""
        return [each for each in self.entries if fields.items() <= each.items()]


def logged(*arguments: cli.Argument, env: Mapping[str, str]) -> Logged:
    """Run a command of ours that logs to the journal."""
    command = (cli.executable("qmpbackup"), *map(str, arguments))
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", IN_A_JOURNAL, "bash", JOURNALD, *command],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=PATIENCE,
        check=False,
    )
    if done.returncode == NO_JOURNAL:
        pytest.skip(f"no journald can be started here: {done.stderr}")
    return Logged(done.returncode, [json.loads(line) for line in done.stdout.splitlines()])


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Qemu]:
    with Qemu([Disk("vda", create(tmp_path / "vda", 2 * MIB))], name="web") as vm:
        yield vm


def test_a_run_is_found_by_vm_target_point_and_event(tmp_path: Path, web: Qemu) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f"""
[defaults]
limits = {{ pause = "1h" }}
retry = {{ times = 0 }}
[vm.web]
socket = "{web.socket}"
[vm.off]
socket = "{tmp_path}/none"
when_off = "fail"
[target.main]
location = "{tmp_path}/backup/{{vm}}"
""")
    found = logged("run", "--config", config, "--all", env={"XDG_STATE_HOME": str(tmp_path / "s")})
    assert found.code == 14
    begin, end = found.of(QMPBACKUP_VM="web")
    assert begin["MESSAGE_ID"] == MESSAGE_IDS[Happening.BEGIN]
    assert begin["MESSAGE"] == "web → main: backup begins."
    assert end["MESSAGE_ID"] == MESSAGE_IDS[Happening.END]
    assert end["PRIORITY"] == "6"
    assert end["QMPBACKUP_TARGET"] == "main"
    assert end["QMPBACKUP_EXIT"] == "0"
    listed = cli.run("list", "--target", tmp_path / "backup" / "web", "--json").check()
    assert [end["QMPBACKUP_POINT"]] == [each["id"] for each in listed.objects]
    (failure,) = found.of(MESSAGE_ID=MESSAGE_IDS[Happening.FAILURE])
    assert failure["QMPBACKUP_VM"] == "off"
    assert failure["QMPBACKUP_EXIT"] == "13"
    assert failure["PRIORITY"] == "3"
    assert {begin["QMPBACKUP_RUN"]} == {each["QMPBACKUP_RUN"] for each in (end, failure)}


def test_a_backup_by_itself_is_found_likewise(tmp_path: Path, web: Qemu) -> None:
    target = tmp_path / "target"
    found = logged("--socket", web.socket, "backup", "--target", target, env={})
    assert found.code == 0
    begin, end = found.of(QMPBACKUP_VM="web", QMPBACKUP_TARGET=str(target))
    assert begin["MESSAGE_ID"] == MESSAGE_IDS[Happening.BEGIN]
    assert end["MESSAGE_ID"] == MESSAGE_IDS[Happening.END]
    assert any("Disk vda: full" in each["MESSAGE"] for each in found.entries)
    again = logged("--socket", tmp_path / "none", "backup", "--target", target, env={})
    assert again.code == 13
    (failure,) = again.of(MESSAGE_ID=MESSAGE_IDS[Happening.FAILURE])
    assert failure["QMPBACKUP_EXIT"] == "13"

# SPDX-License-Identifier: Apache-2.0
"""A host with four VMs, one of them off and one with a dead target, in a screenful: `make demo-fleet`.

The VMs are real QEMUs without an operating system. The command lines are those that a user would type
and a timer would start. Leaves nothing behind.
"""

import json
import shlex
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path

from lab import cli, disks
from lab.demonstrating import DemoFailed, demonstrated
from lab.disks import MIB, Disk
from lab.qemu import Qemu

WIDTH = 100
CONFIGURATION = """\
[defaults]
targets = ["main"]
retry = { times = 0 }
[group.all]
sockets = "HERE/run/*.qmp"
[vm.mail]
targets = ["nas"]
[target.main]
location = "HERE/backup/{vm}"
[target.nas]
location = "restic:HERE/nas/vms"
password = { file = "HERE/password" }
[notify.ops]
type = "command"
command = ["tee", "HERE/message"]
"""


class Host:
    """What all steps share: the folder, the VMs, and how things are shown."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.vms: dict[str, Qemu] = {}
        self._environment = {
            "QMPBACKUP_CONFIG": str(folder / "config.toml"),
            "XDG_STATE_HOME": str(folder / "state"),
            "RESTIC_CACHE_DIR": str(folder / "cache"),
        }

    def say(self, text: str) -> None:
        """What happens beside the commands."""
        print(textwrap.fill(text, WIDTH), flush=True)

    def command(self, line: str, code: int = 0) -> None:
        """Run a command line of the product as typed; show what it prints, and what it ends with."""
        print(f"$ {line}", flush=True)
        program, *arguments = shlex.split(line)
        result = cli.run(*arguments, program=program, cwd=self.folder, env=self._environment)
        self._show(result.err + result.out)
        if result.code != code:
            raise DemoFailed(f"exit code {result.code} of this, and not {code}")
        if code:
            print(f"  (exit code {code})")

    def message(self) -> None:
        """Show the one message that the run sent."""
        file = self.folder / "message"
        sent = json.loads(file.read_text())
        file.unlink()
        self.say("Its message:")
        self._show(f"{sent['title']}\n{sent['text']}")

    def _show(self, text: str) -> None:
        """Paths as if the folder were the root; without what would make it more than a screenful."""
        for line in text.replace(str(self.folder), "").splitlines():
            if line and not line.endswith(" begins."):
                print(textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent=" " * 6))

    def start(self, name: str, stack: ExitStack) -> None:
        """A VM with a disk in use, whose monitor lies where the group of the configuration looks."""
        image = disks.create(self.folder / f"{name}.qcow2", 256 * MIB)
        vm = stack.enter_context(Qemu([Disk("vda", image)], name=name))
        (self.folder / "run").mkdir(exist_ok=True)
        (self.folder / "run" / f"{name}.qmp").symlink_to(vm.socket)
        vm.write("vda", 0, 8 * MIB, 1)
        self.vms[name] = vm

    def shut_down(self, name: str) -> None:
        """End a VM in order, and its monitor with it."""
        self.vms.pop(name).quit()
        (self.folder / "run" / f"{name}.qmp").unlink()

    def configure(self) -> None:
        """Write the configuration, as a user would."""
        file = self.folder / "config.toml"
        file.write_text(CONFIGURATION.replace("HERE", str(self.folder)))
        password = self.folder / "password"
        password.touch(mode=0o600)
        password.write_text("demo")
        self.say("A host's config.toml (paths are in a temporary folder):")
        self._show(file.read_text())
        made = cli.run(
            *("init", "--target", f"restic:{self.folder}/nas/vms"),
            env={**self._environment, "RESTIC_PASSWORD_FILE": str(password)},
        )
        made.check()


def demonstrate(host: Host, stack: ExitStack) -> None:
    """The whole story, top to bottom."""
    for name in ("db", "mail", "test", "web"):
        host.start(name, stack)
    host.configure()
    nas, away = host.folder / "nas", host.folder / "away"
    nas.rename(away)
    host.say("Four VMs run. The NAS is not mounted.")
    host.command("qmpbackup config check")
    host.command("qmpbackup run", 14)
    host.message()
    host.shut_down("test")
    host.say("`test` is shut down.")
    host.command("qmpbackup status")
    for vm in host.vms.values():
        vm.write("vda", 64 * MIB, 1 * MIB, 2)
    away.rename(nas)
    host.say("The others write, and the NAS is mounted again.")
    host.command("qmpbackup run --all")
    host.message()
    host.command("qmpbackup status --all")


def show(folder: Path) -> None:
    """All of it; the VMs end with it."""
    with ExitStack() as stack:
        demonstrate(Host(folder), stack)


if __name__ == "__main__":
    sys.exit(demonstrated(show))

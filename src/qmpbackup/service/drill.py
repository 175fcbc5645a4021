# SPDX-License-Identifier: Apache-2.0
"""Boot a point in a sandbox, and judge whether it comes up.

    a folder that is gone afterwards ─ serve the point ─ QEMU: the recorded devices, no network, as nobody
    ─ look at agent and serial ports until there is a verdict ─ end all ─ one line of history

The machine under drill writes to its overlays alone. As root it is run as the user `nobody`, in a network
namespace of its own and without new privileges; QEMU confines itself besides (seccomp).
"""

import json
import logging
import os
import pwd
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.durable import make_folders, storage_errors
from qmpbackup.errors import DamagedError, MonitorBusy, QuiesceError, VmError
from qmpbackup.filelock import named_lock
from qmpbackup.machine import booting
from qmpbackup.machine.agent import Agent
from qmpbackup.machine.monitor import Monitor
from qmpbackup.plan.booting import Launch
from qmpbackup.plan.verdict import BootVerdict, Observation, judged
from qmpbackup.process import Child
from qmpbackup.service.boot import Request as Boot
from qmpbackup.service.boot import make_overlays, planned, require_possible
from qmpbackup.service.boot_folder import BootFolder
from qmpbackup.service.boot_keeper import PointServer
from qmpbackup.state import state_folder
from qmpbackup.targets import opening
from qmpbackup.targets.interface import Address

log = logging.getLogger(__name__)

_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_LOOK_SECONDS = 0.5
_AGENT_SECONDS = 2.0
_EXEC_SECONDS = 60.0
_CONSOLE_BYTES = 64 * 1024
_LARGEST_BROUGHT = 512 * 1024 * 1024

_FOLDER_SECONDS = 60.0
_PLACE = Path("/var/tmp")  # noqa: S108 - folders there are made for us alone
_PREFIX = "qmpb-drill-"


@dataclass(frozen=True, slots=True)
class Request:
    """Which point to boot, for how many seconds at most, and the commands that must succeed in it."""

    target: Address
    point: str
    vm: str = ""
    seconds: float = 600.0
    commands: tuple[str, ...] = ()
    accelerators: tuple[str, ...] = ()
    lock_wait: float = 0.0


@dataclass(frozen=True, slots=True)
class Drilled:
    """How a drill ended; a line of the history."""

    target: str
    point: str
    name: str
    time: str
    verdict: BootVerdict
    reason: str
    seconds: float
    system: str = ""


class DrillFolder(BootFolder):
    """A folder for one drill, which has its sockets as well."""

    @property
    def sockets(self) -> Path:
        """Where the user may go whom QEMU runs as."""
        return self.path


def drill(request: Request) -> Drilled:
    """Boot a point, judge it, and note the verdict.

    Raises:
        DamagedError: the point is damaged; noted as a failure, too.
        VmError: it cannot be booted here.
    """
    with interrupt.held(), ExitStack() as stack:
        request = replace(request, target=opening.entrance(request.target).asked())
        folder = DrillFolder(stack.enter_context(_folder()))
        found = planned(
            Boot(
                target=request.target,
                point=request.point,
                vm=request.vm,
                accelerators=request.accelerators,
                lock_wait=request.lock_wait,
            ),
            folder,
        )
        boot, began = found.boot, time.monotonic()
        drilled = Drilled(
            boot.shown_target,
            boot.point,
            boot.name,
            f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            BootVerdict.UNKNOWN,
            "it did not come up in time",
            0.0,
        )
        require_possible(found)
        folder.store(boot)
        server = PointServer(folder, opening.entrance(request.target).environment())
        stack.callback(server.end)
        try:
            server.ensure(boot)
            make_overlays(folder, boot)
            drilled = _judged(request, folder, found.launch, drilled, began, server.require_whole)
            server.end()
            server.require_whole()
        except DamagedError as error:
            _note(replace(drilled, verdict=BootVerdict.FAIL, reason=error.message))
            raise
    _note(drilled)
    return drilled


def history() -> list[Drilled]:
    """What drills this user's history has, oldest first; lines that are none are passed over."""
    found = []
    with suppress(FileNotFoundError):
        for line in (state_folder() / "drills.jsonl").read_text().splitlines():
            with suppress(ValueError, TypeError, KeyError):
                members = json.loads(line)
                members["verdict"] = BootVerdict(members["verdict"])
                found.append(Drilled(**members))
    return found


def _note(drilled: Drilled) -> None:
    """Add a line to the history, for good."""
    path = state_folder() / "drills.jsonl"
    with storage_errors(f"write {path}"):
        make_folders(path.parent)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, json.dumps(asdict(drilled)).encode() + b"\n")
            os.fsync(fd)
        finally:
            os.close(fd)


def _remove_old() -> None:
    """Remove folders of ours that no drill has any more."""
    users = {os.geteuid()}
    if os.geteuid() == 0:
        users.add(pwd.getpwnam("nobody").pw_uid)
    for path in _PLACE.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            lock = path / "drill.lock"
            if lock.lstat().st_uid in users and not BootFolder(path).is_claimed("drill"):
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder with a short path, gone after the block, as are those of drills that were killed.

    One drill at a time makes its folder or removes those of others, which would else take a folder that
    is not claimed yet for one whose drill was killed."""
    with ExitStack() as stack:
        with named_lock("drill folders", "the folders of drills", _FOLDER_SECONDS):
            _remove_old()
            with storage_errors(f"make a folder in {_PLACE}"):
                path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_PLACE))
            stack.callback(shutil.rmtree, path, ignore_errors=True)
            stack.enter_context(BootFolder(path).claimed("drill"))
        yield path


def _judged(
    request: Request,
    folder: BootFolder,
    launch: Launch,
    drilled: Drilled,
    began: float,
    require_whole: Callable[[], None],
) -> Drilled:
    """Start the VM, look at it until there is a verdict or no time, and end it."""
    argv = [*_brought(folder, launch), "-sandbox", _SANDBOX]
    _hand_over(folder.path)
    with Child([*_confined(), *argv]) as child, _running(folder, child, require_whole) as monitor:
        looks = _Looks(launch, child)
        while time.monotonic() - began < request.seconds:
            interrupt.check()
            with suppress(VmError):
                booting.let_run(monitor)
            require_whole()
            found = judged(looks.observe())
            if found is not None:
                verdict, reason = found
                if verdict is BootVerdict.PASS and request.commands:
                    verdict, reason = looks.carry_out(request.commands, reason)
                seconds = round(time.monotonic() - began, 1)
                return replace(
                    drilled,
                    verdict=verdict,
                    reason=reason,
                    seconds=seconds,
                    system=looks.system(),
                )
            time.sleep(_LOOK_SECONDS)
        return replace(drilled, seconds=round(time.monotonic() - began, 1))


def _greeting(folder: BootFolder) -> Monitor | None:
    """Its monitor, which listens before QEMU opens the disks, and greets after."""
    try:
        return booting.reach(folder.monitor("qmp"), 1.0)
    except MonitorBusy:
        return None


@contextmanager
def _running(
    folder: BootFolder, child: Child, require_whole: Callable[[], None]
) -> Iterator[Monitor]:
    """The monitor of the VM that was started."""
    deadline = time.monotonic() + booting.START_SECONDS
    while (monitor := _greeting(folder)) is None:
        interrupt.check()
        require_whole()
        if child.ended or time.monotonic() > deadline:
            raise VmError(f"QEMU does not start: {child.end(5.0).reason.rpartition('}: ')[2]}.")
        time.sleep(_LOOK_SECONDS / 10)
    with monitor:
        yield monitor


def _confined() -> Sequence[str]:
    """What QEMU is started by: it knows none of our secrets, and as root it gives up all that root may."""
    told = ("env", "-i", *(f"{name}={said}" for name, said in booting.guest_environment().items()))
    if os.geteuid() != 0:
        return told
    account = pwd.getpwnam("nobody")
    return (
        *told,
        *("unshare", "--net", "--"),
        *("setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"),
        *("--no-new-privs", "--bounding-set=-all", "--pdeathsig=KILL", "--"),
    )


def _brought(folder: BootFolder, launch: Launch) -> list[str]:
    """The command line, with copies of the files that it needs: firmware and kernels of root's are not
    for everybody."""
    argv = list(launch.argv)
    for number, name in enumerate(launch.needs if os.geteuid() == 0 else ()):
        source = Path(name)
        with storage_errors(f"copy {source}"):
            if source.is_file() and source.stat().st_size <= _LARGEST_BROUGHT:
                copy = folder.path / f"needed-{number}"
                shutil.copyfile(source, copy)
                argv = [word.replace(name, str(copy)) for word in argv]
    return argv


def _hand_over(folder: Path) -> None:
    """Give the folder to the user whom QEMU runs as."""
    if os.geteuid() == 0:
        account = pwd.getpwnam("nobody")
        with storage_errors(f"hand {folder} over"):
            for each in (folder, *folder.iterdir()):
                os.chown(each, account.pw_uid, account.pw_gid, follow_symlinks=False)


class _Looks:
    """Looks at a VM again and again."""

    def __init__(self, launch: Launch, child: Child) -> None:
        self._launch = launch
        self._child = child
        self._console = ""
        self._since = time.monotonic()
        self._agent: Agent | None = None

    def observe(self) -> Observation:
        """What is seen now."""
        text = "".join(_tail(Path(each)) for each in self._launch.consoles)
        if text != self._console:
            self._console, self._since = text, time.monotonic()
        ended = self._child.end(5.0).reason if self._child.ended else ""
        if self._agent is None and self._launch.agent and not ended:
            with suppress(QuiesceError):
                self._agent = Agent.connect(self._launch.agent, _AGENT_SECONDS)
        return Observation(
            console=text,
            still=time.monotonic() - self._since,
            agent=self._agent is not None,
            has_agent=bool(self._launch.agent),
            ended=ended,
        )

    def system(self) -> str:
        """What the guest calls its operating system."""
        if self._agent is None:
            return ""
        with suppress(QuiesceError):
            found = self._agent.execute("guest-get-osinfo")
            if isinstance(found, dict):
                return str(found.get("pretty-name", ""))[:200]
        return ""

    def carry_out(self, commands: Sequence[str], reason: str) -> tuple[BootVerdict, str]:
        """Have the guest carry out commands that must succeed."""
        if self._agent is None:
            return BootVerdict.UNKNOWN, "there is no guest agent to carry out --exec"
        for command in commands:
            try:
                code = self._carried_out(self._agent, command)
            except QuiesceError as error:
                return BootVerdict.UNKNOWN, f"{command!r} could not be carried out: {error.message}"
            if code != 0:
                return BootVerdict.FAIL, f"{command!r} ended with {code} in the guest"
        return BootVerdict.PASS, f"{reason}, and {len(commands)} commands succeeded"

    @staticmethod
    def _carried_out(agent: Agent, command: str) -> int:
        arguments = {"path": "/bin/sh", "arg": ["-c", command], "capture-output": False}
        begun = agent.execute("guest-exec", arguments)
        pid = begun.get("pid") if isinstance(begun, dict) else None
        deadline = time.monotonic() + _EXEC_SECONDS
        while time.monotonic() < deadline:
            interrupt.check()
            state = agent.execute("guest-exec-status", {"pid": pid})
            if isinstance(state, dict) and state.get("exited"):
                return int(state.get("exitcode", -int(state.get("signal", 1))))
            time.sleep(_LOOK_SECONDS / 5)
        raise QuiesceError("It does not end.")


def _tail(path: Path) -> str:
    """The end of what a serial port has printed."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _CONSOLE_BYTES))
        return file.read(_CONSOLE_BYTES).decode(errors="replace")
    return ""

# SPDX-License-Identifier: Apache-2.0
"""A look at the VMs and targets of a configuration: what `doctor` says of each, in a process of its own."""

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from qmpbackup import process
from qmpbackup.errors import QmpBackupError
from qmpbackup.fleet import secrets
from qmpbackup.fleet.config.loading import host_name
from qmpbackup.fleet.settings import Configuration, TargetSettings, VmSettings, WhenOff
from qmpbackup.plan.finding import Health

OFF: Final = 13
"""Exit code of a command whose VM is off."""
_NOTHING_YET: Final = 10
_AT_ONCE: Final = 4
_SECONDS: Final = 600.0


@dataclass(frozen=True, slots=True)
class Looked:
    """What was found of a VM and a target (or of a target alone): findings as `doctor --json` prints them,
    and why nobody could look, if so."""

    vm: str
    target: str
    findings: tuple[dict[str, Any], ...] = ()
    problem: str = ""
    is_off: bool = False

    @property
    def is_well(self) -> bool:
        """Whether nothing would keep a backup from working."""
        return not self.problem and all(each["health"] != Health.PROBLEM for each in self.findings)

    def lines(self) -> Iterator[str]:
        """What is not well, for people; else that all is."""
        name = " → ".join(filter(None, (self.vm, self.target)))
        if self.problem:
            yield f"{name}: {self.problem}"
        for each in self.findings:
            if each["health"] != Health.FINE:
                yield f"{name}: {each['health']}: {each['about']}: {each['text']}"
                if each["todo"]:
                    yield f"{'':<{len(name)}}  → {each['todo']}"
        if self.is_well:
            yield f"{name}: {'off' if self.is_off else 'nothing would keep a backup from working'}"


def look(configuration: Configuration) -> Iterator[Looked]:
    """What is found of all VMs in each of their targets, and of repositories that are for all of them."""
    work = [
        partial(_vm, vm, configuration.target(name))
        for vm in configuration.vms
        if vm.enabled
        for name in vm.targets
    ]
    work += [
        partial(_repository, target)
        for target in configuration.targets
        if target.location.startswith("restic:") and "{" not in target.location
    ]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from pool.map(lambda each: each(), work)


def _vm(vm: VmSettings, target: TargetSettings) -> Looked:
    words = ["--socket", vm.socket, *(["--agent-socket", vm.agent] if vm.agent else [])]
    words += ["doctor", "--json", "--target", target.place(vm, host_name())]
    words += ["--scratch", vm.scratch] if vm.scratch else []
    try:
        done = _run(words, target)
        findings = tuple(json.loads(line) for line in done.output.splitlines())
    except (QmpBackupError, ValueError) as error:
        return Looked(vm.name, target.name, problem=str(error))
    is_off = done.code == OFF and vm.when_off is not WhenOff.FAIL
    failed = done.code not in {0, 1} or not findings
    problem = done.messages.strip() if failed and not is_off else ""
    return Looked(vm.name, target.name, findings, problem, is_off)


def _repository(target: TargetSettings) -> Looked:
    try:
        done = _run(["list", "--json", "--target", target.location], target)
    except QmpBackupError as error:
        return Looked("", target.name, problem=str(error))
    problem = done.messages.strip() or done.reason if done.code else ""
    return Looked("", target.name, problem=problem)


def _run(words: list[str], target: TargetSettings) -> process.Result:
    return process.run(
        [sys.executable, "-m", "qmpbackup", *words],
        environment=secrets.environment(target),
        timeout=_SECONDS,
    )

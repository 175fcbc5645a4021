# SPDX-License-Identifier: Apache-2.0
"""A look at the VMs and targets of a configuration: what `doctor` says of each, in a process of its own."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from qmpbackup import process
from qmpbackup.errors import NobodyThere, QmpBackupError
from qmpbackup.fleet import secrets
from qmpbackup.fleet.config.loading import host_name
from qmpbackup.fleet.settings import Configuration, TargetSettings, VmSettings, WhenOff
from qmpbackup.plan.finding import Health

_LOCK_WAIT: Final = "60"
"""Seconds that a VM may be busy with a backup."""
_AT_ONCE: Final = 4
_SECONDS: Final = 600.0


@dataclass(frozen=True, slots=True)
class Examined:
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


def look(configuration: Configuration) -> Iterator[Examined]:
    """What is found of all VMs in each of their targets, and of repositories that no VM was looked at in."""
    vms = [each for each in configuration.vms if each.enabled]
    seen: set[str] = set()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for found in pool.map(partial(_vm, configuration), vms):
            seen |= {each.target for each in found if each.findings}
            yield from found
        left = (each for each in configuration.targets if each.name not in seen)
        yield from pool.map(_repository, (each for each in left if _is_of_all(each)))


def _is_of_all(target: TargetSettings) -> bool:
    return target.location.startswith("restic:") and "{" not in target.location


def _vm(configuration: Configuration, vm: VmSettings) -> list[Examined]:
    """One target after the other: a VM has one lock."""
    return [_in_target(vm, configuration.target(name)) for name in vm.targets]


def _in_target(vm: VmSettings, target: TargetSettings) -> Examined:
    words = ["--socket", vm.socket, *(["--agent-socket", vm.agent] if vm.agent else [])]
    words += ["doctor", "--json", "--lock-wait", _LOCK_WAIT]
    words += ["--target", target.place(vm, host_name())]
    words += ["--scratch", vm.scratch] if vm.scratch else []
    try:
        done = _run(words, target)
        findings = tuple(json.loads(line) for line in done.output.splitlines())
    except (QmpBackupError, ValueError) as error:
        return Examined(vm.name, target.name, problem=str(error))
    is_off = done.code == NobodyThere.exit_code and vm.when_off is not WhenOff.FAIL
    failed = done.code not in {0, 1} or not findings
    return Examined(
        vm.name, target.name, findings, _said(done) if failed and not is_off else "", is_off
    )


def _repository(target: TargetSettings) -> Examined:
    """Whether it opens."""
    try:
        done = _run(["status", "--json", "--target", target.location], target)
    except QmpBackupError as error:
        return Examined("", target.name, problem=str(error))
    return Examined("", target.name, problem=_said(done) if done.code else "")


def _said(done: process.Result) -> str:
    lines = (line.removeprefix("error: ") for line in done.messages.splitlines())
    return " ".join(lines) or done.reason


def _run(words: list[str], target: TargetSettings) -> process.Result:
    return process.run(
        process.ours(*words),
        environment=secrets.environment(target),
        timeout=_SECONDS,
    )

# SPDX-License-Identifier: Apache-2.0
"""What is right as it is written, and yet may be other than somebody wants: warnings of `config check`."""

import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from shutil import which

from qmpbackup.fleet import secrets
from qmpbackup.fleet.config.loading import Loaded
from qmpbackup.fleet.config.sockets import SocketPattern
from qmpbackup.fleet.settings import Configuration, Fault, Secret
from qmpbackup.plan.calendar import next_after
from qmpbackup.targets import opening


def warnings(loaded: Loaded) -> Iterator[Fault]:
    """All of them."""
    configuration = loaded.configuration
    files = {each.name: each.file for each in loaded.tables.tables.values()}
    for key, sentence in (
        *_about_vms(configuration),
        *_about_targets(configuration),
        *_about_secrets(configuration),
    ):
        table = ".".join(key.split(".")[:2])
        yield Fault(files.get(table, loaded.tables.main), key, sentence, is_warning=True)
    if not configuration.notify:
        said = "There is no [notify.NAME]: nobody is told when something is wrong."
        yield Fault(loaded.tables.main, "notify", said, is_warning=True)
    for file in dict.fromkeys((loaded.tables.main, *files.values())):
        yield from _about_file(file)


def _about_vms(configuration: Configuration) -> Iterator[tuple[str, str]]:
    if not configuration.vms and not configuration.groups:
        yield "", "It names no VM: add a [group.NAME] or a [vm.NAME]."
    found = {each.group for each in configuration.vms}
    for group in configuration.groups:
        if group.name not in found and not SocketPattern.parse(group.sockets).present():
            yield f"group.{group.name}", f"It finds no socket ({group.sockets})."
    now = datetime.now(UTC)
    for vm in configuration.vms:
        key = f"vm.{vm.name}"
        if not vm.enabled:
            yield key, "It is not enabled: nothing is done for it."
        elif not vm.schedule:
            yield key, "It has no `schedule`: it is backed up by hand alone."
        elif next_after(vm.schedule, now) is None:
            yield f"{key}.schedule", "None of its times will ever come."
    for socket in configuration.uncovered:
        yield "uncovered", f"{socket}: no group or VM takes it."


def _about_targets(configuration: Configuration) -> Iterator[tuple[str, str]]:
    used = {name for vm in configuration.vms for name in vm.targets}
    for target in configuration.targets:
        key = f"target.{target.name}"
        if not target.keep:
            yield key, "It has no `keep`: no point is ever removed."
        elif which("restic") is None and opening.holds_several(target.location):
            yield f"{key}.keep", "The program restic, which removes points, is not installed."
        if not target.verify.every:
            yield f"{key}.verify", "Its points are never verified."
        if configuration.vms and target.name not in used:
            yield key, "No VM uses it."


def _about_secrets(configuration: Configuration) -> Iterator[tuple[str, str]]:
    for target in configuration.targets:
        key = f"target.{target.name}"
        yield from _about_secret(f"{key}.password", target.password)
        for name, value in target.environment.items():
            yield from _about_secret(f"{key}.environment.{name}", value)
    for notify in configuration.notify:
        for name in ("password", "token", "url"):
            yield from _about_secret(f"notify.{notify.name}.{name}", getattr(notify, name))


def _about_secret(key: str, secret: Secret | str | None) -> Iterator[tuple[str, str]]:
    path = secrets.file_of(secret) if isinstance(secret, Secret) else None
    if path is None:
        return
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        yield (
            key,
            f"There is no {path}, unless systemd hands it over to the unit (LoadCredential=).",
        )
    except OSError as error:
        yield key, f"{path} cannot be looked at: {error.strerror}."
    else:
        if mode & 0o077:
            yield key, f"{path} is {mode:04o}: others may read it; make it 0600."


def _about_file(file: str) -> Iterator[Fault]:
    try:
        mode = stat.S_IMODE(Path(file).stat().st_mode)
    except OSError:
        return  # which is said where it was to be read
    if mode & 0o022:
        said = f"It is {mode:04o}: others may write to it, and so decide what root does."
        yield Fault(file, "", said, is_warning=True)

# SPDX-License-Identifier: Apache-2.0
"""The command lines of the work, and what is read from their answers. Pure: no secret is in a line, as
they are for everybody to read. Names and paths stand behind a `=`, as they may begin with a dash."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from qmpbackup.fleet.records import DEGRADED, Attempt, Work
from qmpbackup.fleet.settings import Freezing, Keep, VmSettings
from qmpbackup.model import Level

_LOCK_WAIT: Final = ("--lock-wait", "60")
_LONGEST_REASON: Final = 2000


def backup(vm: VmSettings, place: str, *, full: bool = False, chunked: bool = False) -> list[str]:
    """Back up a VM; `chunked`: into a repository, where some options mean nothing, and others something."""
    words = [f"--socket={vm.socket}"]
    words += [f"--agent-socket={vm.agent}"] if vm.agent else []
    words += ["backup", "--json", f"--target={place}", *_LOCK_WAIT]
    words += ["--level", Level.FULL.value if full else vm.level.value]
    words += _freezing(vm)
    for option, names in (("--include", vm.include), ("--exclude", vm.exclude)):
        words += [f"{option}={name}" for name in names]
    words += _speed(vm)
    words += [f"--scratch={vm.scratch}"] if vm.scratch else []
    if chunked:
        words += ["--check-written"] if vm.check_written else []
        return [*words, "--audit", f"{vm.audit * 100:g}%"]
    words += ["--verify-chain"] if vm.verify_chain else []
    return [*words, *(["--compress"] if vm.compress else [])]


def _speed(vm: VmSettings) -> list[str]:
    return ["--speed-limit", str(vm.limits.speed)] if vm.limits.speed else []


def _freezing(vm: VmSettings) -> list[str]:
    match vm.quiesce:
        case Freezing.NO:
            return []
        case Freezing.AUTO:
            return ["--quiesce=try"] if vm.agent else []
        case wanted:
            return [f"--quiesce={wanted.value}"]


def offline(vm: VmSettings, place: str, whose: str) -> list[str]:
    """Back up the images of a VM that is off; `whose` are its points, as `--vm` takes it."""
    words = ["backup", "--offline", "--json", f"--target={place}", *_LOCK_WAIT, *_speed(vm)]
    return [*words, *_of(whose)]


def forget(place: str, whose: str, keep: Keep, *, sweeps_later: bool) -> list[str]:
    """Remove the points of a VM that are not to be kept."""
    words = ["prune", "--json", f"--target={place}", *_LOCK_WAIT, *_of(whose)]
    words += ["--no-sweep"] if sweeps_later else []
    for name in ("last", "hourly", "daily", "weekly", "monthly", "yearly"):
        count = getattr(keep, name)
        words += [f"--keep-{name}", str(count)] if count else []
    words += ["--keep-within", keep.within] if keep.within else []
    return [*words, *(f"--keep-tag={tag}" for tag in keep.tag)]


def sweep(place: str) -> list[str]:
    """Remove from a repository what no point needs any more."""
    return ["sweep", "--json", f"--target={place}", *_LOCK_WAIT]


def verify(place: str, whose: str, share: float) -> list[str]:
    """Prove the points of a VM whole, reading a share of the data where that may be chosen."""
    words = ["verify", "--json", f"--target={place}", *_LOCK_WAIT, *_of(whose)]
    return [*words, *((f"--read-data={share * 100:g}%",) if share else ())]


def drill(vm: VmSettings, place: str, whose: str) -> list[str]:
    """See whether the newest point of a VM boots."""
    words = ["drill", "--json", f"--target={place}", *_LOCK_WAIT]
    words += ["--within", f"{vm.drill.timeout:g}", f"--ready={vm.drill.ready}"]
    return [*words, *_of(whose)]


def _of(whose: str) -> list[str]:
    return [f"--vm={whose}"] if whose else []


# Answers


def ended(attempt: Attempt, code: int, output: bytes, messages: str, longest: float) -> Attempt:
    """An attempt with what its command said. A point whose VM stood still for longer than `longest`
    seconds is degraded."""
    said = tuple(_objects(output))
    attempt = replace(
        attempt, exit_code=code, reason=_reason(code, messages, said)[:_LONGEST_REASON]
    )
    point = next((each["point"] for each in said if isinstance(each.get("point"), dict)), None)
    if attempt.work is not Work.BACKUP or point is None:
        return attempt
    disks = [each for each in point.get("disks", ()) if isinstance(each, dict)]
    attempt = replace(
        attempt,
        point=str(point.get("id", "")),
        level=str(point.get("level", "")),
        consistency=attempt.consistency or str(point.get("consistency", "")),
        added=sum(int(_number(each.get("file_size"))) for each in disks),
        pause=_number(point.get("pause")),
    )
    if code == 0 and attempt.pause > longest:
        said_so = f"The VM stood still for {attempt.pause:.1f} s."
        return replace(attempt, exit_code=DEGRADED, reason=said_so)
    return attempt


def identity(output: bytes) -> tuple[str, str, str]:
    """UUID, host and name of the VM of the point that a backup has made; empty without one."""
    for each in _objects(output):
        point = each.get("point")
        vm = point.get("vm") if isinstance(point, dict) else None
        if isinstance(vm, dict):
            return str(vm.get("uuid", "")), str(vm.get("host", "")), str(vm.get("name", ""))
    return "", "", ""


def images(output: bytes) -> tuple[str, ...]:
    """Files of the host that the point was made from which a backup has made."""
    points = (each.get("point") for each in _objects(output))
    disks = (each.get("disks") for each in points if isinstance(each, dict) and "disks" in each)
    found = (disk for each in disks if isinstance(each, list) for disk in each)
    files = (each.get("source_file") for each in found if isinstance(each, dict))
    return tuple(each for each in files if isinstance(each, str) and each)


def whose(uuid: str, host: str, name: str) -> str:
    """How `--vm` is told whose points are meant, in a repository."""
    return uuid or (f"{host}/{name}" if host and name else name)


def _number(value: object) -> float:
    return value if isinstance(value, int | float) else 0.0


def _objects(output: bytes) -> Iterator[Mapping[str, Any]]:
    for line in output.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _reason(code: int, messages: str, said: Sequence[Mapping[str, Any]]) -> str:
    """Why not all was well, in the command's own words."""
    if code == 0:
        return ""
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    degraded = [str(each) for one in said for each in one.get("degraded", ()) or ()]
    alarms = [str(one["alarm"]) for one in said if one.get("alarm")]
    reasons = [
        str(one["reason"]) for one in said if one.get("type") == "drill" and one.get("reason")
    ]
    problems = [str(each) for one in said for each in one.get("problems", ()) or ()]
    found = errors or alarms or degraded or reasons or problems[:3]
    if found:
        return " ".join(found)
    if code < 0:
        return f"It was ended by signal {-code}."
    return lines[-1] if lines else f"It ended with exit code {code}."

# SPDX-License-Identifier: Apache-2.0
"""What the configuration says, resolved: every key has its value, whichever table it came from.

Times are seconds, sizes bytes, shares 0 to 1. Names of VMs, targets and groups are those of their
tables, or what a group's pattern found. Must not know how it was written down, nor what is done with it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from qmpbackup.model import AUDIT, Level
from qmpbackup.plan.verdict import Ready

HOUR = 3600.0
DAY = 24 * HOUR

_NAME = re.compile(r"\{(vm|group|host)\}")


class WhenOff(StrEnum):
    """What is done for a VM that is off: nothing, a backup of its images, or an alarm."""

    SKIP = "skip"
    OFFLINE = "offline"
    FAIL = "fail"


class WhenGone(StrEnum):
    """Whether a target that is not there is an alarm."""

    FAIL = "fail"
    SKIP = "skip"


class Freezing(StrEnum):
    """Whether file systems are frozen for the instant. `AUTO`: tried where an agent is named."""

    AUTO = "auto"
    REQUIRE = "require"
    TRY = "try"
    NO = "no"


@dataclass(frozen=True, slots=True)
class Secret:
    """Where a secret is; never what it is. One of the three is given: `credential` is a name in
    systemd's folder of credentials or in ours, `command` prints it."""

    credential: str = ""
    file: str = ""
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Retry:
    """How often, and how long after, what may pass is tried again."""

    times: int = 2
    wait: float = 600.0


@dataclass(frozen=True, slots=True)
class Limits:
    """`speed`: bytes a second for a disk (0: none). A longer stop than `pause` makes a point degraded."""

    speed: int = 0
    pause: float = 1.0


@dataclass(frozen=True, slots=True)
class DrillPolicy:
    """How often (0: never) a newest point is booted, by what it is judged, how long that may take."""

    every: float = 0.0
    ready: Ready = Ready.ANY
    timeout: float = 600.0


@dataclass(frozen=True, slots=True)
class VmSettings:
    """One VM. `targets` are names of targets that can be used, at least one. `schedule` holds times in systemd's OnCalendar syntax; `grace` is how long after a missed
    time its newest point is too old (None: half the interval, between an hour and twelve).
    `group` is the one that found it (empty: it has a table of its own alone)."""

    name: str
    socket: str
    group: str = ""
    agent: str = ""
    enabled: bool = True
    targets: tuple[str, ...] = ()
    schedule: tuple[str, ...] = ("02:30",)
    grace: float | None = None
    level: Level = Level.AUTO
    full_every: float = 0.0
    quiesce: Freezing = Freezing.AUTO
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    when_off: WhenOff = WhenOff.SKIP
    off_age: float = 30 * DAY
    retry: Retry = Retry()
    limits: Limits = Limits()
    scratch: str = ""
    compress: bool = False
    audit: float = AUDIT
    check_written: bool = False
    verify_chain: bool = False
    drill: DrillPolicy = DrillPolicy()


def in_place(text: str, vm: VmSettings, host: str) -> str:
    """Text with names in place of `{vm}`, `{group}` and `{host}`."""
    names = {"vm": vm.name, "group": vm.group, "host": host}
    return _NAME.sub(lambda found: names[found[1]], text)


@dataclass(frozen=True, slots=True)
class Keep:
    """Which points stay, as `prune` means it; without any rule nothing is ever removed."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: str = ""
    tag: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self != Keep()


@dataclass(frozen=True, slots=True)
class SweepPolicy:
    """How often what no point needs any more is removed from a repository (0: never), and when."""

    every: float = 7 * DAY
    window: str = ""


@dataclass(frozen=True, slots=True)
class VerifyPolicy:
    """How often points are verified (0: never), how much of the data is read then, and how often all."""

    every: float = 7 * DAY
    read_data: float = 0.02
    whole: float = 90 * DAY


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes a second for all that runs into a target, `during` certain hours (empty: at any time)."""

    limit: int
    during: str = ""


@dataclass(frozen=True, slots=True)
class TargetSettings:
    """One target. `location` is what `--target` takes, and may hold `{vm}`, `{group}`, `{host}`."""

    name: str
    location: str
    password: Secret | None = None
    environment: Mapping[str, str | Secret] = field(default_factory=dict)
    keep: Keep = Keep()
    sweep: SweepPolicy = SweepPolicy()
    verify: VerifyPolicy = VerifyPolicy()
    parallel: int = 2
    bandwidth: tuple[Bandwidth, ...] = ()
    min_free: float = 0.05
    when_gone: WhenGone = WhenGone.FAIL

    def place(self, vm: VmSettings, host: str) -> str:
        """Where the points of a VM are, as `--target` takes it."""
        return in_place(self.location, vm, host)


class NotifyType(StrEnum):
    """By what people are told."""

    MAIL = "mail"
    WEBHOOK = "webhook"
    HEALTHCHECKS = "healthchecks"
    NTFY = "ntfy"
    COMMAND = "command"
    APPRISE = "apprise"


class Event(StrEnum):
    """What people may be told of. `ALWAYS`: every run."""

    FAILED = "failed"
    LATE = "late"
    DAMAGED = "damaged"
    DEGRADED = "degraded"
    UNCOVERED = "uncovered"
    CONFIG = "config"
    RECOVERED = "recovered"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class NotifySettings:
    """One way in which people are told. `url` is that of the service; `smtp` a server as HOST[:PORT]
    (empty: the local sendmail)."""

    name: str
    type: NotifyType
    to: tuple[str, ...] = ()
    sender: str = ""
    url: str | Secret = ""
    smtp: str = ""
    user: str = ""
    password: Secret | None = None
    token: Secret | None = None
    command: tuple[str, ...] = ()
    on: frozenset[Event] = frozenset(Event) - {Event.ALWAYS}
    repeat: float = DAY
    timeout: float = 10.0
    log: bool = False


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How runs go. `watch` are globs of sockets that should belong to somebody (None: those beside the
    sockets of any group or VM). Outside of `window` nothing is started."""

    parallel: int = 1
    watch: tuple[str, ...] | None = None
    window: str = ""
    history: float = 400 * DAY


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """VMs that are found: `sockets` is a glob in whose file name the one `*` is the VM's name."""

    name: str
    sockets: str
    excepted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is wrong with the configuration. `subject` is the table that it switches off, such
    as `vm.db1` (empty: all of it)."""

    file: str
    key: str
    sentence: str
    subject: str = ""
    is_warning: bool = False

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.file, self.key, self.sentence)))


@dataclass(frozen=True, slots=True)
class Configuration:
    """All of it, for VMs that were found at one time.

    `invalid` holds names of VMs, targets and so on whose tables are switched off by a problem, as
    `vm.db1` or `target.offsite`; a VM whose targets are all switched off is invalid itself.
    """

    run: RunSettings = RunSettings()
    groups: tuple[GroupSettings, ...] = ()
    vms: tuple[VmSettings, ...] = ()
    targets: tuple[TargetSettings, ...] = ()
    notify: tuple[NotifySettings, ...] = ()
    textfile: str = ""
    uncovered: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()

    @property
    def is_usable(self) -> bool:
        """Whether anything can be run by it."""
        return not any(not each.subject and not each.is_warning for each in self.faults)

    @property
    def invalid(self) -> tuple[str, ...]:
        """Tables that are switched off, each once."""
        subjects = (each.subject for each in self.faults if not each.is_warning)
        return tuple(dict.fromkeys(filter(None, subjects)))

    def target(self, name: str) -> TargetSettings:
        """The target of this name; it must be one."""
        return next(each for each in self.targets if each.name == name)

# SPDX-License-Identifier: Apache-2.0
"""The one table of all keys: name, kind, default and a sentence for each.

What reads files, prints an example, writes the reference page and the schema for editors stands on it.
To add a key: a row here, and a member in `fleet.settings`.
"""

from dataclasses import dataclass
from typing import Final

from qmpbackup.fleet.config import addresses, kinds
from qmpbackup.fleet.config.kinds import OrSecret, choice, number, one, span
from qmpbackup.fleet.config.shapes import Keyed, Many, Mapped, OrWord, Row
from qmpbackup.fleet.settings import (
    Bandwidth,
    DrillPolicy,
    Event,
    Freezing,
    Keep,
    Limits,
    NotifyType,
    Retry,
    SweepPolicy,
    VerifyPolicy,
    WhenGone,
    WhenOff,
)
from qmpbackup.model import Level
from qmpbackup.plan.verdict import Ready

NEVER: Final = span(empty=0.0)
ADDRESS: Final = one("socket: a path, or `tcp:HOST:PORT`", addresses.address)
FOLDER: Final = one("folder", addresses.folder)
NAMES: Final = Many(kinds.SOME_TEXT)

RUN: Final = (
    Row("parallel", number(1, 32), 1, "VMs that are backed up at once on this host."),
    Row(
        "watch",
        OrWord("auto", Many(kinds.PATH)),
        "auto",
        "Globs of sockets that should belong to a group or a VM; those that do not are told as uncovered. "
        "`auto`: sockets that are named like those of any group or VM. `[]`: none.",
    ),
    Row(
        "window",
        kinds.WINDOW,
        "",
        "Hours outside of which nothing is started; what runs goes on. Empty: always.",
        "20:00-06:00",
    ),
    Row("history", span(), "400d", "How long the history of runs is kept."),
)

VM: Final = (
    Row("enabled", kinds.FLAG, True, "Whether anything is done for it at all."),
    Row(
        "targets",
        NAMES,
        [],
        "Names of targets, one after the other. None: all of the file.",
        ["main"],
    ),
    Row(
        "schedule",
        Many(kinds.ON_CALENDAR, or_one=True),
        "02:30",
        "When a backup is due, as systemd writes times, or several of them; missed times are made up for "
        'once. `""`: only by hand.',
        ["Mon..Sat 02:30", "Sun 12:00"],
    ),
    Row(
        "grace",
        OrWord("auto", span()),
        "auto",
        "How long after a missed time the newest point is too old. `auto`: half the interval, between an "
        "hour and twelve (daily: a point of 36 hours is too old).",
    ),
    Row(
        "level",
        choice((Level.AUTO, Level.INC, Level.FULL), Level),
        "auto",
        "`auto`: what has changed where that is possible, else everything, for each disk.",
    ),
    Row(
        "full_every",
        NEVER,
        "",
        "(folders) How often everything is copied again, to begin a new chain. Empty: never.",
        "90d",
    ),
    Row(
        "quiesce",
        choice(Freezing, Freezing),
        "auto",
        "Whether the guest's file systems are frozen for the instant. `auto`: tried where an agent is named. "
        "`try`: goes on without. `require`: no point without.",
    ),
    Row("agent", one(ADDRESS.word, addresses.agent), "", "The socket of its guest agent.", "/run/qemu/{vm}.qga"),
    Row("include", NAMES, [], "Only these disks.", ["disk0"]),
    Row("exclude", NAMES, [], "All but these disks.", ["swap"]),
    Row(
        "when_off",
        choice(WhenOff, WhenOff),
        "skip",
        "What is done while it is off. `offline`: its images are backed up once, and again when it ran since or "
        "somebody wrote to them. `fail`: that is an alarm.",
    ),
    Row(
        "off_age",
        span(),
        "30d",
        "How old the newest point of a VM that is off may become without an alarm.",
    ),
    Row(
        "retry",
        Keyed(
            Retry,
            (
                Row("times", number(0, 20), 2, "How often."),
                Row("wait", span(), "10m", "How long after."),
            ),
        ),
        {},
        "What is tried again, after all others: exits 5, 6, 7 and 11.",
    ),
    Row(
        "limits",
        Keyed(
            Limits,
            (
                Row("speed", kinds.RATE, 0, "Bytes a second for a disk; 0: no limit."),
                Row("pause", span(), "1s", "A longer stop of the VM makes a point degraded."),
            ),
        ),
        {},
        "How much a backup may cost the VM.",
    ),
    Row("scratch", one(FOLDER.word, addresses.scratch), "", "Where old data is kept meanwhile. Empty: beside each disk.", "/var/lib/scratch"),
    Row("compress", kinds.FLAG, False, "(folders) Whether backups are compressed."),
    Row("audit", kinds.SHARE, "0.1%", "(repositories) The share of unchanged data that is read again."),
    Row("check_written", kinds.FLAG, False, "(repositories) Whether what is stored is read back."),
    Row("verify_chain", kinds.FLAG, False, "(folders) Whether the chain is verified before it grows."),
    Row(
        "drill",
        Keyed(
            DrillPolicy,
            (
                Row("every", NEVER, "", "How often. Empty: never.", "7d"),
                Row(
                    "ready",
                    choice(Ready, Ready),
                    "any",
                    "What proves that it came up, as `drill --ready` means it.",
                ),
                Row("timeout", span(), "10m", "How long it may take to come up."),
            ),
        ),
        {},
        "Whether its newest point is booted in a sandbox to see that it comes up.",
        {"every": "7d"},
    ),
)  # fmt: skip

GROUP: Final = (
    Row(
        "sockets",
        one("path with one `*`", addresses.sockets_of),
        None,
        "The QMP sockets of its VMs, with one `*`. A VM is named after its file up to what follows the `*` "
        "(`/run/qemu/web-*.qmp` finds `web-1`), also while it is off; or after what `{vm}` stands for, "
        "where that is written in place of `*` (`/run/qmp-{vm}.sock`).",
        "/run/qemu/*.qmp",
        is_required=True,
    ),
    Row(
        "except",
        NAMES,
        [],
        "Names, or globs of names, that are left out on purpose.",
        ["*-test"],
        member="excepted",
    ),
)

OWN: Final = (
    Row(
        "socket",
        ADDRESS,
        "",
        "Its QMP socket. Without it, the VM is one of a group, with other values.",
        "/run/db1.qmp",
    ),
)

_COUNTS: Final = tuple(
    Row(name, kinds.COUNT, 0, sentence)
    for name, sentence in (
        ("last", "The newest points."),
        ("hourly", "The newest point of each of so many hours that have one."),
        ("daily", "Likewise, days."),
        ("weekly", "Likewise, weeks."),
        ("monthly", "Likewise, months."),
        ("yearly", "Likewise, years."),
    )
)

TARGET: Final = (
    Row(
        "location",
        one("folder, or `restic:` and a location", addresses.location),
        None,
        "Where points live, as `--target` takes it. `{vm}`, `{group}` and `{host}` stand for names; a folder "
        "is for one VM, so it needs `{vm}`.",
        "/backup/{vm}",
        is_required=True,
    ),
    Row("password", kinds.SECRET, None, "That of the repository.", {"credential": "offsite"}),
    Row(
        "environment",
        Mapped(OrSecret(kinds.TEXT), addresses.wrong_variable),
        {},
        "Variables for access to a repository, as restic takes them.",
        {"AWS_ACCESS_KEY_ID": "AK…", "AWS_SECRET_ACCESS_KEY": {"credential": "offsite-s3"}},
    ),
    Row(
        "keep",
        Keyed(
            Keep,
            (
                *_COUNTS,
                Row("within", kinds.WITHIN, "", "All that are newer than this before the newest."),
                Row("tag", NAMES, [], "(repositories) All that have these tags of restic's."),
            ),
        ),
        {},
        "Which points stay, as `prune` means it. Nothing: no point is ever removed.",
        {"daily": 7, "weekly": 4, "monthly": 12},
    ),
    Row(
        "sweep",
        Keyed(
            SweepPolicy,
            (
                Row("every", NEVER, "7d", "How often. Empty: never."),
                Row("window", kinds.WINDOW, "", "Only in these hours."),
            ),
        ),
        {},
        "(repositories) When data that no point needs any more is removed, once for all VMs.",
    ),
    Row(
        "verify",
        Keyed(
            VerifyPolicy,
            (
                Row("every", NEVER, "7d", "How often. Empty: never."),
                Row("read_data", kinds.SHARE, "2%", "The share of data that is read then."),
                Row("whole", NEVER, "90d", "How often all of it is read. Empty: never."),
            ),
        ),
        {},
        "When it is proved that points can be read.",
    ),
    Row("parallel", number(1, 32), 2, "VMs that are backed up into it at once from this host."),
    Row(
        "bandwidth",
        Many(
            Keyed(
                Bandwidth,
                (
                    Row("during", kinds.WINDOW, "", "In these hours; empty: at any time."),
                    Row("limit", kinds.RATE, None, "Bytes a second.", "20M", is_required=True),
                ),
                "table with `during` (hours) and `limit` (bytes a second, or as in `20M`)",
            )
        ),
        [],
        "Bytes a second of backups into it from this host, divided among those that run; the first whose hours fit counts.",
        [{"during": "Mon..Fri 08:00-18:00", "limit": "20M"}, {"limit": "200M"}],
    ),
    Row("min_free", kinds.SHARE, "5%", "(folders) Where less is free, nothing is started."),
    Row(
        "when_gone",
        choice(WhenGone, WhenGone),
        "fail",
        "`skip`: it is not always there, such as a disk that is taken away: then what is due is due "
        "until it is there. One that is there and fails is a failure all the same.",
    ),
)

NOTIFY: Final = (
    Row(
        "type",
        choice(NotifyType, NotifyType),
        None,
        "By what people are told.",
        "mail",
        is_required=True,
    ),
    Row("to", Many(kinds.SOME_TEXT, or_one=True), [], "(mail) Addresses.", ["ops@example.org"]),
    Row("from", kinds.TEXT, "", "(mail) The sender.", "qmpbackup@example.org", member="sender"),
    Row(
        "smtp",
        kinds.TEXT,
        "",
        "(mail) A server, as HOST[:PORT]; empty: the local sendmail.",
        "mail.example.org:587",
    ),
    Row("user", kinds.TEXT, "", "A name, where the service wants one."),
    Row("password", kinds.SECRET, None, "Its password.", {"credential": "mail"}),
    Row("token", kinds.SECRET, None, "A token, where the service wants one.", {"credential": "ntfy"}),
    Row(
        "url",
        OrSecret(one("address", addresses.url)),
        "",
        "(webhook, healthchecks, ntfy, apprise) The service.",
        "https://hc-ping.com/…",
    ),
    Row("command", kinds.COMMAND, [], "(command) What is started.", ["/usr/local/bin/alarm"]),
    Row(
        "on",
        Many(choice(Event, Event), or_one=True),
        sorted(frozenset(Event) - {Event.ALWAYS}, key=list(Event).index),
        "What people are told of; `always`: each run.",
    ),
    Row("repeat", span(), "24h", "After what time the same trouble is told again."),
    Row("timeout", span(), "10s", "How long the service may take."),
    Row("log", kinds.FLAG, False, "Whether the log goes with it."),
)  # fmt: skip

METRICS: Final = (
    Row(
        "textfile",
        FOLDER,
        "",
        "The file for node_exporter's textfile collector. Empty: none.",
        "/var/lib/prometheus/node-exporter/qmpbackup.prom",
    ),
)

NEEDED: Final = {
    NotifyType.MAIL: "to",
    NotifyType.WEBHOOK: "url",
    NotifyType.HEALTHCHECKS: "url",
    NotifyType.NTFY: "url",
    NotifyType.COMMAND: "command",
    NotifyType.APPRISE: "url",
}
"""The key without which each way of telling people is none."""


@dataclass(frozen=True, slots=True)
class Section:
    """A kind of table: its name, what it is for, its keys, and those that it takes from `[defaults]`."""

    name: str
    sentence: str
    rows: tuple[Row, ...]
    inherited: tuple[Row, ...] = ()

    @property
    def all_rows(self) -> tuple[Row, ...]:
        """All keys that may stand in it."""
        return (*self.rows, *self.inherited)


SECTIONS: Final = (
    Section("run", "How runs go.", RUN),
    Section(
        "defaults",
        "What counts for each VM, unless its group or its own table says otherwise: `[group.NAME]` and "
        "`[vm.NAME]` take the same keys.",
        VM,
    ),
    Section(
        "group.NAME",
        "VMs that are found by their sockets. All keys of `[defaults]` may follow.",
        GROUP,
        VM,
    ),
    Section(
        "vm.NAME",
        "One VM: alone with its own socket, or one of a group with other values. All keys of `[defaults]` may "
        "follow.",
        OWN,
        VM,
    ),
    Section("target.NAME", "A place for backups.", TARGET),
    Section(
        "notify.NAME",
        "A way in which people are told what is wrong, and when it is well again.",
        NOTIFY,
    ),
    Section("metrics", "Numbers for Prometheus.", METRICS),
)
"""All kinds of tables, in the order in which a file has them best."""

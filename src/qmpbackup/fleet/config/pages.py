# SPDX-License-Identifier: Apache-2.0
"""What the table of keys says to people and editors: an example, the reference page, a JSON schema."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from qmpbackup.fleet.config.shapes import Keyed, Row
from qmpbackup.fleet.config.table import SECTIONS, Section
from qmpbackup.fleet.config.toml import toml

_WIDTH: Final = 96
_NAMES: Final = {
    "group.NAME": "group.all",
    "vm.NAME": "vm.db1",
    "target.NAME": "target.main",
    "notify.NAME": "notify.ops",
}
"""Names that tables of an example have."""

_HEAD: Final = """\
qmpbackup: the VMs of this host, and where their backups go. `qmpbackup config check` reads this file \
and says all that is wrong with it; `qmpbackup config show` says what it comes to.

Lines that begin with # and a space explain. Those without the space are settings, with their defaults or an \
example: take the # away to use them. Files in conf.d beside this one (*.toml) belong to it, but each table \
stands only once in all of them.

Two tables are enough for a host:

    [group.all]
    sockets = "/run/qemu/*.qmp"
    [target.main]
    location = "/backup/{vm}"
    keep = { daily = 7, weekly = 4, monthly = 12 }"""

_PAGE: Final = """\
# The configuration

*This page is written by `scripts/configuration-page.py` from the table that the program reads files by.*

Many VMs are backed up by one configuration: `/etc/qmpbackup/config.toml` and the files `conf.d/*.toml`
beside it, in TOML. `--config FILE` or `QMPBACKUP_CONFIG` name another. The shortest that
is of use:

```toml
[group.all]
sockets = "/run/qemu/*.qmp"
[target.main]
location = "/backup/{vm}"
keep = { daily = 7, weekly = 4, monthly = 12 }
```

`qmpbackup config example` prints all keys with their defaults, `config check` says all that is wrong,
`config show` what it comes to and where each value is from, `config schema` prints a JSON schema for editors
([commands](commands.md#config)).

## How files are read

**Tables.** Files are only put together. A table, such as `[vm.db1]`, stands once in all of them; if it stands
twice, that is said with both places.

**Values of a VM** come from `[defaults]`, then from its group, then from its own table: what is said later counts.
A list replaces a list. Of `retry`, `limits` and `drill`, each key replaces its like.

**Which VMs there are.** A group finds VMs by their sockets. What it found before and is not there now is off, and
known by its name still. A table `[vm.NAME]` with a `socket` of its own is a VM of no group; without, it says what
is different about one VM of a group. If two groups find the same VM, it is not backed up, which is said: name it
in `except` of one. Sockets that are named like those of groups and VMs, and belong to none, are *uncovered*.

**Names in values.** `{vm}`, `{group}` and `{host}` stand for names, in `location`, `agent` and `scratch` only. The
host's name is `RESTIC_HOST`, else its own.

**Secrets** never stand in a file. `{ credential = "NAME" }` is what systemd hands over (`LoadCredential=`), else
the file `/etc/qmpbackup/secrets/NAME` (mode 0600); `{ file = "/…" }` is another file, `{ command = ["…"] }` what
a command prints.

**Times** are the host's local ones unless they name a zone (`02:30 UTC`). An hour that clocks go through twice
counts once. A time that they leap over comes where they land, so that no night is without a backup; systemd
would leave it out. **Lengths of time** are numbers with `ms`, `s`, `m`, `h`, `d` or `w`; `1h30m` is one. **Sizes**
are bytes, or numbers with `K`, `M`, `G` or `T`, which are powers of 1024. **Hours** may have days before them,
`Mon..Fri 08:00-18:00`, be days alone, `Sat,Sun`, and go past midnight, which then is the day after.

**What is wrong** with a table of a VM, a group, a target or a way of telling people switches off that table alone,
and is an alarm; all others go on. What is wrong with `[run]`, `[defaults]` or `[metrics]`, or is no TOML, stops all.
"""


def example() -> str:
    """A file with all keys, none of which is in use."""
    parts = [_commented(_HEAD)]
    for section in SECTIONS:
        parts.append(f"{_commented(section.sentence)}\n#[{_NAMES.get(section.name, section.name)}]")
        parts += (_example_of(row) for row in section.rows)
    return "\n\n".join(parts) + "\n"


def _example_of(row: Row) -> str:
    value = default_of(row)
    sentence = row.sentence
    if value is None or (value in ("", [], {}) and row.example is not None):
        value, note = row.example, "" if row.is_required else " Unset by default; an example:"
        sentence += note
    inner = row.kind.keys if isinstance(row.kind, Keyed) else ()
    more = "".join(f"\n{each.name}: {each.sentence}" for each in inner)
    return f"{_commented(sentence + more)}\n#{row.name} = {toml(value)}"


def _commented(text: str) -> str:
    lines = (
        part if part.startswith("  ") else textwrap.fill(part, _WIDTH)
        for part in text.replace("`", "").split("\n")
    )
    return "\n".join(f"# {line}".rstrip() for line in "\n".join(lines).split("\n"))


def default_of(row: Row) -> Any:
    """What counts where nobody writes the key, in full; None: nothing does."""
    return row.kind.default if isinstance(row.kind, Keyed) and row.default == {} else row.default


def reference() -> str:
    """The reference page."""
    return "\n".join([_PAGE, *(line for each in SECTIONS for line in _section(each))])


def _section(section: Section) -> Iterator[str]:
    yield from (f"## `[{section.name}]`", "", section.sentence, "")
    yield from ("| Key | Is | Default | Meaning |", "|---|---|---|---|")
    for row in section.rows:
        yield from _lines(row, "")
    yield ""


def _lines(row: Row, prefix: str) -> Iterator[str]:
    name, kind = f"{prefix}{row.name}", row.kind
    default = (
        "needed" if row.is_required else "–" if row.default is None else f"`{toml(row.default)}`"
    )
    sentence = row.sentence
    if row.example is not None:
        sentence = f"{sentence} Such as `{toml(row.example)}`"
    if not isinstance(kind, Keyed):
        cells = (f"`{name}`", kind.word, default, sentence)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        return
    yield f"| `{name}` | table | below | {sentence} |"
    for each in kind.keys:
        yield from _lines(each, f"{name}.")


def schema() -> Mapping[str, Any]:
    """A JSON schema of the file, as editors take it."""
    properties: dict[str, Any] = {}
    for section in SECTIONS:
        kind, _, named = section.name.partition(".")
        table = {"description": section.sentence, **_object(section.all_rows)}
        properties[kind] = {"type": "object", "additionalProperties": table} if named else table
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Configuration of qmpbackup",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _object(rows: Iterable[Row]) -> dict[str, Any]:
    rows = tuple(rows)
    made = dict(Keyed(dict, rows).schema)
    needed = [each.name for each in rows if each.is_required]
    return {**made, "required": needed} if needed else made

# SPDX-License-Identifier: Apache-2.0
"""What the configuration comes to: each value, and the table that it is from. No secret is shown."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from qmpbackup.fleet.config.files import Written
from qmpbackup.fleet.config.loading import Loaded, host_name, inherited
from qmpbackup.fleet.config.shapes import Keyed, Row
from qmpbackup.fleet.config.table import METRICS, NOTIFY, RUN, TARGET, VM
from qmpbackup.fleet.settings import VmSettings

DEFAULT: Final = "default"


@dataclass(frozen=True, slots=True)
class ShownValue:
    """A value of a table: the key, the value as it may be shown, the table that says so (or `default`), and
    its file."""

    table: str
    key: str
    value: Any
    source: str = DEFAULT
    file: str = ""


def everything(loaded: Loaded) -> Iterator[ShownValue]:
    """All tables; of VMs, what is not by default."""
    tables, configuration = loaded.tables, loaded.configuration
    yield from _values("run", RUN, [tables.single("run")])
    yield from _values("metrics", METRICS, [tables.single("metrics")])
    for target in configuration.targets:
        name = f"target.{target.name}"
        yield from _values(name, TARGET, [tables.tables[name]])
    for notify in configuration.notify:
        name = f"notify.{notify.name}"
        yield from _values(name, NOTIFY, [tables.tables[name]])
    for vm in configuration.vms:
        yield from (each for each in of_vm(loaded, vm) if each.source != DEFAULT)


def of_vm(loaded: Loaded, vm: VmSettings) -> Iterator[ShownValue]:
    """All values of one VM, and where its points are."""
    name, host = f"vm.{vm.name}", host_name()
    sources = list(inherited(loaded.tables, vm.name, vm.group))
    group = f"group.{vm.group}" if vm.group else name
    of_group = loaded.tables.tables[group]
    yield ShownValue(name, "socket", vm.socket, group, of_group.file)
    for each in _values(name, VM, sources):
        match each.key:
            case "agent" | "scratch":
                yield ShownValue(name, each.key, getattr(vm, each.key), each.source, each.file)
            case "targets":
                yield ShownValue(name, each.key, list(vm.targets), each.source, each.file)
            case _:
                yield each
    for target in vm.targets:
        table = loaded.tables.tables[f"target.{target}"]
        place = loaded.configuration.target(target).place(vm, host)
        yield ShownValue(name, f"location of {target}", place, table.name, table.file)


def _values(table: str, rows: tuple[Row, ...], sources: list[Written]) -> Iterator[ShownValue]:
    """The values of keys, each from the last table that has it."""
    for row in rows:
        if isinstance(row.kind, Keyed):
            within = [Written(each.file, each.name, _within(each.keys, row)) for each in sources]
            for each in _values(table, row.kind.keys, within):
                yield ShownValue(
                    table, f"{row.name}.{each.key}", each.value, each.source, each.file
                )
            continue
        last = next((each for each in reversed(sources) if row.name in each.keys), None)
        if last is not None:
            value = _masked(row.name, last.keys[row.name])
            yield ShownValue(table, row.name, value, last.name, last.file)
        elif row.default is not None:
            yield ShownValue(table, row.name, row.default)


def _within(keys: Mapping[str, object], row: Row) -> Mapping[str, object]:
    value = keys.get(row.name)
    return value if isinstance(value, dict) else {}


def _masked(name: str, value: Any) -> Any:
    """A value without what may be a secret: paths of addresses, and words of commands."""
    match name, value:
        case _, dict():
            return {key: _masked(key, each) for key, each in value.items()}
        case "url", str() if value:
            parts = urlsplit(value)
            return f"{parts.scheme}://{parts.hostname}/…"
        case "command", [first, _, *_]:
            return [first, "…"]
        case _:
            return value

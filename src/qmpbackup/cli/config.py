# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup config`: what the configuration of all VMs says, and what is wrong with it."""

import argparse
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from qmpbackup.cli.arguments import add_config
from qmpbackup.cli.printing import printable, say, say_json
from qmpbackup.errors import UsageError
from qmpbackup.plan.sizes import count_of

if TYPE_CHECKING:
    from qmpbackup.fleet.config.loading import Loaded
    from qmpbackup.fleet.config.showing import ShownValue
    from qmpbackup.fleet.settings import Fault

UNUSABLE = UsageError.exit_code

_WIDEST = 72
"""Columns of a value, behind which stands where it is from."""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and those within it."""
    parser = commands.add_parser(
        "config",
        help="look at the configuration of all VMs: check, show, example, schema",
        description="The configuration of all VMs of a host: what is wrong with it, what it comes to, and what "
        "may stand in it.",
    )
    within = parser.add_subparsers(title="what to do", metavar="WHAT", required=True)
    _add_check(within)
    _add_show(within)
    _add_printed(
        within,
        _example,
        "print a file with all keys, their defaults and what they mean",
        "Print a configuration with all keys, their defaults and what they mean, none of them in use.",
    )
    _add_printed(
        within,
        _schema,
        "print a JSON schema of the file, for editors",
        "Print a JSON schema of the configuration, by which editors complete and check it.",
    )


def _add_printed(
    within: "argparse._SubParsersAction[argparse.ArgumentParser]",
    run: Callable[[argparse.Namespace], int],
    summary: str,
    description: str,
) -> None:
    """A command that only prints something, and is called as the function that does."""
    name = run.__name__.removeprefix("_")
    within.add_parser(name, help=summary, description=description).set_defaults(run=run)


def _add_check(within: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    check = within.add_parser(
        "check",
        help="say all that is wrong, one thing a line; exit code 2 if anything is",
        description="Say all that is wrong with the configuration, with file and key, one thing a line; then "
        "what may be other than you want, as warnings. Exit code 2 if anything is wrong. A table of a VM, a "
        "group, a target or a way of telling people that is wrong is off, all others are used; what is wrong "
        "with [run], [defaults] or [metrics], or is no TOML, stops all.",
    )
    add_config(check)
    check.add_argument(
        "--live",
        action="store_true",
        help="also run `doctor` for each VM and its targets, and open each repository; exit code 1 if that "
        "finds something that would keep a backup from working",
    )
    check.add_argument("--json", action="store_true", help="print one JSON object a line")
    check.set_defaults(run=_check)


def _add_show(within: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    show = within.add_parser(
        "show",
        help="print each value, and which table of which file it is from",
        description="Print each value that counts, and which table of which file it is from. Of a VM that is "
        "named, all values; of others, those that are not by default. No secret is shown.",
    )
    show.add_argument("name", nargs="?", default="", metavar="VM", help="only this VM")
    add_config(show)
    show.add_argument("--json", action="store_true", help="print one JSON object a value")
    show.set_defaults(run=_show)


def _load(arguments: argparse.Namespace) -> "Loaded":
    from qmpbackup.fleet.config.loading import load_all
    from qmpbackup.fleet.history import History
    from qmpbackup.state import state_folder

    with History.opened(state_folder(), read_only=True) as history:
        return load_all(arguments.config, history.known_vms())


def _check(arguments: argparse.Namespace) -> int:
    from qmpbackup.fleet.config.checking import warnings

    loaded = _load(arguments)
    faults = [*loaded.configuration.faults, *warnings(loaded)]
    faults.sort(key=lambda each: each.is_warning)
    for each in faults:
        _say_fault(each, as_json=arguments.json)
    wrong = any(not each.is_warning for each in faults)
    if not arguments.json:
        vms, targets = len(loaded.configuration.vms), len(loaded.configuration.targets)
        end = "not all is well" if wrong else "nothing is wrong"
        say(f"{count_of(vms, 'VM')}, {count_of(targets, 'target')}: {end}.")
    well = _look(loaded, as_json=arguments.json) if arguments.live else True
    return UNUSABLE if wrong else int(not well)


def _say_fault(fault: "Fault", *, as_json: bool) -> None:
    if as_json:
        from qmpbackup import fleet_documents

        say_json(fleet_documents.fault(fault))
    else:
        say(printable(f"{'warning: ' if fault.is_warning else ''}{fault}"))


def _look(loaded: "Loaded", *, as_json: bool) -> bool:
    """Look at all VMs and targets, and say what is found; whether all is well."""
    from qmpbackup.fleet.config.looking import look

    well = True
    for each in look(loaded.configuration):
        well = well and each.is_well
        if as_json:
            from qmpbackup import fleet_documents

            say_json(fleet_documents.looked(each))
        else:
            say(*map(printable, each.lines()))
    return well


def _show(arguments: argparse.Namespace) -> int:
    from qmpbackup.fleet.config import showing
    from qmpbackup.plan.guessing import or_did_you_mean

    loaded = _load(arguments)
    configuration = loaded.configuration
    if arguments.name:
        about = f"vm.{arguments.name}"
        faults = [each for each in configuration.faults if each.subject in {"", about}]
    else:
        faults = [each for each in configuration.faults if not each.subject]
    faults = [each for each in faults if not each.is_warning]
    if faults:
        raise UsageError(str(faults[0]), "`qmpbackup config check` says all that is wrong.")
    if not arguments.name:
        _say_values(showing.everything(loaded), as_json=arguments.json)
        return 0
    for vm in configuration.vms:
        if vm.name == arguments.name:
            _say_values(showing.of_vm(loaded, vm), as_json=arguments.json)
            return 0
    names = [each.name for each in configuration.vms]
    raise UsageError(
        f"The configuration has no VM {arguments.name}{or_did_you_mean(arguments.name, names)}",
        "`qmpbackup config show` shows all; `config check` says what is wrong.",
    )


def _say_values(values: "Iterable[ShownValue]", *, as_json: bool) -> None:
    if as_json:
        from qmpbackup import fleet_documents

        say_json(*map(fleet_documents.configured, values))
        return
    from qmpbackup.fleet.config.toml import toml

    rows = [
        (f"{each.table}.{each.key} = {toml(each.value)}", each.source, each.file) for each in values
    ]
    width = min(max((len(row[0]) for row in rows), default=0), _WIDEST)
    for text, source, file in rows:
        place = f"{source} in {file}" if file else source
        say(printable(f"{text:<{width}}  # {place}"))


def _example(arguments: argparse.Namespace) -> int:
    from qmpbackup.fleet.config.pages import example

    del arguments
    say(example().rstrip("\n"))
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from qmpbackup.fleet.config.pages import schema

    del arguments
    say_json(schema(), indent=2)
    return 0

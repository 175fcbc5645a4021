# SPDX-License-Identifier: Apache-2.0
"""What is asked of a point whose files can be read: options, and what is printed.

`files` asks once for each point that it opens, its shell again and again.
"""

import argparse
import json
import os
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

from qmpbackup.cli.arguments import add_reserve, path
from qmpbackup.cli.printing import output_errors, printable, say, say_json
from qmpbackup.plan.sizes import human

if TYPE_CHECKING:
    from qmpbackup.plan.guest_files import GuestFile
    from qmpbackup.service.files.copying import Wishes
    from qmpbackup.service.files.reading import Place, Reading

PLACE_HELP = (
    "FS:/PATH, where FS is a file system as `files ls` shows it: a disk (vda), a partition (vda:part1), a "
    "logical volume (vg/lv), a RAID (md/0). A path alone is looked for on all file systems"
)

_MOST_SORTED = 100_000
"""Of more, the rest comes as it comes: nobody's memory is for as many names as a guest likes."""


def register_ls(parser: argparse.ArgumentParser) -> None:
    """The options of `ls`."""
    parser.add_argument("-l", dest="long", action="store_true", help="also mode, owner, size, time")
    _add_json(parser)
    parser.add_argument("place", nargs="?", default="", metavar="PATH", help=PLACE_HELP)


def register_cp(parser: argparse.ArgumentParser) -> None:
    """The options of `cp`."""
    parser.add_argument("-r", "--recursive", action="store_true", help="copy a folder")
    parser.add_argument(
        "--preserve",
        action="store_true",
        help="as root: also owner, group, setuid and setgid, and extended attributes",
    )
    parser.add_argument(
        "--links", action="store_true", help="also links that lead out of what is copied"
    )
    add_reserve(parser)
    parser.add_argument("place", metavar="SRC", help=PLACE_HELP)
    parser.add_argument(
        "destination", type=path, metavar="DEST", help="a new name, or a folder to copy it into"
    )


def register_find(parser: argparse.ArgumentParser) -> None:
    """The options of `find`."""
    parser.add_argument("--name", metavar="GLOB", help="such as '*.conf'; quote it for the shell")
    parser.add_argument("--type", choices=("f", "d", "l"), help="files, folders, or links")
    _add_json(parser)
    parser.add_argument("place", nargs="?", default="", metavar="PATH", help=PLACE_HELP)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


# ls and find


def show_entries(found: "Reading", place: "Place", arguments: argparse.Namespace) -> None:
    """What is in a folder, by the options of `ls`."""
    from qmpbackup import documents

    entries = found.entries(place)
    first = sorted(islice(entries, _MOST_SORTED), key=lambda each: each.path)

    def line(each: "GuestFile") -> str:
        if arguments.json:
            return json.dumps(documents.guest_file(_whole(place, each), each))
        return _long(each) if arguments.long else _text(each.path)

    say(*map(line, first))
    for each in entries:
        say(line(each))


def show_systems(found: "Reading", *, as_json: bool) -> None:
    """The file systems of a point."""
    from qmpbackup import documents

    shown = [(each, found.subvolumes(each)) for each in found.systems]
    if as_json:
        say_json(*(documents.guest_file_system(*each) for each in shown))
        return
    width = max((len(each.name) for each in found.systems), default=0) + 1
    for each, subvolumes in shown:
        line = f"{each.name + ':':<{width}}  {human(each.size):>10}  {each.type:<12}  {each.label}"
        say(printable(f"{line.rstrip()}  {each.note}".rstrip()))
        say(*(printable(f"{each.name}:/{_text(one)}  (subvolume)") for one in subvolumes))


def search(found: "Reading", place: "Place", arguments: argparse.Namespace) -> None:
    """Show what is below a folder and passes the options of `find`."""
    from qmpbackup import documents

    tests = [*(("-name", arguments.name) if arguments.name else ())]
    tests += ["-type", arguments.type] if arguments.type else []
    for each in found.search(place, tests):
        if arguments.json:
            say_json(documents.guest_file(_whole(place, each), each))
        else:
            say(_text(_whole(place, each)))


def _whole(place: "Place", each: "GuestFile") -> bytes:
    """The address of a file in a folder."""
    above = os.fsencode(place.shown)
    return b"/".join([above.rstrip(b"/"), each.path]) if each.path else above


def _long(each: "GuestFile") -> str:
    import stat
    from datetime import UTC, datetime

    kind = {"d": stat.S_IFDIR, "l": stat.S_IFLNK, "b": stat.S_IFBLK, "c": stat.S_IFCHR}
    kind |= {"p": stat.S_IFIFO, "s": stat.S_IFSOCK}
    mode = stat.filemode(kind.get(each.kind, stat.S_IFREG) | each.mode)
    try:
        time = f"{datetime.fromtimestamp(each.time, UTC):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        time = "?"
    target = f" -> {_text(each.target)}" if each.target else ""
    owner = f"{each.user}:{each.group}"
    return f"{mode}  {owner:>11}  {each.size:>12}  {time}  {_text(each.path)}{target}"


def _text(name: bytes) -> str:
    return printable(os.fsdecode(name))


# cat and cp


def write(fd: int, pieces: Iterable[bytes]) -> None:
    """Write for whoever reads it."""
    from qmpbackup import interrupt
    from qmpbackup.durable import write_all

    for piece in pieces:
        with output_errors(), interrupt.let_through():  # for whoever reads it may take for ever
            write_all(fd, [piece])


def copy_out(found: "Reading", place: "Place", arguments: argparse.Namespace) -> int:
    """Copy a file or a folder by the options of `cp`; the exit code."""
    from qmpbackup.service.files.copying import copy

    left_out = copy(found.archive(place), place, arguments.destination, wishes(arguments))
    return 3 if left_out else 0


def wishes(arguments: argparse.Namespace) -> "Wishes":
    """What the options of `cp` ask for."""
    from qmpbackup.service.files.copying import Wishes

    return Wishes(
        recursive=arguments.recursive,
        preserve=arguments.preserve,
        links=arguments.links,
        reserve=arguments.reserve,
    )

# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup files`: files out of a point."""

import argparse
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qmpbackup.cli.arguments import (
    add_disks,
    add_lock_wait,
    add_point,
    add_reserve,
    add_target,
    add_vm,
    names,
    path,
)
from qmpbackup.cli.printing import output_errors, printable, say, say_json
from qmpbackup.plan.sizes import human

if TYPE_CHECKING:
    from qmpbackup.plan.guest_files import GuestFile
    from qmpbackup.service.files.reading import Place, Reading

_PLACE_HELP = (
    "FS:/PATH, where FS is a file system as `files ls` shows it: a disk (vda), a partition (vda:part1), a "
    "logical volume (vg/lv), a RAID (md/0). A path alone is looked for on all file systems"
)


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command, its commands and their options."""
    parser = commands.add_parser(
        "files",
        help="list, print, copy out and find files in a point",
        description="Files out of a restore point, without root. The file systems are read by a small Linux "
        "in a machine without a network, which is thrown away afterwards; journals are replayed there. "
        "Nothing of the point is changed.",
    )
    ours = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listing = _command(ours, "ls", _ls, "show the file systems, or what is in a folder")
    listing.add_argument(
        "-l", dest="long", action="store_true", help="also mode, owner, size, time"
    )
    _add_json(listing)
    listing.add_argument("place", nargs="?", default="", metavar="PATH", help=_PLACE_HELP)
    printing = _command(ours, "cat", _cat, "print a file")
    printing.add_argument("place", metavar="PATH", help=_PLACE_HELP)
    _register_cp(_command(ours, "cp", _cp, "copy a file, or with -r a folder, to this host"))
    packing = _command(ours, "tar", _tar, "a tar archive of a file or a folder, with all metadata")
    packing.add_argument("place", metavar="PATH", help=_PLACE_HELP)
    packing.add_argument(
        "-f", "--file", type=path, metavar="FILE", help="write it here (default: standard output)"
    )
    _register_find(
        _command(ours, "find", _find, "find files by name, below a folder or everywhere")
    )
    preparing = ours.add_parser(
        "prepare",
        help="make the appliance anew, of the newest packages",
        description="Make the appliance that reads file systems, of Debian's newest packages, and print "
        "its folder. `files` makes it by itself when it is first needed. On a host that cannot, copy that "
        "folder to the same place in the home of the user.",
    )
    preparing.add_argument(
        "--if-missing",
        action="store_true",
        help="only if it is not there, as `files` does by itself",
    )
    preparing.set_defaults(run=_prepare)


def _register_cp(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("place", metavar="SRC", help=_PLACE_HELP)
    parser.add_argument(
        "destination", type=path, metavar="DEST", help="a new name, or a folder to copy it into"
    )


def _register_find(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", metavar="GLOB", help="such as '*.conf'; quote it for the shell")
    parser.add_argument("--type", choices=("f", "d", "l"), help="files, folders, or links")
    _add_json(parser)
    parser.add_argument("place", nargs="?", default="", metavar="PATH", help=_PLACE_HELP)


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Any,
    text: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    add_target(parser)
    add_vm(parser)
    add_point(parser)
    add_disks(parser)
    parser.add_argument(
        "--passphrase-file",
        type=path,
        metavar="FILE",
        help="a file with the passphrase of what is encrypted by LUKS",
    )
    add_lock_wait(parser)
    parser.set_defaults(run=run)
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


@contextmanager
def _reading(arguments: argparse.Namespace) -> "Iterator[Reading]":
    from qmpbackup.service.files.reading import Request, reading

    request = Request(
        target=arguments.target,
        point=arguments.point,
        vm=arguments.vm,
        disks=names(arguments.disk),
        passphrase=arguments.passphrase_file,
        lock_wait=arguments.lock_wait,
    )
    with reading(request) as found:
        yield found


# ls and find


def _ls(arguments: argparse.Namespace) -> int:
    from qmpbackup import documents

    with _reading(arguments) as found:
        if not arguments.place:
            _show_systems(found, as_json=arguments.json)
            return 0
        place = found.place(arguments.place)
        entries = sorted(found.entries(place), key=lambda each: each.path)
        if arguments.json:
            say_json(*(documents.guest_file(_whole(place, each), each) for each in entries))
        elif arguments.long:
            say(*(_long(each) for each in entries))
        else:
            say(*(_text(each.path) for each in entries))
    return 0


def _show_systems(found: "Reading", *, as_json: bool) -> None:
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


def _find(arguments: argparse.Namespace) -> int:
    from qmpbackup import documents

    tests = [*(("-name", arguments.name) if arguments.name else ())]
    tests += ["-type", arguments.type] if arguments.type else []
    with _reading(arguments) as found:
        for place in _places(found, arguments.place):
            for each in found.search(place, tests):
                if arguments.json:
                    say_json(documents.guest_file(_whole(place, each), each))
                else:
                    say(_text(_whole(place, each)))
    return 0


def _places(found: "Reading", wanted: str) -> "Iterable[Place]":
    from qmpbackup.service.files.reading import Place

    if wanted:
        return [found.place(wanted)]
    return [Place(each, "/") for each in found.readable()]


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


# cat, tar and cp


def _cat(arguments: argparse.Namespace) -> int:
    with _reading(arguments) as found:
        _write(1, found.contents(found.place(arguments.place)))
    return 0


def _tar(arguments: argparse.Namespace) -> int:
    from qmpbackup.service.files.archives import checked, new_file

    if arguments.file is None:
        with _reading(arguments) as found:
            _write(1, checked(found.archive(found.place(arguments.place))))
        return 0
    with new_file(arguments.file) as fd, _reading(arguments) as found:
        _write(fd, checked(found.archive(found.place(arguments.place))))
    return 0


def _write(fd: int, pieces: Iterable[bytes]) -> None:
    from qmpbackup import interrupt
    from qmpbackup.durable import write_all

    for piece in pieces:
        with output_errors(), interrupt.let_through():  # for whoever reads it may take for ever
            write_all(fd, [piece])


def _cp(arguments: argparse.Namespace) -> int:
    from qmpbackup.service.files.copying import Wishes, copy, require_possible

    wishes = Wishes(
        recursive=arguments.recursive,
        preserve=arguments.preserve,
        links=arguments.links,
        reserve=arguments.reserve,
    )
    require_possible(arguments.destination, wishes)
    with _reading(arguments) as found:
        place = found.place(arguments.place)
        left_out = copy(found.archive(place), place, arguments.destination, wishes)
    return 3 if left_out else 0


def _prepare(arguments: argparse.Namespace) -> int:
    from qmpbackup.machine.appliance.building import appliance

    say(str(appliance(anew=not arguments.if_missing).folder))
    return 0

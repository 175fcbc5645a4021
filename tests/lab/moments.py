# SPDX-License-Identifier: Apache-2.0
"""Commands that are killed at a moment of theirs, also those that another command starts."""

import json
from collections.abc import Sequence
from pathlib import Path

_SITE = '''"""Found by every Python that this is told to: see `lab.moments`."""
import json, os, re, signal, sys

def _watch(told):
    left = [re.compile(each) for each in told["events"]]

    def hook(event, arguments):
        if not left:
            return
        words = [event]
        for each in arguments:
            words += map(str, each) if isinstance(each, (list, tuple)) else [str(each)]
        if left[0].search(" ".join(words)) is None:
            return
        del left[0]
        if not left:
            try:
                os.close(os.open(told["once"], os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            os.kill(os.getppid() if told["parent"] else os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)

told = json.loads(os.environ.get("LAB_MOMENT") or "{}")
if told and told["command"] in sys.orig_argv:
    _watch(told)
'''


def killed_at(
    folder: Path, command: str, events: Sequence[str], *, parent: bool = False
) -> dict[str, str]:
    """Variables by which the first process with a word among its arguments is killed (or its parent) once
    these audit events of Python's have come, one after the other; each is a pattern for a part of the
    event's name and arguments."""
    site = folder / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(_SITE)
    once = folder / "once"
    once.unlink(missing_ok=True)
    told = {"command": command, "events": list(events), "parent": parent, "once": str(once)}
    return {"PYTHONPATH": str(site), "LAB_MOMENT": json.dumps(told)}

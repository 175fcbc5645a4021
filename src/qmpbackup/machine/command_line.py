# SPDX-License-Identifier: Apache-2.0
"""Which process QEMU is, and what it was started with, fit to be kept: secrets masked.

A restore on a bare machine wants the arguments as they were, so empty ones stay. What looks like a
secret by its name is masked; what is none by any name cannot be known (docs/explanation/threat-model).
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path


def of_process(pid: int | None) -> tuple[str, ...]:
    """The arguments of a process, masked; empty where we may not read them."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes() if pid else b""
    except OSError:
        return ()
    if not raw:
        return ()
    words = raw.removesuffix(b"\0").split(b"\0")
    return tuple(masked(word.decode(errors="replace") for word in words))


def process_of(pid: int | None) -> str:
    """What tells a process from every other: its id, when it started, and since when the machine runs."""
    if not pid:
        return ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        # The second field is a name and may hold anything (proc(5)).
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return f"{pid} {fields[19].decode('ascii')} {boot}"
    except (OSError, UnicodeError, IndexError):
        return ""


def masked(words: Iterable[str]) -> Iterator[str]:
    """Arguments with what looks like a secret replaced by `***`."""
    option = ""
    for word in words:
        yield _without_secrets(word, option)
        option = word.lstrip("-") if word.startswith("-") else ""


def _without_secrets(word: str, option: str) -> str:
    members = _JSON_MEMBER if word.startswith(("{", "json:")) else _MEMBER
    for secret in (
        *_ANYWHERE,
        *_SECRETS_OF.get(option, ()),
        *(members if option != APPEND else ()),
    ):
        word = secret.sub(r"\1***", word)
    return word


APPEND = "append"
"""The option that holds a kernel's parameters, which blanks divide, not commas."""


_TELLING = (
    r"(?:[\w.-]*(?:password|passwd|passphrase|passcode|(?<!-)secret|token|key|cookie|signature"
    r"|authorization)"
    r"|(?:[\w.-]*(?<![A-Za-z]))?(?:pass|pw|pwd|sig)"
    r"|(?:[\w.-]*\.)?data)"
)
"""Names of secrets. `key-secret=` and its like name another object of QEMU's, and stay."""

_ANYWHERE = (
    re.compile(r"""(://)[^/\s"',]*(?=@)"""),
    re.compile(rf'("{_TELLING}"\s*:\s*)(?:"(?:[^"\\]|\\.)*"|[\w.+-]+)', re.IGNORECASE),
    re.compile(rf"('{_TELLING}'\s*:\s*)(?:'(?:[^'\\]|\\.)*'|[\w.+-]+)", re.IGNORECASE),
)
"""The user's part of an address, and members of JSON in both ways in which QEMU takes it."""

_MEMBER = (re.compile(rf"((?<![\w.-]){_TELLING}=)(?:[^,]|,,)*", re.IGNORECASE),)
_JSON_MEMBER = (re.compile(rf"""((?<![\w.-]){_TELLING}=)(?:[^,"']|,,)*""", re.IGNORECASE),)
"""`-object secret,data=…`, `https://host/?sig=…`, `PASSWORD=…`; within JSON a text ends at its quote."""

_SECRETS_OF = {
    "fw_cfg": (re.compile(r"(\bstring=)(?:[^,]|,,)*"),),
    "smbios": (re.compile(r"(\b(?:value|serial|asset|sku)=)(?:[^,]|,,)*"),),
    APPEND: (
        re.compile(
            r"((?:^|\s)(?=[^\s=]*(?:pass|secret|token|key|cred|pw|auth|sig))[^\s=]*=)"
            r"""(?:"[^"]*"|'[^']*'|\S)*""",
            re.IGNORECASE,
        ),
    ),
}
"""The same for what a guest is told, by the option that tells it. `-fw_cfg` and `-smbios` hand over
anything; of a kernel's command line, the parameters that are called like secrets."""

# SPDX-License-Identifier: Apache-2.0
"""The real restic, to judge what the product writes and to write what it must read.

Knows nothing of the product. The password goes in by the environment, the cache is a folder of the
test's own, and no command runs longer than a minute.
"""

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from lab.patience import PATIENCE

PASSWORD = "correct horse battery staple"  # noqa: S105 - of repositories that tests make


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    argv: tuple[str, ...]
    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        """Standard output as text."""
        return self.out.decode()

    @property
    def json(self) -> Any:
        """Standard output as JSON."""
        return json.loads(self.out)

    @property
    def objects(self) -> list[dict[str, Any]]:
        """Standard output as one JSON object a line."""
        return [json.loads(line) for line in self.text.splitlines()]

    def __str__(self) -> str:
        command = " ".join(self.argv)
        shown = self.out[:4000].decode(errors="replace")
        return f"{command}\nexit code {self.code}\n--- stdout\n{shown}\n--- stderr\n{self.err}"


@dataclass(frozen=True)
class Restic:
    """restic with one repository, in its own words for places; `cache` is made when it is needed."""

    repository: str | Path
    cache: Path
    password: str = PASSWORD
    program: str | Path = "restic"
    environment: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, *argv: str | Path, check: bool = True, stdin: bytes = b"") -> Result:
        """Run a command, such as `restic("snapshots", "--json").json`; it has to succeed."""
        with self.start(*argv) as process:
            try:
                out, err = process.communicate(stdin, timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        command = tuple(map(str, process.args)) if isinstance(process.args, list) else ()
        result = Result(command, process.returncode, out, err.decode(errors="replace"))
        assert result.code == 0 or not check, str(result)
        return result

    def start(self, *argv: str | Path, cwd: Path | None = None) -> "subprocess.Popen[bytes]":
        """Start a command; whoever does so ends it."""
        return subprocess.Popen(
            [str(self.program), "--repo", str(self.repository), *map(str, argv)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env={
                **os.environ,
                "RESTIC_PASSWORD": self.password,
                "RESTIC_CACHE_DIR": str(self.cache),
                "RESTIC_PROGRESS_FPS": "0",
                **self.environment,
            },
        )

    def init(self, *argv: str) -> Self:
        """Make the repository."""
        self("init", *argv)
        return self

    @property
    def version(self) -> tuple[int, ...]:
        """Its version, such as (0, 14, 0)."""
        said = subprocess.run([str(self.program), "version"], capture_output=True, check=True)
        return tuple(int(each) for each in said.stdout.split()[1].decode().split("-")[0].split("."))


class Backing:
    """A `restic backup` that holds its lock until it is told to end: it reads an open pipe."""

    def __init__(self, restic: Restic) -> None:
        self._process = restic.start("backup", "--stdin")

    @property
    def pid(self) -> int:
        """Its process id, as in its lock."""
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def kill(self) -> None:
        """End it so that its lock stays behind."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def __exit__(self, *_exc: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        self._process.communicate(timeout=PATIENCE)

# SPDX-License-Identifier: Apache-2.0
"""A whole Debian: backed up while it runs, drilled, booted from its point, settled, and backed up again."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lab import cli, debian
from lab.backups import levels
from lab.booted import Booted, booted
from lab.debian import Debian
from lab.repositories import Target, environment_of
from stock.repositories import repository

pytestmark = [
    pytest.mark.guest,
    pytest.mark.slow,
    pytest.mark.skipif(not debian.is_possible(), reason="only root can make a Debian"),
]


CLOSED = """
for each in /sys/class/net/e*; do
    ip link set "${each##*/}" up && ip addr add 10.0.2.15/24 dev "${each##*/}"
done
ip route add default via 10.0.2.2
for host in 10.0.2.2 10.0.2.3 1.1.1.1; do
    timeout 3 bash -c "</dev/tcp/$host/53" && exit 1
    timeout 3 bash -c "</dev/tcp/$host/22" && exit 1
done
exit 0
"""
"""Succeeds where nothing of QEMU's own network and nothing beyond it is reached."""


LISTEN = r"""
printf '[Match]\nName=en*\n[Network]\nDHCP=yes\n' >/etc/systemd/network/all.network
cat >/etc/systemd/system/answering.service <<'END'
[Service]
ExecStart=/usr/bin/perl -MIO::Socket::INET -e '$$s = IO::Socket::INET->new(LocalPort => 2222, Listen => 9); $$s->accept while 1'
[Install]
WantedBy=multi-user.target
END
systemctl enable systemd-networkd answering
"""
"""From its next start on, somebody listens in a guest that asks for an address."""


def drill(target: Target, env: Mapping[str, str], *more: cli.Argument) -> dict[str, Any]:
    """What a drill finds, which has as long as a Debian may take."""
    within = ("--within", str(debian.BOOT_SECONDS), "--json")
    with cli.start("drill", "--target", str(target), *within, *more, env=env) as running:
        return dict(running.wait(2 * debian.BOOT_SECONDS).objects[0])


def frozen_point(vm: Debian | Booted, target: Target, level: str) -> dict[str, Any]:
    """A point for which the agent has frozen all file systems."""
    where = ("--socket", vm.socket, "--agent-socket", vm.agent_socket)
    what = ("backup", "--quiesce", "--level", level, "--target", str(target), "--json")
    made = cli.run(*where, *what, env=environment_of(target)).check()
    return dict(made.objects[-1]["point"])


def point_of(vm: Debian, targets: list[Target]) -> None:
    """A point in each target, with a file in each file system; frozen by its agent."""
    vm.start()
    try:
        with debian.agent(vm.agent_socket) as agent:
            debian.write(agent, "before")
            debian.run(agent, LISTEN)
        for target in targets:
            frozen_point(vm, target, "full")
        vm.quit()
    except BaseException:
        vm.kill()
        raise


def test_a_debian_comes_up_from_its_point_and_goes_on(tmp_path: Path) -> None:
    folder, stored = tmp_path / "target", repository(tmp_path)
    images = debian.images(tmp_path)
    point_of(Debian(tmp_path, images), [folder, stored])
    for image in images.values():
        image.unlink()
    env = {**os.environ, **environment_of(stored), "XDG_STATE_HOME": str(tmp_path / "state")}
    expected = ("--exec", debian.check(["before"]), "--exec", CLOSED, "--expect", "tcp:2222")
    found = drill(stored, env, *expected)
    assert found["verdict"] == "pass", found
    assert found["system"] == "Debian GNU/Linux 12 (bookworm)"
    assert found["reason"].startswith("the guest agent answers")
    with booted("--target", str(stored), "--to", tmp_path / "vm", env=env) as vm:
        with debian.agent(vm.agent_socket) as agent:
            debian.run(agent, debian.check(["before"]))
            debian.write(agent, "from-the-point")
            cli.run("settle", "--to", vm.folder, env=env).check()
            debian.write(agent, "settled")
        vm.disconnect()  # the monitor takes one
        again = frozen_point(vm, stored, "auto")
        assert {levels(again)[disk] for disk in debian.BUSES} == {"inc"}
        vm.quit()
        cli.run("boot", "--to", vm.folder, env=env).check()
        with debian.agent(vm.agent_socket) as agent:
            debian.run(agent, debian.check(["before", "from-the-point", "settled"]))
    written = ("--exec", debian.check(["before", "from-the-point", "settled"]))
    assert drill(stored, env, *written)["verdict"] == "pass"

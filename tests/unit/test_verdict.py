# SPDX-License-Identifier: Apache-2.0
"""Verdicts on a VM that was started: no success without proof, no failure by a guess."""

import pytest

from qmpbackup.plan.verdict import BootVerdict, Observation, Ready, judged

LONG = 100.0


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [
        (Observation(), None),
        (Observation(console="Booting from Hard Disk...", still=5), None),
        (Observation(console="Booting from Hard Disk...", still=LONG), BootVerdict.FAIL),
        (Observation(console="[ 1.0] fine", still=LONG), None),
        (Observation(agent=True), BootVerdict.PASS),
        (Observation(console="Debian 12 vm ttyS0\r\n\r\nvm login: "), BootVerdict.PASS),
        (Observation(console="\nvm login: ", has_agent=True), None),
        (Observation(console="\nvm login: ", has_agent=True, still=LONG), BootVerdict.PASS),
        (Observation(console="\nvm login: root\nPassword: ", still=LONG), None),
        (Observation(console="[1] Kernel panic - not syncing: VFS\n"), BootVerdict.FAIL),
        (
            Observation(console="Kernel panic - not syncing: IO-APIC + timer doesn't work!\n"),
            BootVerdict.UNKNOWN,
        ),
        (Observation(ended="signal 6"), BootVerdict.FAIL),
        (Observation(ended="signal 9", killed=True), BootVerdict.UNKNOWN),
        (Observation(console="x\n\x1b[0mgrub rescue> ", still=LONG), BootVerdict.FAIL),
        (Observation(console="\n(initramfs) ", still=LONG), BootVerdict.FAIL),
        (Observation(screen="Debian 12 vm tty1\n\nvm login:"), BootVerdict.PASS),
        (Observation(screen="\nvm login:", has_agent=True), None),
        (Observation(screen="\nvm login:", has_agent=True, screen_still=LONG), BootVerdict.PASS),
        (
            Observation(screen="Boot failed\n\nNo bootable device.", screen_still=4),
            BootVerdict.FAIL,
        ),
        (Observation(screen="No bootable device.", screen_still=1), None),
        (Observation(screen="grub rescue>", screen_still=4), None),
        (Observation(screen="grub rescue>", screen_still=LONG), BootVerdict.FAIL),
        (Observation(screen="[1] Kernel panic - not syncing: x"), BootVerdict.FAIL),
        (Observation(screen="what nobody knows", screen_still=LONG), None),
        (Observation(resets=2), None),
        (Observation(resets=5), BootVerdict.FAIL),
        (Observation(resets=5, agent=True), BootVerdict.PASS),
    ],
)
def test_verdicts(seen: Observation, verdict: BootVerdict | None) -> None:
    found = judged(seen)
    assert (found[0] if found else None) == verdict


PROMPT = Observation(console="\nvm login: ", has_agent=True)
PICTURE = Observation(picture_still=LONG)


@pytest.mark.parametrize(
    ("seen", "ready", "passes"),
    [
        (PICTURE, Ready.ANY, True),
        (Observation(picture_still=50), Ready.ANY, False),
        (Observation(picture_still=LONG, has_agent=True), Ready.ANY, False),
        (Observation(picture_still=200, has_agent=True), Ready.ANY, True),
        (Observation(picture_still=LONG, has_agent=True), Ready.SCREEN, True),
        (PICTURE, Ready.AGENT, False),
        (PICTURE, Ready.LOGIN, False),
        (PROMPT, Ready.LOGIN, True),
        (PROMPT, Ready.ANY, False),
        (PROMPT, Ready.SCREEN, False),
        (Observation(console="\nvm login: ", still=LONG), Ready.AGENT, False),
        (Observation(agent=True), Ready.LOGIN, True),
    ],
)
def test_what_proves_that_it_came_up(seen: Observation, ready: Ready, passes: bool) -> None:
    found = judged(seen, ready)
    assert (found is not None and found[0] is BootVerdict.PASS) is passes


@pytest.mark.parametrize(
    "wrecked",
    [
        Observation(picture_still=LONG, resets=9),
        Observation(picture_still=LONG, console="Kernel panic - not syncing: x"),
        Observation(picture_still=LONG, console="\n(initramfs) ", still=LONG),
    ],
)
def test_no_picture_outweighs_a_failure(wrecked: Observation) -> None:
    found = judged(wrecked, Ready.SCREEN)
    assert found
    assert found[0] is BootVerdict.FAIL

# SPDX-License-Identifier: Apache-2.0
"""A network that a guest has to itself: what it gets to see there, and what it may say without harm."""

import os
import random
import struct
import subprocess
import sys

import pytest

from qmpbackup.plan.segment import Segment

MAC = b"\x52\x54\x00\x12\x34\x56"
OURS, THEIRS = bytes((192, 168, 7, 1)), bytes((192, 168, 7, 5))
EVERYBODY = b"\xff" * 6


def arp(sender: bytes, wanted: bytes) -> bytes:
    """A question who has an address."""
    head = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1)
    return EVERYBODY + MAC + b"\x08\x06" + head + MAC + sender + bytes(6) + wanted


def dhcp(kind: int) -> bytes:
    """A question for an address."""
    asked = b"\x01\x01\x06\x00abcd" + bytes(20) + MAC + bytes(10 + 192) + b"\x63\x82\x53\x63"
    asked += bytes((12, 2)) + b"vm" + bytes((53, 1, kind, 255))
    udp = struct.pack(">HHHH", 68, 67, 8 + len(asked), 0) + asked
    head = struct.pack(
        ">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, bytes(4), b"\xff" * 4
    )
    return EVERYBODY + MAC + b"\x08\x00" + head + udp


def test_whoever_is_asked_for_is_there_but_nobody_has_the_guests_own_address() -> None:
    segment = Segment()
    (answer,) = segment.receive(arp(THEIRS, OURS))
    assert answer[:6] == MAC
    assert answer[28:32] == OURS
    assert segment.receive(arp(bytes(4), THEIRS)) == []
    assert segment.receive(arp(THEIRS, THEIRS)) == []
    assert segment.guests == {MAC: THEIRS}


def test_it_gives_an_address() -> None:
    segment = Segment()
    for asked, given in ((1, 2), (3, 5)):
        (answer,) = segment.receive(dhcp(asked))
        body = answer[42:]
        assert body[4:8] == b"abcd"
        assert body[16:20] == bytes((10, 0, 2, 15))
        assert body[28:34] == MAC
        assert body[240:243] == bytes((53, 1, given))
    assert segment.receive(dhcp(7)) == []  # it lets go
    assert segment.guests == {}


def test_what_a_guest_sends_never_fails_and_is_forgotten() -> None:
    segment, chosen = Segment(), random.Random(1)  # noqa: S311 - no secret
    frames = [arp(THEIRS, OURS), dhcp(1), b""]
    for _ in range(20_000):
        frame = bytearray(chosen.choice(frames))
        for _ in range(chosen.randrange(4)):
            if frame:
                frame[chosen.randrange(len(frame))] = chosen.randrange(256)
        segment.receive(bytes(frame[: chosen.randrange(len(frame) + 1)]))
    assert len(segment.guests) <= 16
    assert segment.open_ports == set()


LINUX = """
import fcntl, os, select, socket, struct, sys, time
from qmpbackup.plan.segment import Segment

tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH14x", b"tap0", 0x1002))  # TUNSETIFF: TAP, NO_PI
with socket.socket() as asking:
    for number, address in ((0x8916, "192.168.7.5"), (0x891C, "255.255.255.0")):
        name = struct.pack("16sHH4s8x", b"tap0", socket.AF_INET, 0, socket.inet_aton(address))
        fcntl.ioctl(asking, number, name)
    fcntl.ioctl(asking, 0x8914, struct.pack("16sH14x", b"tap0", 0x1043))  # up
server = socket.create_server(("192.168.7.5", 2222))
outside = socket.socket()
outside.setblocking(False)
outside.connect_ex(("192.168.7.77", 80))  # so that it is seen
segment = Segment()
while 2222 not in segment.open_ports:
    if select.select([tap], [], [], 0.1)[0]:
        for frame in segment.receive(os.read(tap, 2048)):
            os.write(tap, frame)
    else:
        for port in (2223, 2222):
            for frame in segment.knock(port):
                os.write(tap, frame)
assert segment.open_ports == {2222}
assert outside.connect_ex(("192.168.7.77", 80))  # nobody has answered
print("well")
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/net/tun"),  # noqa: PTH110
    reason="only root makes a network of its own",
)
def test_a_linux_answers_where_it_listens() -> None:
    command = ["unshare", "--net", sys.executable, "-c", LINUX]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "well\n", done.stderr

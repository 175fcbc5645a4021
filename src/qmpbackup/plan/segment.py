# SPDX-License-Identifier: Apache-2.0
"""A piece of network with one guest and nobody else, played to it frame by frame.

    ARP      whoever the guest asks for is there, and is us
    DHCP     it gets an address, where it wants one
    TCP      we knock at a port; an answer is all there ever is

Nothing is passed on, to anybody: what the guest sends ends here. Frames come from whoever runs in a guest, so
what cannot be understood is dropped. Pure: frames in, frames out.
"""

import struct
from dataclasses import dataclass, field

LARGEST = 2048
"""Bytes of a frame that is looked at."""

_US = b"\x52\x54\x00\x51\x4d\x50"
_EVERYBODY = b"\xff" * 6
_NOBODY = bytes(4)
_SERVER = bytes((10, 0, 2, 2))
_GIVEN = bytes((10, 0, 2, 15))
_MASK = bytes((255, 255, 255, 0))
_IPV4, _ARP, _UDP, _TCP = 0x0800, 0x0806, 17, 6
_SYN, _RST, _ACK = 2, 4, 16
_COOKIE = b"\x63\x82\x53\x63"
_OFFER, _GRANT = 2, 5
_FIRST_PORT = 40000
_SEQUENCE = 0x51000000
_MOST_GUESTS = 16


@dataclass(slots=True)
class Segment:
    """What is known of the guest: `guests` are its addresses, as MAC and IPv4; `open_ports` those at which it has
    answered."""

    guests: dict[bytes, bytes] = field(default_factory=dict)
    open_ports: set[int] = field(default_factory=set)

    def receive(self, frame: bytes) -> list[bytes]:
        """What is answered to a frame of the guest's."""
        try:
            sender, kind = frame[6:12], struct.unpack_from(">H", frame, 12)[0]
            if kind == _ARP:
                return self._asked(sender, frame[14:42])
            if kind == _IPV4 and frame[14] >> 4 == 4:
                return self._said(sender, frame[14:])
        except (struct.error, IndexError, ValueError):
            pass
        return []

    def knock(self, port: int) -> list[bytes]:
        """What asks whether somebody listens at a port of the guest's."""
        head = struct.pack(
            ">HHIIBBHHH", _from_port(port), port, _SEQUENCE, 0, 5 << 4, _SYN, 64240, 0, 0
        )
        return [
            _tcp(mac, _neighbour(address), address, head) for mac, address in self.guests.items()
        ]

    def _learn(self, mac: bytes, address: bytes) -> None:
        if address != _NOBODY and (mac in self.guests or len(self.guests) < _MOST_GUESTS):
            self.guests[mac] = address

    def _asked(self, sender: bytes, body: bytes) -> list[bytes]:
        kind, protocol, _, _, operation = struct.unpack_from(">HHBBH", body)
        theirs, wanted = body[14:18], body[24:28]
        if (kind, protocol, operation) != (1, _IPV4, 1) or len(wanted) != 4:
            return []
        self._learn(sender, theirs)
        if theirs in (_NOBODY, wanted):  # it asks whether its own address is taken
            return []
        head = struct.pack(">HHBBH", 1, _IPV4, 6, 4, 2)
        return [_frame(sender, _ARP, head + _US + wanted + sender + theirs)]

    def _said(self, sender: bytes, packet: bytes) -> list[bytes]:
        length = (packet[0] & 15) * 4
        total, protocol = struct.unpack_from(">H", packet, 2)[0], packet[9]
        theirs, body = packet[12:16], packet[length:total]
        self._learn(sender, theirs)
        if protocol == _UDP and struct.unpack_from(">HH", body) == (68, 67):
            return self._wanted(sender, body[8:])
        if protocol == _TCP:
            return self._answered(sender, packet[16:20], theirs, body)
        return []

    def _wanted(self, sender: bytes, request: bytes) -> list[bytes]:
        """DHCP (RFC 2131): one address, for whoever asks."""
        if request[236:240] != _COOKIE:
            return []
        kind = {1: _OFFER, 3: _GRANT}.get(_kind_of(request[240:]))
        if kind is None:
            return []
        head = b"\x02" + request[1:8] + bytes(2) + request[10:12] + bytes(4) + _GIVEN + _SERVER
        options = (
            (53, bytes((kind,))),
            (54, _SERVER),
            (51, b"\x00\x01\x51\x80"),
            (1, _MASK),
            (3, _SERVER),
        )
        told = b"".join(bytes((code, len(value))) + value for code, value in options) + b"\xff"
        reply = head + bytes(4) + request[28:44] + bytes(192) + _COOKIE + told.ljust(60, b"\0")
        datagram = struct.pack(">HHHH", 67, 68, 8 + len(reply), 0) + reply  # 0: no checksum
        return [_frame(sender, _IPV4, _packet(_UDP, _SERVER, _GIVEN, datagram))]

    def _answered(self, mac: bytes, ours: bytes, theirs: bytes, segment: bytes) -> list[bytes]:
        port, to, _, acknowledged, _, flags = struct.unpack_from(">HHIIBB", segment)
        if flags & (_SYN | _ACK | _RST) != _SYN | _ACK:
            return []
        if (to, acknowledged) != (_from_port(port), _SEQUENCE + 1):
            return []
        self.open_ports.add(port)
        reset = struct.pack(">HHIIBBHHH", to, port, acknowledged, 0, 5 << 4, _RST, 0, 0, 0)
        return [_tcp(mac, ours, theirs, reset)]


def _from_port(port: int) -> int:
    return _FIRST_PORT + port % 20000


def _kind_of(options: bytes) -> int:
    """DHCP's message type."""
    at = 0
    while at < len(options) and options[at] != 255:
        if options[at] == 53:
            return options[at + 2]
        at += 1 if options[at] == 0 else 2 + options[at + 1]
    return 0


def _neighbour(address: bytes) -> bytes:
    """An address beside the guest's, which it asks for as it is in no wider network."""
    return address[:3] + bytes((address[3] ^ 1,))


def _frame(to: bytes, kind: int, body: bytes) -> bytes:
    return (to + _US + struct.pack(">H", kind) + body).ljust(60, b"\0")


def _packet(protocol: int, ours: bytes, theirs: bytes, body: bytes) -> bytes:
    head = struct.pack(
        ">BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 0, 0x4000, 64, protocol, 0, ours, theirs
    )
    return head[:10] + _checksum(head) + head[12:] + body


def _tcp(mac: bytes, ours: bytes, theirs: bytes, segment: bytes) -> bytes:
    pseudo = ours + theirs + struct.pack(">BBH", 0, _TCP, len(segment))
    summed = segment[:16] + _checksum(pseudo + segment) + segment[18:]
    return _frame(mac, _IPV4, _packet(_TCP, ours, theirs, summed))


def _checksum(data: bytes) -> bytes:
    """RFC 1071."""
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack(">H", ~total & 0xFFFF)

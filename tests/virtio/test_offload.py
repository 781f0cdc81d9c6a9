"""Finishing frames in software, checked by an implementation that shares nothing with it."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio import limits
from vfio_user_virtio.virtio import offload
from vfio_user_virtio.virtio.offload import (
    CSUM,
    ECN,
    INVALID,
    NET_HEADER,
    STRAY_FLAGS,
    TSO4,
    TSO6,
    USO4,
    USO6,
    finish_untrusted,
    unfinished,
    without_stray_flags,
)

MACS = bytes.fromhex("525400000001 525400000002")
TAG = bytes.fromhex("81000064")


def ones_sum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total = 0
    for (word,) in struct.iter_unpack("!H", data):
        total += word
        total = (total & 0xFFFF) + (total >> 16)
    return total


class Packet:
    """A TCP or UDP packet in Ethernet, as a guest hands it over."""

    def __init__(
        self,
        *,
        tcp: bool = True,
        ipv6: bool = False,
        tagged: bool = False,
        payload: bytes = b"",
        options: bytes = b"",
        flags: int = 0x10,
        sequence: int = 0xFFFF_FF00,
        identification: int = 0xFFFE,
    ) -> None:
        self.tcp = tcp
        if tcp:
            offset = (20 + len(options)) << 2
            transport = struct.pack("!HHIIBBHHH", 1000, 80, sequence, 7, offset, flags, 512, 0, 0)
            transport += options
        else:
            transport = struct.pack("!HHHH", 1000, 53, 8 + len(payload), 0)
        protocol = 6 if tcp else 17
        length = len(transport) + len(payload)
        if ipv6:
            addresses = bytes(range(32))
            network = struct.pack("!IHBB", 6 << 28, length & 0xFFFF, protocol, 64) + addresses
            ethertype = b"\x86\xdd"
        else:
            addresses = bytes((10, 0, 0, 1, 10, 0, 0, 2))
            network = (
                struct.pack(
                    "!BBHHHBBH",
                    0x45,
                    0,
                    20 + length & 0xFFFF,
                    identification,
                    0x4000,
                    64,
                    protocol,
                    0,
                )
                + addresses
            )
            checksum = 0xFFFF ^ ones_sum(network)
            network = network[:10] + checksum.to_bytes(2, "big") + network[12:]
            ethertype = b"\x08\x00"
        ethernet = MACS + (TAG if tagged else b"") + ethertype
        self.start = len(ethernet) + len(network)
        self.offset = 16 if tcp else 6
        pseudo = ones_sum(addresses + struct.pack("!II", protocol, length))
        at = self.offset
        transport = transport[:at] + pseudo.to_bytes(2, "big") + transport[at + 2 :]
        self.headers = ethernet + network + transport
        self.payload = payload

    def with_header(
        self,
        flags: int = 1,
        gso_type: int = 0,
        gso_size: int = 0,
        start: int | None = None,
        offset: int | None = None,
    ) -> bytes:
        header = NET_HEADER.pack(
            flags,
            gso_type,
            9,  # a hint, and a lie
            gso_size,
            self.start if start is None else start,
            self.offset if offset is None else offset,
            0,
        )
        return header + self.headers + self.payload


def verify(frame: bytes) -> tuple[bytes, int, int, int]:
    """Check every length and checksum of a finished frame.

    Returns its payload, TCP sequence number, TCP flags and IPv4 identification.
    """
    assert frame[:12] == bytes(12)
    at = 24
    if frame[at : at + 2] == b"\x81\x00":
        assert frame[at : at + 4] == TAG
        at += 4
    ethertype, at = frame[at : at + 2], at + 2
    identification = 0
    if ethertype == b"\x08\x00":
        size = (frame[at] & 15) * 4
        assert ones_sum(frame[at : at + size]) == 0xFFFF
        total, identification = struct.unpack_from("!HH", frame, at + 2)
        assert total == len(frame) - at
        protocol = frame[at + 9]
        addresses = frame[at + 12 : at + 20]
        at += size
    else:
        length, protocol = struct.unpack_from("!HB", frame, at + 4)
        assert length == len(frame) - at - 40
        addresses = frame[at + 8 : at + 40]
        at += 40
        while protocol in (0, 60):
            protocol, more = frame[at], frame[at + 1]
            at += 8 * (more + 1)
    segment = frame[at:]
    assert ones_sum(addresses + struct.pack("!II", protocol, len(segment)) + segment) == 0xFFFF
    if protocol == 6:
        size = (segment[12] >> 4) * 4
        return segment[size:], int.from_bytes(segment[4:8], "big"), segment[13], identification
    assert protocol == 17
    assert segment[6:8] != b"\0\0"
    assert int.from_bytes(segment[4:6], "big") == len(segment)
    return segment[8:], 0, 0, identification


def finished(data: bytes) -> list[bytes]:
    frames = finish_untrusted(data)
    assert frames is not None
    joined = []
    for parts, size in frames:
        assert isinstance(parts[0], bytes)
        assert len(parts[0]) >= min(30, size)
        joined.append(b"".join(parts))
        assert len(joined[-1]) == size
    return joined


KINDS = [
    pytest.param(True, False, offload.GSO_TCPV4, TSO4, id="tcp4"),
    pytest.param(True, True, offload.GSO_TCPV6, TSO6, id="tcp6"),
    pytest.param(False, False, offload.GSO_UDP_L4, USO4, id="udp4"),
    pytest.param(False, True, offload.GSO_UDP_L4, USO6, id="udp6"),
]


@pytest.mark.parametrize(("tcp", "ipv6", "gso_type", "feature"), KINDS)
@given(data=st.data())
def test_segments_add_up_to_the_packet(
    tcp: bool, ipv6: bool, gso_type: int, feature: int, data: st.DataObject
) -> None:
    size = data.draw(st.integers(0, 6_000), label="payload")
    gso_size = data.draw(st.integers(max(1, size // limits.MAX_GSO_SEGMENTS + 1), 7_000))
    options = bytes(4 * data.draw(st.integers(0, 10), label="options")) if tcp else b""
    flags = data.draw(st.integers(0, 255), label="flags")
    tagged = data.draw(st.booleans(), label="tagged")
    payload = random.Random(size).randbytes(size)
    packet = Packet(
        tcp=tcp, ipv6=ipv6, tagged=tagged, payload=payload, options=options, flags=flags
    )
    guest = packet.with_header(gso_type=gso_type, gso_size=gso_size)
    assert unfinished(guest[:30], len(guest)) == CSUM | feature

    frames = [verify(frame) for frame in finished(guest)]
    assert b"".join(frame[0] for frame in frames) == payload
    assert all(len(frame[0]) == gso_size for frame in frames[:-1])
    for index, (_, sequence, tcp_flags, identification) in enumerate(frames):
        last = index == len(frames) - 1
        if not ipv6:
            assert identification == (0xFFFE + index) % 0x1_0000
        if tcp:
            assert sequence == (0xFFFF_FF00 + index * gso_size) % (1 << 32)
            kept = 0xFF & ~(0 if last else 0x09) & ~(0x80 if index else 0)
            assert tcp_flags == flags & kept


@given(
    tcp=st.booleans(),
    ipv6=st.booleans(),
    tagged=st.booleans(),
    payload=st.binary(max_size=100),
)
def test_a_checksum_is_completed(tcp: bool, ipv6: bool, tagged: bool, payload: bytes) -> None:
    packet = Packet(tcp=tcp, ipv6=ipv6, tagged=tagged, payload=payload)
    guest = packet.with_header()
    assert unfinished(guest[:30], len(guest)) == CSUM
    (frame,) = finished(guest)
    assert verify(frame)[0] == payload


def test_a_frame_that_asks_for_nothing_is_only_cleaned() -> None:
    packet = Packet(payload=b"x")
    guest = packet.with_header(flags=2)
    assert unfinished(guest[:30], len(guest)) == STRAY_FLAGS
    assert finished(guest) == [bytes(12) + guest[12:]]
    plain = packet.with_header(flags=0)
    assert unfinished(plain[:30], len(plain)) == 0


def test_stray_flags_are_taken_off() -> None:
    assert without_stray_flags(b"\x07abc") == b"\x01abc"
    assert without_stray_flags(b"\x07abc", 3) == b"\x03abc"


def test_ecn_is_a_need_of_its_own() -> None:
    packet = Packet(payload=bytes(100))
    guest = packet.with_header(gso_type=offload.GSO_TCPV4 | offload.GSO_ECN, gso_size=10)
    assert unfinished(guest[:30], len(guest)) == CSUM | TSO4 | ECN
    assert len(finished(guest)) == 10


def test_segments_without_needs_csum_are_made_all_the_same() -> None:
    guest = Packet(payload=bytes(100)).with_header(flags=0, gso_type=1, gso_size=60)
    assert unfinished(guest[:30], len(guest)) == TSO4
    assert [len(verify(frame)[0]) for frame in finished(guest)] == [60, 40]


def test_options_of_ipv6_are_stepped_over() -> None:
    packet = Packet(ipv6=True, payload=bytes(30))
    guest = packet.with_header(gso_type=4, gso_size=20, start=packet.start + 8)
    network = 12 + 14
    with_options = (
        guest[: network + 6]
        + b"\x3c"
        + guest[network + 7 : network + 40]
        + b"\x06\x00\x01\x04\0\0\0\0"
        + guest[network + 40 :]
    )
    assert [len(verify(frame)[0]) for frame in finished(with_options)] == [20, 10]


class TestRefused:
    """Headers that make no sense: the frame is dropped, and nothing is raised."""

    PACKET = Packet(payload=bytes(200))
    SIZE = len(PACKET.headers) + 200

    @pytest.mark.parametrize(
        ("start", "offset"),
        [
            (0, 0),
            (13, 0),
            (13, 100),
            (SIZE - 1, 0),
            (SIZE - 2, 1),
            (0xFFFF, 0),
            (14, 0xFFFF),
            (0xFFFF, 0xFFFF),
        ],
    )
    def test_checksum_out_of_bounds(self, start: int, offset: int) -> None:
        guest = self.PACKET.with_header(start=start, offset=offset)
        assert unfinished(guest[:30], len(guest)) == INVALID
        assert finish_untrusted(guest) is None

    @pytest.mark.parametrize("start", [14, SIZE - 2])
    def test_checksum_just_inside(self, start: int) -> None:
        guest = self.PACKET.with_header(start=start, offset=0)
        assert unfinished(guest[:30], len(guest)) == CSUM
        assert len(finished(guest)) == 1

    @pytest.mark.parametrize("start", [14, 17])
    def test_checksum_inside_the_tag(self, start: int) -> None:
        guest = Packet(tagged=True, payload=bytes(20)).with_header(start=start, offset=0)
        assert unfinished(guest[:30], len(guest)) == INVALID

    def test_checksum_too_far_to_put_a_tag_in_front(self) -> None:
        big = Packet(payload=bytes(65_500))
        guest = big.with_header(start=0xFFFC, offset=0)
        assert unfinished(guest[:30], len(guest)) == INVALID
        guest = big.with_header(start=0xFFFB, offset=0)
        assert unfinished(guest[:30], len(guest)) == CSUM

    @pytest.mark.parametrize(
        ("gso_type", "gso_size"),
        [(1, 0), (2, 10), (3, 10), (4, 10), (0x80, 10), (5 | 0x80, 10), (0x21, 10), (0xFF, 10)],
    )
    def test_gso(self, gso_type: int, gso_size: int) -> None:
        guest = self.PACKET.with_header(gso_type=gso_type, gso_size=gso_size)
        assert unfinished(guest[:30], len(guest)) & INVALID
        assert finish_untrusted(guest) is None

    @pytest.mark.parametrize(
        ("at", "value"),
        [
            pytest.param(26, 0x55, id="ip-version"),
            pytest.param(26, 0x44, id="ihl-short"),
            pytest.param(26, 0x4F, id="ihl-long"),
            pytest.param(32, 0x20, id="more-fragments"),
            pytest.param(33, 1, id="fragment-offset"),
            pytest.param(35, 17, id="protocol"),
            pytest.param(58, 0x40, id="tcp-offset-short"),
            pytest.param(58, 0xF0, id="tcp-offset-long"),
            pytest.param(6, 35, id="csum-start"),
            pytest.param(8, 6, id="csum-offset"),
        ],
    )
    def test_headers_inside(self, at: int, value: int) -> None:
        guest = bytearray(Packet(payload=bytes(30)).with_header(gso_type=1, gso_size=10))
        assert finish_untrusted(bytes(guest)) is not None
        guest[at] = value
        assert finish_untrusted(bytes(guest)) is None

    @pytest.mark.parametrize(("at", "value"), [(26, 0x40), (32, 44), (32, 43), (32, 17)])
    def test_headers_inside_ipv6(self, at: int, value: int) -> None:
        guest = bytearray(Packet(ipv6=True).with_header(gso_type=4, gso_size=10))
        assert finish_untrusted(bytes(guest)) is not None
        guest[at] = value
        assert finish_untrusted(bytes(guest)) is None

    def test_options_of_ipv6_without_end(self) -> None:
        guest = bytearray(Packet(ipv6=True, payload=bytes(100)).with_header(0, 4, 10))
        guest[32] = 0
        guest[66:] = bytes(len(guest) - 66)  # each names hop-by-hop as the next one
        assert finish_untrusted(bytes(guest)) is None

    def test_too_many_segments(self) -> None:
        most = Packet(payload=bytes(limits.MAX_GSO_SEGMENTS))
        assert len(finished(most.with_header(gso_type=1, gso_size=1))) == limits.MAX_GSO_SEGMENTS
        more = Packet(payload=bytes(limits.MAX_GSO_SEGMENTS + 1))
        assert finish_untrusted(more.with_header(gso_type=1, gso_size=1)) is None

    def test_a_segment_that_no_ip_header_can_count(self) -> None:
        big = Packet(payload=bytes(65_530))
        assert finish_untrusted(big.with_header(gso_type=1, gso_size=65_530)) is None
        assert len(finished(big.with_header(gso_type=1, gso_size=65_000))) == 2

    @pytest.mark.parametrize("ipv6", [False, True])
    @pytest.mark.parametrize("tcp", [False, True])
    def test_cut_off_anywhere(self, tcp: bool, ipv6: bool) -> None:
        gso_type = 5 if not tcp else 4 if ipv6 else 1
        packet = Packet(tcp=tcp, ipv6=ipv6)
        whole = packet.with_header(0, gso_type, 10)
        assert len(finished(whole)) == 1
        for size in range(len(whole)):
            assert finish_untrusted(whole[:size]) is None


@given(st.binary(max_size=200))
def test_garbage_never_raises(data: bytes) -> None:
    frames = finish_untrusted(data)
    if len(data) >= 26:
        refused = bool(unfinished(data[:30], len(data)) & INVALID)
        assert frames is None or not refused


@given(
    gso_type=st.sampled_from([1, 4, 5]),
    flags=st.integers(0, 1),
    tail=st.binary(max_size=120),
    ethertype=st.sampled_from([b"\x08\x00\x45", b"\x86\xdd\x60", b"\x81\x00\x00\x01\x08\x00"]),
)
def test_garbage_in_the_headers_never_raises(
    gso_type: int, flags: int, tail: bytes, ethertype: bytes
) -> None:
    header = NET_HEADER.pack(flags, gso_type, 0, 10, 34, 16, 0)
    finish_untrusted(header + MACS + ethertype + tail)

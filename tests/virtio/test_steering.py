"""Automatic receive steering: virtio 1.4, Network Device, Automatic receive steering."""

from __future__ import annotations

import struct
from collections.abc import Callable
from ipaddress import ip_address
from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.virtio.steering import SLOTS, Steering, flow_slot

ADDRESSES = bytes.fromhex("020000000001020000000002")
VLAN = bytes.fromhex("81000064")
Packet: TypeAlias = Callable[[str, str, tuple[int, int], int], bytes]
TCP, UDP, ICMP = 6, 17, 1


def ipv4(source: str, destination: str, ports: tuple[int, int], protocol: int = TCP) -> bytes:
    header = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0, 64, protocol, 0)
    packed = ip_address(source).packed + ip_address(destination).packed
    return b"\x08\x00" + header + packed + struct.pack("!HH", *ports) + bytes(16)


def ipv6(source: str, destination: str, ports: tuple[int, int], protocol: int = TCP) -> bytes:
    header = struct.pack("!IHBB", 6 << 28, 20, protocol, 64)
    packed = ip_address(source).packed + ip_address(destination).packed
    return b"\x86\xdd" + header + packed + struct.pack("!HH", *ports) + bytes(16)


@pytest.mark.parametrize("tag", [b"", VLAN], ids=["untagged", "tagged"])
@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize(
    ("packet", "there", "back"),
    [(ipv4, "10.0.0.1", "10.0.0.2"), (ipv6, "fe80::1", "fe80::2:3")],
    ids=["ipv4", "ipv6"],
)
def test_both_directions_of_a_flow_have_one_slot(
    packet: Packet, there: str, back: str, protocol: int, tag: bytes
) -> None:
    out = ADDRESSES + tag + packet(there, back, (5201, 40000), protocol)
    answer = ADDRESSES + tag + packet(back, there, (40000, 5201), protocol)
    assert flow_slot(out) == flow_slot(answer)
    others = {
        flow_slot(ADDRESSES + tag + packet(there, back, (5201, p), protocol))
        for p in range(40000, 40100)
    }
    assert len(others) > 50


def test_without_ports_the_addresses_alone_count() -> None:
    for packet, there, back in ((ipv4, "10.0.0.1", "10.0.0.2"), (ipv6, "fe80::1", "fe80::9")):
        slots = {flow_slot(ADDRESSES + packet(there, back, (1, p), ICMP)) for p in range(20)}
        assert len(slots) == 1


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        ADDRESSES + b"\x08\x06" + bytes(40),
        ADDRESSES + ipv4("10.0.0.1", "10.0.0.2", (1, 2))[:20],
        ADDRESSES + ipv6("fe80::1", "fe80::2", (1, 2))[:30],
        ADDRESSES + b"\x08\x00\x46" + bytes(60),
    ],
    ids=["nothing", "arp", "cut_ipv4", "cut_ipv6", "ipv4_options"],
)
def test_what_has_no_flow_is_in_slot_0(frame: bytes) -> None:
    assert flow_slot(frame) == 0


@given(st.binary(max_size=80))
def test_any_bytes_have_a_slot(frame: bytes) -> None:
    assert 0 <= flow_slot(memoryview(frame)) < SLOTS


def test_a_flow_is_received_where_it_was_sent() -> None:
    steering = Steering()
    assert {steering.pair_for(slot) for slot in range(SLOTS)} == {0}
    steering.resize(4)
    assert {steering.pair_for(slot) for slot in range(SLOTS)} == {0, 1, 2, 3}
    steering.sent(17, 3)
    assert steering.pair_for(17) == 3
    steering.sent(17, 4)
    assert steering.pair_for(17) == 3
    steering.resize(2)
    assert {steering.pair_for(slot) for slot in range(SLOTS)} == {0, 1}

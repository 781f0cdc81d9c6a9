"""Configuration spaces: ours is decoded in full, and no bytes whatever raise or never end."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio_server.pci_facts import (
    PciFacts,
    Place,
    decode_config_untrusted,
    virtio_places,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


def config_space(pieces: Mapping[int, bytes], size: int = 4096) -> bytes:
    config = bytearray(size)
    config[0x06] = 1 << 4
    config[0x34] = 0x40
    for offset, piece in pieces.items():
        config[offset : offset + len(piece)] = piece
    return bytes(config)


def decoded(pieces: Mapping[int, bytes], size: int = 4096) -> PciFacts:
    facts = decode_config_untrusted(config_space(pieces, size))
    assert facts is not None
    return facts


def test_the_header() -> None:
    facts = decoded(
        {
            0x00: struct.pack("<HHHHI", 0x1AF4, 0x1041, 0x0406, 0x0018, 0x02000001),
            0x10: struct.pack("<6I", 0, 0x8, 0xC, 0xFFFFFFFF, 1, 0),
            0x2C: struct.pack("<HH", 0x1AF4, 0x1100),
            0x3D: b"\x02",
            0x40: b"\x03\x00",
        }
    )
    assert (facts.vendor_id, facts.device_id, facts.revision_id) == (0x1AF4, 0x1041, 1)
    assert facts.class_code == 0x020000
    assert (facts.subsystem_vendor_id, facts.subsystem_id) == (0x1AF4, 0x1100)
    assert facts.command == ["MEMORY", "MASTER", "INTX_DISABLE"]
    assert facts.status == ["INTERRUPT", "CAPABILITIES_LIST"]
    assert facts.interrupt_pin == "INTB"
    assert facts.bar_kinds == {
        0: "memory, 32-bit, non-prefetchable",
        1: "memory, 32-bit, prefetchable",
        2: "memory, 64-bit, prefetchable",
        4: "I/O",
        5: "memory, 32-bit, non-prefetchable",
    }
    (vpd,) = facts.capabilities
    assert (vpd.id, vpd.name, vpd.details) == (3, "capability 0x03", {})


@pytest.mark.parametrize(
    ("body", "name", "details"),
    [
        (
            struct.pack("<BBHI", 1, 0, 3, 0x000B),
            "Power Management",
            {"version": 3, "state": "D3hot", "no_soft_reset": True},
        ),
        (struct.pack("<BBH", 5, 0, 0x0007), "MSI", {"enabled": True, "vectors": 8}),
        (
            struct.pack("<BBHIHHIHH", 0x10, 0, 0x92, 1 << 28 | 2, 0, 0, 0x43, 0, 0),
            "PCI Express",
            {
                "version": 2,
                "type": "Root Complex Integrated Endpoint",
                "flr": True,
                "max_payload": 512,
                "link_speed": "8 GT/s",
                "link_width": 4,
            },
        ),
        (
            struct.pack("<BBHII", 0x11, 0, 0xC003, 0x2001, 0x3002),
            "MSI-X",
            {
                "enabled": True,
                "masked": True,
                "vectors": 4,
                "table_bar": 1,
                "table_offset": 0x2000,
                "pba_bar": 2,
                "pba_offset": 0x3000,
            },
        ),
        (
            struct.pack("<BBBBBBHIII", 9, 0, 20, 2, 4, 0, 0, 0x3000, 0x1000, 4),
            "virtio",
            {
                "cfg_type": "NOTIFY",
                "bar": 4,
                "offset": 0x3000,
                "length": 0x1000,
                "notify_off_multiplier": 4,
            },
        ),
        (struct.pack("<BBBB", 9, 0, 8, 1), "virtio, not understood", {}),
        (struct.pack("<BBBBI", 9, 0, 20, 77, 0), "virtio, not understood", {}),
    ],
)
def test_capabilities(body: bytes, name: str, details: dict[str, object]) -> None:
    (capability,) = decoded({0x40: body}).capabilities
    assert (capability.name, capability.details) == (name, details)
    assert not capability.extended


def test_a_chain_is_walked_in_its_order_and_ends_where_it_loops() -> None:
    chain = decoded({0x40: b"\x03\x80", 0x80: b"\x03\x63", 0x60: b"\x03\x40"}).capabilities
    assert [capability.offset for capability in chain] == [0x40, 0x80, 0x60]


@pytest.mark.parametrize("pointer", [0x00, 0x04, 0x3C])
def test_a_chain_does_not_lead_into_the_header(pointer: int) -> None:
    assert [c.offset for c in decoded({0x40: bytes((3, pointer))}).capabilities] == [0x40]


def test_a_capability_that_does_not_fit_is_not_decoded() -> None:
    (capability,) = decoded({0x34: b"\xfc", 0xFC: b"\x11\x00\x03\x80"}).capabilities
    assert (capability.name, capability.details) == ("MSI-X, not understood", {})


def test_without_the_status_bit_there_is_no_list() -> None:
    assert decoded({0x06: b"\0", 0x40: b"\x03\x00"}).capabilities == []


def test_extended_capabilities() -> None:
    pieces = {
        0x40: b"\x03\x00",
        0x100: (0x0001 | 2 << 16 | 0x140 << 20).to_bytes(4, "little"),
        0x140: (0x7777 | 1 << 16 | 0x100 << 20).to_bytes(4, "little"),
    }
    first, second = [c for c in decoded(pieces).capabilities if c.extended]
    assert (first.name, first.details) == ("Advanced Error Reporting", {"version": 2})
    assert (second.offset, second.name) == (0x140, "extended capability 0x7777")


def test_structures_are_found_by_kind_and_the_first_counts() -> None:
    def structure(next_offset: int, bar: int, offset: int) -> bytes:
        return struct.pack("<BBBBBBHII", 9, next_offset, 16, 1, bar, 0, 0, offset, 64)

    pieces = {0x40: structure(0x60, 6, 1), 0x60: structure(0x80, 4, 2), 0x80: structure(0, 3, 3)}
    assert virtio_places(decoded(pieces)) == {"COMMON": Place(4, 2, 64)}


@given(st.binary(max_size=4200), st.binary(max_size=192))
def test_any_bytes_have_facts_or_none(config: bytes, capabilities: bytes) -> None:
    facts = decode_config_untrusted(config)
    assert (facts is None) == (len(config) < 64)
    facts = decoded({0x40: capabilities})
    assert len(facts.capabilities) <= 48 + 960
    attrs.asdict(facts)
    virtio_places(facts)

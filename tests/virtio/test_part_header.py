"""Headers of device parts: bytes both ways, names and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.virtio.part_images import GOLDEN
from vfio_user_virtio.virtio.common_config import COMMON_CONFIG_SIZE
from vfio_user_virtio.virtio.part_header import (
    COMMON_CFG_OFFSETS,
    COMMON_REGISTERS,
    OPTIONAL,
    ControlCommand,
    PartHeader,
    PartType,
    control_selector,
    decode_part_header_untrusted,
    encode_part_header,
    queue_selector,
    register_selector,
)

if TYPE_CHECKING:
    from vfio_user_virtio.virtio.parts import Part

any_header = st.builds(
    PartHeader,
    st.sampled_from(PartType) | st.integers(0, 0xFFFF),
    st.integers(0, 0xFF),
    st.binary(min_size=8, max_size=8),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, 0xFF),
)


@pytest.mark.parametrize(("name", "golden", "part"), GOLDEN)
def test_golden_headers(name: str, golden: str, part: Part) -> None:
    raw = bytes.fromhex(golden)[:16]
    assert encode_part_header(part.header) == raw
    assert decode_part_header_untrusted(raw) == part.header
    assert part.header.name == part.name == name


def test_the_two_headers_of_the_standard_text() -> None:
    status = PartHeader(PartType.DEVICE_STATUS)
    assert encode_part_header(status) == bytes.fromhex("0301 00 00 0000000000000000 00000000")
    queue = PartHeader(PartType.VQ_CFG, selector=queue_selector(1))
    assert encode_part_header(queue) == bytes.fromhex("0401 00 00 0100000000000000 00000000")


@given(any_header, st.binary(max_size=8))
def test_headers_come_back(header: PartHeader, before: bytes) -> None:
    raw = before + encode_part_header(header)
    assert decode_part_header_untrusted(raw, len(before)) == header
    assert header.optional == bool(header.flags & OPTIONAL)
    assert header.name
    assert header.key[0] == header.type


# --- selectors ----------------------------------------------------------------------------------


def test_selectors_both_ways() -> None:
    raw = register_selector(0x15)
    assert raw == bytes.fromhex("1500000000000000")
    assert PartHeader(PartType.PCI_COMMON_CFG, selector=raw).register == 0x15
    raw = queue_selector(0x102)
    assert raw == bytes.fromhex("0201000000000000")
    assert PartHeader(PartType.VQ_CFG, selector=raw).queue == 0x102
    for command in ControlCommand:
        raw = control_selector(command)
        assert raw == bytes((*command.value, 0, 0, 0, 0, 0, 0))
        assert PartHeader(PartType.CVQ_CFG, selector=raw).control is command


def test_commands_that_no_part_may_carry() -> None:
    for class_, command in ((0, 6), (2, 1), (5, 0), (6, 0), (9, 1)):
        selector = bytes((class_, command, 0, 0, 0, 0, 0, 0))
        header = PartHeader(PartType.CVQ_CFG, selector=selector)
        assert header.control is None
        assert header.name == f"CVQ_CFG class {class_} command {command}"


# --- registers ----------------------------------------------------------------------------------


def test_registers_fill_the_structure() -> None:
    end = 0
    for offset, register in COMMON_REGISTERS.items():
        assert offset == end, register.name
        end = offset + register.size
    assert end == COMMON_CONFIG_SIZE


def test_registers_that_only_these_parts_carry() -> None:
    assert [COMMON_REGISTERS[offset].name for offset in COMMON_CFG_OFFSETS] == [
        "device_feature_select",
        "driver_feature_select",
        "config_msix_vector",
        "num_queues",
        "config_generation",
        "queue_select",
    ]


# --- names and keys -----------------------------------------------------------------------------


def test_names_of_what_is_not_defined() -> None:
    assert PartHeader(0x600).name == "part 0x600"
    assert PartHeader(0).name == "part 0x000"
    offset_5 = PartHeader(PartType.PCI_COMMON_CFG, selector=register_selector(5))
    assert offset_5.name == "PCI_COMMON_CFG offset 5"


def test_keys_are_the_canonical_order() -> None:
    headers = [
        PartHeader(PartType.DEV_FEATURES),
        PartHeader(PartType.DRV_FEATURES),
        PartHeader(PartType.PCI_COMMON_CFG, selector=register_selector(8)),
        PartHeader(PartType.PCI_COMMON_CFG, selector=register_selector(16)),
        PartHeader(PartType.DEVICE_STATUS),
        PartHeader(PartType.VQ_CFG, selector=queue_selector(2)),
        PartHeader(PartType.VQ_CFG, selector=queue_selector(256)),
        PartHeader(PartType.VQ_NOTIFY_CFG, selector=queue_selector(0)),
        PartHeader(PartType.CVQ_CFG, selector=control_selector(ControlCommand.RX_NOBCAST)),
        PartHeader(PartType.CVQ_CFG, selector=control_selector(ControlCommand.MAC_TABLE_SET)),
        PartHeader(PartType.CVQ_CFG, selector=control_selector(ControlCommand.MAC_ADDR_SET)),
        PartHeader(0x201),
        PartHeader(0x201, selector=queue_selector(1)),
    ]
    keys = [header.key for header in headers]
    assert keys == sorted(set(keys))


def test_reserved_bytes_make_no_other_thing() -> None:
    plain = PartHeader(PartType.VQ_CFG, selector=queue_selector(2))
    odd = PartHeader(PartType.VQ_CFG, 0x80, b"\2\0\1\1\1\1\1\1", 32, 7)
    assert plain.key == odd.key
    assert plain.name == odd.name
    assert PartHeader(PartType.DEVICE_STATUS, selector=b"\1" * 8).key == (0x103, 0)
    assert PartHeader(PartType.DEVICE_STATUS, selector=b"\1" * 8).name == "DEVICE_STATUS"

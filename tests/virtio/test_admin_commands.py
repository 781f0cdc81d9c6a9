"""Data and results of administration commands: golden bytes both ways, and any lengths."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.virtio.admin import (
    Command,
    GroupType,
    Opcode,
    decode_bits_untrusted,
    decode_command_untrusted,
    encode_command,
)
from vfio_user_virtio.virtio.admin_commands import (
    DEV_PARTS_CAPABILITY,
    DEV_PARTS_OBJECT,
    MODE_STOPPED,
    GetKind,
    MetadataKind,
    NotifyInfo,
    NotifyPlace,
    ObjectKind,
    ObjectSpec,
    PartsRequest,
    cap_id_list_query,
    decode_capability_untrusted,
    decode_count_untrusted,
    decode_legacy_untrusted,
    decode_notify_info_untrusted,
    decode_object_limits_untrusted,
    decode_object_spec_untrusted,
    decode_parts_request_untrusted,
    decode_parts_set_untrusted,
    decode_u8_untrusted,
    device_cap_get,
    driver_cap_set,
    encode_count,
    encode_notify_info,
    encode_object_kind,
    encode_object_limits,
    legacy_notify_info,
    legacy_read,
    legacy_write,
    list_query,
    list_use,
    metadata_get,
    mode_set,
    object_create,
    object_destroy,
    object_modify,
    object_query,
    parts_get,
    parts_set,
)

HEAD = "000000000000000000000000"
SELF_MEMBER = "0000000000000000"
VF3 = "0300000000000000"
OBJECT_5 = "0000 0000 05000000"
OBJECT_6 = "0000 0000 06000000"
ZERO = "0000000000000000"
STATUS_HEADER = "0301 00 00 0000000000000000 00000000"
VQ_1_HEADER = "0401 00 00 0100000000000000 00000000"
STATUS_PART = "0301 00 00 0000000000000000 01000000 0f"
NOTIFY_PART = "0501 00 00 0200000000000000 08000000 0200020000000000"
SELECTED = bytes.fromhex(STATUS_HEADER + VQ_1_HEADER)
PARTS = bytes.fromhex(STATUS_PART + NOTIFY_PART)
SR_IOV_LIST = [0, 1, *range(0xA, 0x12)]
SELF_LIST = [0, 1, 7, 8, 9]
VF_NOTIFY = [NotifyInfo(NotifyPlace.MEMBER, 4, 0x1002), NotifyInfo(NotifyPlace.OWNER, 2, 8)]

GOLDEN = [
    (list_query(GroupType.SR_IOV), f"0000 0100 {HEAD} {SELF_MEMBER}", 24),
    (list_use(GroupType.SR_IOV, SR_IOV_LIST), f"0100 0100 {HEAD} {ZERO} 03fc030000000000", 32),
    (list_use(GroupType.SELF, SELF_LIST), f"0100 0000 {HEAD} {ZERO} 8303000000000000", 32),
    (cap_id_list_query(), f"0700 0000 {HEAD} {ZERO}", 24),
    (device_cap_get(DEV_PARTS_CAPABILITY), f"0800 0000 {HEAD} {ZERO} {ZERO}", 32),
    (
        driver_cap_set(DEV_PARTS_CAPABILITY, encode_object_limits(8, 8)),
        f"0900 0000 {HEAD} {ZERO} {ZERO} 0808000000000000",
        40,
    ),
    (object_create(3, 5, ObjectKind.GET), f"0a00 0100 {HEAD} {VF3} {OBJECT_5} {ZERO} {ZERO}", 48),
    (
        object_modify(3, 6, ObjectKind.SET),
        f"0b00 0100 {HEAD} {VF3} {OBJECT_6} {ZERO} 0100000000000000",
        48,
    ),
    (object_query(3, 5), f"0c00 0100 {HEAD} {VF3} {OBJECT_5} {ZERO}", 40),
    (object_destroy(3, 5), f"0d00 0100 {HEAD} {VF3} {OBJECT_5}", 32),
    (metadata_get(3, 5, MetadataKind.SIZE), f"0e00 0100 {HEAD} {VF3} {OBJECT_5} {ZERO}", 40),
    (
        metadata_get(3, 5, MetadataKind.LIST),
        f"0e00 0100 {HEAD} {VF3} {OBJECT_5} 0200000000000000",
        40,
    ),
    (parts_get(3, 5), f"0f00 0100 {HEAD} {VF3} {OBJECT_5} 0100000000000000", 40),
    (
        parts_get(3, 5, SELECTED),
        f"0f00 0100 {HEAD} {VF3} {OBJECT_5} {ZERO} {STATUS_HEADER} {VQ_1_HEADER}",
        72,
    ),
    (
        parts_set(3, 6, PARTS),
        f"1000 0100 {HEAD} {VF3} {OBJECT_6} {STATUS_PART} {NOTIFY_PART} 00000000000000",
        80,
    ),
    (mode_set(3, stopped=True), f"1100 0100 {HEAD} {VF3} 0100000000000000", 32),
    (mode_set(3, stopped=False), f"1100 0100 {HEAD} {VF3} {ZERO}", 32),
    (
        legacy_write(Opcode.LEGACY_COMMON_CFG_WRITE, 3, 14, b"\x01\x02"),
        f"0200 0100 {HEAD} {VF3} 0e00000000000000 0102",
        34,
    ),
    (
        legacy_write(Opcode.LEGACY_DEV_CFG_WRITE, 3, 0, b"\xaa"),
        f"0400 0100 {HEAD} {VF3} {ZERO} aa",
        33,
    ),
    (
        legacy_read(Opcode.LEGACY_COMMON_CFG_READ, 3, 18),
        f"0300 0100 {HEAD} {VF3} 1200000000000000",
        32,
    ),
    (legacy_read(Opcode.LEGACY_DEV_CFG_READ, 3, 6), f"0500 0100 {HEAD} {VF3} 0600000000000000", 32),
    (legacy_notify_info(3), f"0600 0100 {HEAD} {VF3}", 24),
]


@pytest.mark.parametrize(("command", "golden", "size"), GOLDEN)
def test_golden_commands(command: Command, golden: str, size: int) -> None:
    raw = bytes.fromhex(golden)
    assert encode_command(command) == raw
    assert len(raw) == size
    decoded = decode_command_untrusted(raw)
    assert decoded.data.startswith(command.data)
    assert decoded == Command(command.opcode, command.group_type, command.member_id, decoded.data)


def arrived(command: Command) -> bytes:
    """The data of `command` as a device gets it."""
    return decode_command_untrusted(encode_command(command)).data


def test_the_device_reads_what_the_driver_said() -> None:
    assert decode_bits_untrusted(arrived(list_use(GroupType.SELF, SELF_LIST))) == {*SELF_LIST}
    assert decode_capability_untrusted(arrived(device_cap_get(0x804))) == (0x804, b"")

    capability, value = decode_capability_untrusted(arrived(driver_cap_set(0, b"\x07\xff")))
    assert (capability, decode_object_limits_untrusted(value)) == (0, (7, 255))

    create = arrived(object_create(3, 9, ObjectKind.SET))
    assert decode_object_spec_untrusted(create) == ObjectSpec(DEV_PARTS_OBJECT, 9, 0, 1)
    assert arrived(object_modify(3, 9, ObjectKind.SET)) == create
    spec = ObjectSpec(DEV_PARTS_OBJECT, 9, 0, 0)
    assert decode_object_spec_untrusted(arrived(object_query(3, 9))) == spec
    assert decode_object_spec_untrusted(arrived(object_destroy(3, 9))) == spec

    for kind in MetadataKind:
        request = decode_parts_request_untrusted(arrived(metadata_get(3, 9, kind)))
        assert request == PartsRequest(DEV_PARTS_OBJECT, 9, kind, b"")
    request = decode_parts_request_untrusted(arrived(parts_get(3, 9)))
    assert request == PartsRequest(DEV_PARTS_OBJECT, 9, GetKind.ALL, b"")
    request = decode_parts_request_untrusted(arrived(parts_get(3, 9, b"")))
    assert request == PartsRequest(DEV_PARTS_OBJECT, 9, GetKind.SELECTED, b""), "none at all"
    request = decode_parts_request_untrusted(arrived(parts_get(3, 9, SELECTED)))
    assert request == PartsRequest(DEV_PARTS_OBJECT, 9, GetKind.SELECTED, SELECTED)
    type_, object_id, parts = decode_parts_set_untrusted(arrived(parts_set(3, 9, PARTS)))
    assert (type_, object_id, parts) == (DEV_PARTS_OBJECT, 9, PARTS + bytes(7))

    assert decode_u8_untrusted(arrived(mode_set(3, stopped=True))) == MODE_STOPPED
    assert decode_u8_untrusted(arrived(mode_set(3, stopped=False))) == 0

    for opcode in (Opcode.LEGACY_COMMON_CFG_WRITE, Opcode.LEGACY_DEV_CFG_WRITE):
        data = arrived(legacy_write(opcode, 3, 20, b"\x01\x02\x03"))
        assert decode_legacy_untrusted(data) == (20, b"\x01\x02\x03"), "its width survives"
    data = arrived(legacy_read(Opcode.LEGACY_DEV_CFG_READ, 3, 20))
    assert decode_legacy_untrusted(data) == (20, b"")


def test_the_lengths_that_linux_sends() -> None:
    """Nothing padded: 25 bytes of MODE_SET, 34 of DRIVER_CAP_SET, 25 of a legacy read."""
    raw = encode_command(mode_set(3, stopped=True))[:25]
    assert decode_u8_untrusted(decode_command_untrusted(raw).data) == MODE_STOPPED
    raw = encode_command(driver_cap_set(0, encode_object_limits(8, 8)))[:34]
    _, value = decode_capability_untrusted(decode_command_untrusted(raw).data)
    assert decode_object_limits_untrusted(value) == (8, 8)
    raw = encode_command(legacy_read(Opcode.LEGACY_DEV_CFG_READ, 3, 6))[:25]
    assert decode_legacy_untrusted(decode_command_untrusted(raw).data) == (6, b"")


@given(st.binary(max_size=40), st.integers(0, 40))
def test_what_is_missing_reads_zero(data: bytes, missing: int) -> None:
    """Every decoder reads a cut buffer as one that goes on with zeros."""
    zeros = bytes(missing)
    capability, value = decode_capability_untrusted(data)
    assert decode_capability_untrusted(data + zeros)[0] == capability
    assert decode_object_limits_untrusted(value) == decode_object_limits_untrusted(value + zeros)
    assert decode_object_spec_untrusted(data) == decode_object_spec_untrusted(data + zeros)
    request = decode_parts_request_untrusted(data)
    longer = decode_parts_request_untrusted(data + zeros)
    assert longer.headers.startswith(request.headers)
    assert longer == PartsRequest(request.type, request.object_id, request.kind, longer.headers)
    assert decode_parts_set_untrusted(data)[:2] == decode_parts_set_untrusted(data + zeros)[:2]
    assert decode_u8_untrusted(data) == decode_u8_untrusted(data + zeros)
    assert decode_count_untrusted(data) == decode_count_untrusted(data + zeros)
    assert decode_legacy_untrusted(data)[0] == decode_legacy_untrusted(data + zeros)[0]
    assert decode_notify_info_untrusted(data) == decode_notify_info_untrusted(data + zeros)


def test_reserved_bytes_are_ignored() -> None:
    data = bytes.fromhex("0000 ffff 05000000 0000000000000000 01 ffffffffffffff")
    assert decode_object_spec_untrusted(data) == ObjectSpec(0, 5, 0, ObjectKind.SET)
    data = bytes.fromhex("0000 ffff 05000000 01 ffffffffffffff")
    assert decode_parts_request_untrusted(data) == PartsRequest(0, 5, GetKind.ALL, b"")
    assert decode_capability_untrusted(b"\x01\0" + b"\xff" * 6) == (1, b"")


def test_flags_of_an_object_reach_the_device() -> None:
    """It has to refuse those it does not know."""
    data = bytes.fromhex("0102 0000 05000000 0000000000000080 02 00000000000000")
    assert decode_object_spec_untrusted(data) == ObjectSpec(0x201, 5, 1 << 63, 2)


def test_results() -> None:
    assert encode_count(0x20E) == bytes.fromhex("0e020000 00000000")
    assert decode_count_untrusted(bytes.fromhex("0e020000 ffffffff ff")) == 0x20E
    assert encode_object_kind(ObjectKind.SET) == bytes.fromhex("0100000000000000")
    assert decode_u8_untrusted(encode_object_kind(ObjectKind.SET)) == ObjectKind.SET


NOTIFY_HEX = "02 04 000000000000 0210000000000000 01 02 000000000000 0800000000000000" + 64 * "0"


def test_notify_info_both_ways() -> None:
    assert encode_notify_info(VF_NOTIFY) == bytes.fromhex(NOTIFY_HEX)
    assert decode_notify_info_untrusted(bytes.fromhex(NOTIFY_HEX)) == VF_NOTIFY
    assert decode_notify_info_untrusted(b"") == []
    full = bytes.fromhex(NOTIFY_HEX)[:32] * 3
    assert decode_notify_info_untrusted(full) == VF_NOTIFY * 2, "four, and no end"
    with pytest.raises(ValueError, match="4 places to notify; there is room for 3"):
        encode_notify_info(VF_NOTIFY * 2)


@pytest.mark.parametrize(
    "malformed",
    [
        "03 02 000000000000 0800000000000000",
        "01 00 000000000000 0800000000000000",
        "01 06 000000000000 0800000000000000",
        "01 02 000000000000 0900000000000000",
    ],
)
def test_malformed_notify_info_is_skipped(malformed: str) -> None:
    raw = bytes.fromhex(malformed) + encode_notify_info(VF_NOTIFY)
    assert decode_notify_info_untrusted(raw) == VF_NOTIFY
    ended = bytes(16) + encode_notify_info(VF_NOTIFY)
    assert decode_notify_info_untrusted(ended) == [], "behind the end of the list"

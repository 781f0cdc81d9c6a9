"""Values of virtio-net's parts: golden bytes, any values, wrong lengths and counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.virtio.part_images import PARTS
from vfio_user_virtio.virtio.common_parts import (
    VqCfg,
    VqNotifyCfg,
    common_cfg_part,
    dev_features_part,
    device_status_part,
    drv_features_part,
    vq_cfg_part,
    vq_notify_cfg_part,
)
from vfio_user_virtio.virtio.net_parts import (
    HashConfig,
    MacTable,
    PartValue,
    RssConfig,
    announce_ack_part,
    decode_hash_untrusted,
    decode_mac_table_untrusted,
    decode_rss_untrusted,
    decode_value_untrusted,
    decode_vlans_untrusted,
    hash_part,
    mac_addr_part,
    mac_table_part,
    rss_part,
    rx_part,
    vlan_part,
    vq_pairs_part,
)
from vfio_user_virtio.virtio.part_header import (
    COMMON_CFG_OFFSETS,
    ControlCommand,
    PartType,
    control_selector,
)
from vfio_user_virtio.virtio.parts import (
    Part,
    PartsError,
    canonical,
    encode_part_list,
    encode_parts,
    image_size,
)

MAC_1, MAC_2, GROUP = b"\2\0\0\0\0\1", b"\2\0\0\0\0\2", b"\1\0\x5e\0\0\1"
RSS = RssConfig(0x3F, 1, (0, 1, 2, 1), 8, b"KEY")
HASH = HashConfig(0x21, b"\xaa\xbb")

GOLDEN: list[tuple[Part, str, str, PartValue]] = [
    (rx_part(ControlCommand.RX_PROMISC, on=True), "0000", "01", 1),
    (rx_part(ControlCommand.RX_ALLMULTI, on=False), "0001", "00", 0),
    (rx_part(ControlCommand.RX_ALLUNI, on=True), "0002", "01", 1),
    (rx_part(ControlCommand.RX_NOMULTI, on=True), "0003", "01", 1),
    (rx_part(ControlCommand.RX_NOUNI, on=True), "0004", "01", 1),
    (rx_part(ControlCommand.RX_NOBCAST, on=True), "0005", "01", 1),
    (
        mac_table_part(MacTable((MAC_1, MAC_2), (GROUP,))),
        "0100",
        "02000000 020000000001 020000000002 01000000 01005e000001",
        MacTable((MAC_1, MAC_2), (GROUP,)),
    ),
    (mac_table_part(MacTable()), "0100", "00000000 00000000", MacTable()),
    (mac_addr_part(MAC_1), "0101", "020000000001", MAC_1),
    (vlan_part({4095, 0, 7}), "0200", "0000 0700 ff0f", frozenset({0, 7, 4095})),
    (vlan_part(()), "0200", "", frozenset()),
    (announce_ack_part(), "0300", "", b""),
    (vq_pairs_part(0x102), "0400", "0201", 0x102),
    (
        rss_part(RSS),
        "0401",
        "3f000000 0300 0100 0000 0100 0200 0100 0800 03 4b4559",
        RSS,
    ),
    (hash_part(HASH), "0402", "21000000 0000000000000000 02 aabb", HASH),
]


@pytest.mark.parametrize(("part", "selector", "value", "meaning"), GOLDEN)
def test_golden_values_both_ways(part: Part, selector: str, value: str, meaning: PartValue) -> None:
    assert part == Part(0x200, bytes.fromhex(value), bytes.fromhex(selector) + bytes(6))
    assert decode_value_untrusted(part) == meaning
    assert part.header.control is not None
    assert part.name == f"CVQ_CFG {part.header.control.name}"


def test_every_command_has_a_golden_value() -> None:
    assert {part.header.control for part, *_ in GOLDEN} == {*ControlCommand}


def test_values_of_the_common_parts() -> None:
    features = 1 << 0 | 1 << 1 | 1 << 5 | 1 << 32
    assert [decode_value_untrusted(part) for part in PARTS] == [
        features,
        features,
        7,
        9,
        0xF,
        VqCfg(256, 2, True, 0x1000, 0x2000, 0x3000),
        VqNotifyCfg(2, 3),
        MAC_1,
        b"",
    ]


def test_what_is_not_defined_is_bytes() -> None:
    assert decode_value_untrusted(Part(0x777, b"abc")) == b"abc"
    offloads = Part(PartType.CVQ_CFG, b"abc", b"\5\0" + bytes(6))
    assert decode_value_untrusted(offloads) == b"abc"


def test_sizes_of_a_whole_device() -> None:
    """One pair and the control queue; the figures are worked out from the standard by hand."""
    queue = VqCfg(256, 0xFFFF, False, 0, 0, 0)
    parts = [
        dev_features_part(1 << 32),
        drv_features_part(1 << 32),
        *(common_cfg_part(offset, 0) for offset in COMMON_CFG_OFFSETS),
        device_status_part(0xF),
        *(vq_cfg_part(index, queue) for index in range(3)),
        *(vq_notify_cfg_part(index, VqNotifyCfg(index, 0)) for index in range(3)),
        rx_part(ControlCommand.RX_PROMISC, on=True),
        rx_part(ControlCommand.RX_ALLMULTI, on=False),
        mac_table_part(MacTable()),
        mac_addr_part(MAC_1),
        vlan_part({1, 2}),
        vq_pairs_part(1),
    ]
    assert canonical(parts) == parts
    assert (len(parts), image_size(parts)) == (21, 526)
    assert len(encode_part_list([part.header for part in parts])) == 8 + 16 * 21
    assert [image_size(parts[:count]) for count in (9, 12, 15)] == [192, 336, 408]
    assert len(encode_parts(parts)) == 526


# --- any values ---------------------------------------------------------------------------------

u16 = st.integers(0, 0xFFFF)
u32 = st.integers(0, (1 << 32) - 1)
keys = st.binary(max_size=60)
tables = st.lists(st.binary(min_size=6, max_size=6), max_size=9).map(tuple)


@given(tables, tables)
def test_mac_tables_come_back(unicast: tuple[bytes, ...], multicast: tuple[bytes, ...]) -> None:
    part = mac_table_part(MacTable(unicast, multicast))
    assert len(part.value) == 8 + 6 * (len(unicast) + len(multicast))
    assert decode_mac_table_untrusted(part) == MacTable(unicast, multicast)


@given(st.frozensets(st.integers(0, 4095)))
def test_vlans_come_back(vlans: frozenset[int]) -> None:
    assert decode_vlans_untrusted(vlan_part(vlans)) == vlans


def test_every_vlan_at_once() -> None:
    part = vlan_part(range(4096))
    assert len(part.value) == 8192
    assert decode_vlans_untrusted(part) == frozenset(range(4096))


@given(u32, u16, st.integers(0, 7), u16, u16, keys)
def test_rss_comes_back(
    hash_types: int, unclassified: int, log: int, entry: int, max_tx: int, key: bytes
) -> None:
    table = tuple((entry + n) & 0xFFFF for n in range(1 << log))
    config = RssConfig(hash_types, unclassified, table, max_tx, key)
    part = rss_part(config)
    assert len(part.value) == 11 + 2 * len(table) + len(key)
    assert decode_rss_untrusted(part) == config


@given(u32, keys)
def test_hash_configurations_come_back(hash_types: int, key: bytes) -> None:
    part = hash_part(HashConfig(hash_types, key))
    assert len(part.value) == 13 + len(key)
    assert decode_hash_untrusted(part) == HashConfig(hash_types, key)


# --- refusals -----------------------------------------------------------------------------------


def control(command: ControlCommand, value: str) -> Part:
    return Part(PartType.CVQ_CFG, bytes.fromhex(value), control_selector(command))


@pytest.mark.parametrize(
    ("command", "value", "message"),
    [
        (ControlCommand.RX_PROMISC, "", "has 0 bytes, not 1"),
        (ControlCommand.RX_NOBCAST, "0000", "has 2 bytes, not 1"),
        (ControlCommand.RX_ALLUNI, "02", "it is 2, not 0 or 1"),
        (ControlCommand.MAC_ADDR_SET, "0200000000", "has 5 bytes, not 6"),
        (ControlCommand.ANNOUNCE_ACK, "00", "has 1 bytes, not 0"),
        (ControlCommand.MQ_VQ_PAIRS_SET, "01", "has 1 bytes, not 2"),
        (ControlCommand.MAC_TABLE_SET, "000000", "of 3 bytes ends before the second table"),
        (ControlCommand.MAC_TABLE_SET, "00000000", "of 4 bytes ends before the second table"),
        (
            ControlCommand.MAC_TABLE_SET,
            "ffffffff 00000000",
            "4294967295 addresses needs 25769803774 bytes, the value has 8",
        ),
        (ControlCommand.MAC_TABLE_SET, "00000000 01000000 0100", "needs 14 bytes, the value has 1"),
        (ControlCommand.MAC_TABLE_SET, "00000000 00000000 00", "has 9 bytes, not 8"),
        (ControlCommand.VLAN_ADD, "000000", "has 3 bytes, which are not ids of 2"),
        (ControlCommand.VLAN_ADD, "0000 0010", "VLAN 4096 is above 4095"),
        (ControlCommand.VLAN_ADD, "0100" * 4097, "has 4097 ids; there are no more than 4096"),
        (ControlCommand.MQ_RSS_CONFIG, "00" * 7, "has 7 bytes, at least 8 are needed"),
        (ControlCommand.MQ_RSS_CONFIG, "00000000 0200 0000", "mask is 0x2, not a power of two"),
        (
            ControlCommand.MQ_RSS_CONFIG,
            "00000000 ffff 0000",
            "has 8 bytes, at least 131083 are needed",
        ),
        (
            ControlCommand.MQ_RSS_CONFIG,
            "00000000 0000 0000 0000 0000",
            "has 12 bytes, at least 13 are needed",
        ),
        (
            ControlCommand.MQ_RSS_CONFIG,
            "00000000 0000 0000 0000 0000 02 aa",
            "has 14 bytes, not 15",
        ),
        (ControlCommand.MQ_HASH_CONFIG, "00" * 12, "has 12 bytes, at least 13 are needed"),
        (ControlCommand.MQ_HASH_CONFIG, "00" * 12 + "01", "has 13 bytes, not 14"),
        (ControlCommand.MQ_HASH_CONFIG, "00" * 14, "has 14 bytes, not 13"),
    ],
)
def test_refusals(command: ControlCommand, value: str, message: str) -> None:
    with pytest.raises(PartsError, match=message) as caught:
        decode_value_untrusted(control(command, value))
    assert caught.value.part == f"CVQ_CFG {command.name}"


@given(st.sampled_from(ControlCommand), st.binary(max_size=40))
def test_any_value_is_decoded_or_refused(command: ControlCommand, value: bytes) -> None:
    part = Part(PartType.CVQ_CFG, value, control_selector(command))
    try:
        decoded = decode_value_untrusted(part)
    except PartsError:
        return
    if command is ControlCommand.MAC_TABLE_SET:
        assert isinstance(decoded, MacTable)
        assert mac_table_part(decoded) == part
    elif command is ControlCommand.MQ_RSS_CONFIG:
        assert isinstance(decoded, RssConfig)
        assert rss_part(decoded) == part
    elif command is ControlCommand.MQ_HASH_CONFIG:
        assert isinstance(decoded, HashConfig)
        assert hash_part(decoded).value[12:] == value[12:], "without the reserved bytes"

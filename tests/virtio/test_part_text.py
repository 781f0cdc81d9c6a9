"""Values of parts as they are shown: each kind of part, what is malformed, what is too long."""

from __future__ import annotations

import json

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
    RssConfig,
    announce_ack_part,
    hash_part,
    mac_addr_part,
    mac_table_part,
    rss_part,
    rx_part,
    vlan_part,
    vq_pairs_part,
)
from vfio_user_virtio.virtio.part_header import (
    NO_SELECTOR,
    ControlCommand,
    PartType,
    control_selector,
)
from vfio_user_virtio.virtio.part_text import MAX_SHOWN, Json, reading_untrusted, text
from vfio_user_virtio.virtio.parts import Part, PartsError

MAC = bytes.fromhex("525400123456")
GROUP = bytes.fromhex("33330000fb01")

SHOWN: list[tuple[Part, Json, str]] = [
    (
        dev_features_part(1 << 5 | 1 << 32 | 1 << 44),
        ["MAC", "VERSION_1", "BIT_44"],
        "MAC VERSION_1 BIT_44",
    ),
    (drv_features_part(0), [], "none"),
    (common_cfg_part(16, 7), 7, "7"),
    (common_cfg_part(16, 0xFFFF), 0xFFFF, "none"),
    (common_cfg_part(21, 0xFF), 0xFF, "255"),
    (common_cfg_part(8, 1), 1, "1"),
    (common_cfg_part(12, 33), 33, "0x21"),
    (
        device_status_part(0x6F),
        ["ACKNOWLEDGE", "DRIVER", "DRIVER_OK", "FEATURES_OK", "BIT_5", "DEVICE_NEEDS_RESET"],
        "ACKNOWLEDGE DRIVER DRIVER_OK FEATURES_OK BIT_5 DEVICE_NEEDS_RESET",
    ),
    (device_status_part(0), [], "none"),
    (
        vq_cfg_part(3, VqCfg(256, 0xFFFF, True, 0x1000, 0x2000, 0x3000)),
        {
            "size": 256,
            "msix_vector": 0xFFFF,
            "enabled": True,
            "desc": 0x1000,
            "driver": 0x2000,
            "device": 0x3000,
        },
        "size 256, msix_vector none, enabled+, desc 0x1000, driver 0x2000, device 0x3000",
    ),
    (
        vq_cfg_part(3, VqCfg(8, 2, False, 0, 0, 0)),
        {"size": 8, "msix_vector": 2, "enabled": False, "desc": 0, "driver": 0, "device": 0},
        "size 8, msix_vector 2, enabled-, desc 0x0, driver 0x0, device 0x0",
    ),
    (
        vq_notify_cfg_part(2, VqNotifyCfg(2, 3)),
        {"queue_notify_off": 2, "queue_notif_config_data": 3},
        "queue_notify_off 2, queue_notif_config_data 3",
    ),
    (rx_part(ControlCommand.RX_PROMISC, on=True), True, "on"),
    (rx_part(ControlCommand.RX_NOBCAST, on=False), False, "off"),
    (
        mac_table_part(MacTable((MAC,), (GROUP, GROUP))),
        {
            "unicast": ["52:54:00:12:34:56"],
            "multicast": ["33:33:00:00:fb:01", "33:33:00:00:fb:01"],
        },
        "unicast 52:54:00:12:34:56, multicast 33:33:00:00:fb:01 33:33:00:00:fb:01",
    ),
    (
        mac_table_part(MacTable()),
        {"unicast": [], "multicast": []},
        "unicast none, multicast none",
    ),
    (mac_addr_part(MAC), "52:54:00:12:34:56", "52:54:00:12:34:56"),
    (vlan_part({4095, 10}), [10, 4095], "10 4095"),
    (vlan_part(()), [], "none"),
    (announce_ack_part(), "", "no value"),
    (vq_pairs_part(4), 4, "4"),
    (
        rss_part(RssConfig(0x3F, 1, (0, 1), 2, b"\xab\xcd")),
        {
            "hash_types": 0x3F,
            "unclassified_queue": 1,
            "indirection_table": [0, 1],
            "max_tx_vq": 2,
            "hash_key": "abcd",
        },
        "hash_types 0x3f, unclassified_queue 1, indirection_table 0 1, max_tx_vq 2, hash_key abcd",
    ),
    (
        hash_part(HashConfig(1, b"")),
        {"hash_types": 1, "hash_key": ""},
        "hash_types 0x1, hash_key no value",
    ),
    (Part(0x201, b"\xde\xad"), "dead", "dead"),
    (Part(0x201, MAC, control_selector(ControlCommand.MAC_ADDR_SET)), MAC.hex(), MAC.hex()),
    (Part(PartType.CVQ_CFG, b"\1", b"\7" + bytes(7)), "01", "01"),
]


@pytest.mark.parametrize(("part", "reading", "line"), SHOWN, ids=lambda value: str(value)[:40])
def test_values_are_shown(part: Part, reading: Json, line: str) -> None:
    found = reading_untrusted(part)
    assert found == reading
    assert type(found) is type(reading), "True is no 1"
    assert text(found, part.name) == line
    assert json.loads(json.dumps(found)) == reading


def test_every_kind_of_part_is_shown_above() -> None:
    kinds = {part.type for part, _, _ in SHOWN}
    assert set(PartType) <= kinds
    shown = {part.header.control for part, _, _ in SHOWN}
    others = {f"RX_{name}" for name in ("ALLMULTI", "ALLUNI", "NOMULTI", "NOUNI")}
    assert {command.name for command in set(ControlCommand) - shown} == others


@pytest.mark.parametrize(
    "part",
    [
        Part(PartType.DEVICE_STATUS, b""),
        Part(PartType.VQ_CFG, bytes(31)),
        Part(PartType.PCI_COMMON_CFG, b"\0", b"\x64" + bytes(7)),
        Part(PartType.CVQ_CFG, b"\2", control_selector(ControlCommand.RX_PROMISC)),
    ],
)
def test_what_is_malformed_is_refused(part: Part) -> None:
    with pytest.raises(PartsError) as caught:
        reading_untrusted(part)
    assert caught.value.part == part.name


def test_text_of_what_is_long_is_short() -> None:
    vlans = text(reading_untrusted(vlan_part(range(100))))
    assert vlans.split(" ")[-5:] == [str(MAX_SHOWN - 1), "…", "and", "36", "more"]
    assert text(reading_untrusted(vlan_part(range(MAX_SHOWN)))).endswith(" 63")
    assert text(reading_untrusted(Part(0x201, bytes(64)))) == "00" * 64
    assert text(reading_untrusted(Part(0x201, bytes(65)))) == "00" * 64 + "… (65 bytes)"


types = st.sampled_from([*PartType, 0x0, 0x201])
selectors = st.sampled_from([NO_SELECTOR, *(part.selector for part in PARTS)]) | st.binary(
    min_size=8, max_size=8
)


@given(types, selectors, st.binary(max_size=80))
def test_any_part_is_shown_in_one_line_or_refused(type_: int, selector: bytes, raw: bytes) -> None:
    part = Part(type_, raw, selector)
    try:
        reading = reading_untrusted(part)
    except PartsError:
        return
    assert json.loads(json.dumps(reading)) == reading
    line = text(reading, part.name)
    assert line.isprintable()
    assert line

"""The device configuration of virtio-net: where each field lies, and back again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.virtio.net_config import (
    DUPLEX_FULL,
    DUPLEX_UNKNOWN,
    NET_CONFIG_SIZE,
    NetConfig,
    NetStatus,
    decode_net_config,
)

MAC = bytes.fromhex("021122334455")
CONFIG = NetConfig(MAC, NetStatus.LINK_UP | NetStatus.ANNOUNCE, 8, 9000, 25_000, DUPLEX_FULL)


def test_the_layout() -> None:
    assert CONFIG.encode() == bytes.fromhex("021122334455 0300 0800 2823 a8610000 01 00 0000")
    assert len(CONFIG.encode()) == NET_CONFIG_SIZE


@pytest.mark.parametrize(
    ("config", "offset", "expected"),
    [
        (NetConfig(b"\xff" * 6, NetStatus(0), 0, 0, 0, 0), 0, "ffffffffffff"),
        (NetConfig(bytes(6), NetStatus.LINK_UP, 0, 0, 0, 0), 6, "01"),
        (NetConfig(bytes(6), NetStatus.ANNOUNCE, 0, 0, 0, 0), 6, "02"),
        (NetConfig(bytes(6), NetStatus(0), 0x8001, 0, 0, 0), 8, "0180"),
        (NetConfig(bytes(6), NetStatus(0), 0, 0xFFFE, 0, 0), 10, "feff"),
        (NetConfig(bytes(6), NetStatus(0), 0, 0, 0xFFFF_FFFE, 0), 12, "feffffff"),
        (NetConfig(bytes(6), NetStatus(0), 0, 0, 0, DUPLEX_UNKNOWN), 16, "ff"),
    ],
)
def test_each_field_is_where_the_standard_has_it(
    config: NetConfig, offset: int, expected: str
) -> None:
    field = bytes.fromhex(expected)
    blank = NET_CONFIG_SIZE - len(field) - offset
    assert config.encode() == bytes(offset) + field + bytes(blank)


@given(
    st.builds(
        NetConfig,
        st.binary(min_size=6, max_size=6),
        st.integers(0, 0xFFFF).map(NetStatus),
        st.integers(0, 0xFFFF),
        st.integers(0, 0xFFFF),
        st.integers(0, 0xFFFF_FFFF),
        st.integers(0, 0xFF),
    )
)
def test_decode_undoes_encode(config: NetConfig) -> None:
    assert decode_net_config(config.encode()) == config


@pytest.mark.parametrize("size", [0, NET_CONFIG_SIZE - 1, NET_CONFIG_SIZE + 1])
def test_any_other_length_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"{size} bytes of device configuration; 20 are needed"):
        decode_net_config(bytes(size))

"""What a member may be made from, and what it then offers."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.config import (
    DEFAULT_FEATURES,
    OPTIONAL_FEATURES,
    SPEED_UNKNOWN,
    MemberConfig,
)
from vfio_user_virtio.errors import ConfigError
from vfio_user_virtio.virtio.features import Feature, mask_of, refusal_untrusted

MAC = bytes.fromhex("020000000001")
DEFAULT = MemberConfig(mac=MAC)


def test_the_default_member() -> None:
    assert DEFAULT.offered == DEFAULT_FEATURES
    assert refusal_untrusted(DEFAULT.offered, DEFAULT.offered) is None
    assert (DEFAULT.num_queues, DEFAULT.num_vectors) == (3, 4)


def test_what_cannot_be_carried_through_a_migration_is_not_offered() -> None:
    everything = DEFAULT_FEATURES | OPTIONAL_FEATURES
    assert everything & mask_of((Feature.RING_PACKED, Feature.IN_ORDER, Feature.ADMIN_VQ)) == 0
    assert everything & mask_of((Feature.RSS, Feature.HASH_REPORT)) == 0


def test_features_that_other_settings_bring() -> None:
    assert MemberConfig(mac=MAC, mtu=9000).offered == DEFAULT.offered | Feature.MTU.mask
    many = MemberConfig(mac=MAC, queue_pairs=8)
    assert many.offered == DEFAULT.offered | Feature.MQ.mask
    assert (many.num_queues, many.num_vectors) == (17, 18)
    bare = MemberConfig(
        mac=MAC, mtu=9000, queue_pairs=2, features_off=mask_of((Feature.MTU, Feature.MQ))
    )
    assert bare.offered == DEFAULT.offered


def test_features_on_and_off() -> None:
    on = MemberConfig(mac=MAC, features_on=Feature.NOTIFICATION_DATA.mask | Feature.CSUM.mask)
    assert on.offered == DEFAULT.offered | Feature.NOTIFICATION_DATA.mask
    off = MemberConfig(mac=MAC, features_off=Feature.RING_RESET.mask | Feature.VERSION_1.mask)
    assert off.offered == DEFAULT.offered & ~Feature.RING_RESET.mask


@pytest.mark.parametrize(
    ("setting", "low", "high"),
    [
        ("member_id", 1, limits.MAX_MEMBERS),
        ("mtu", 68, 65_535),
        ("queue_pairs", 1, limits.MAX_QUEUE_PAIRS),
        ("queue_size", 2, limits.MAX_QUEUE_SIZE),
        ("speed", 0, SPEED_UNKNOWN),
        ("max_tx_rate", 64_000, 1 << 40),
        ("access_vlan", 1, 4_094),
    ],
)
def test_ranges(setting: str, low: int, high: int) -> None:
    def member(value: int) -> MemberConfig:
        settings: dict[str, Any] = {setting: value}
        return attrs.evolve(DEFAULT, **settings)

    for value in (low, high):
        assert getattr(member(value), setting) == value
    for value in (low - 1, high + 1):
        expected = f"{setting.replace('member_id', 'member id')} {value} is out of range"
        with pytest.raises(ConfigError, match=f"{expected}; it can be {low} to {high}"):
            member(value)


@pytest.mark.parametrize(
    "mac", [b"", MAC[:5], MAC + b"\0", bytes(6), b"\xff" * 6, bytes.fromhex("01005e000001")]
)
def test_a_mac_is_six_bytes_of_one_station(mac: bytes) -> None:
    with pytest.raises(ConfigError, match="not a unicast address of 6 bytes"):
        MemberConfig(mac=mac)


def test_queue_sizes_are_powers_of_two() -> None:
    with pytest.raises(ConfigError, match="queue_size 384 is not a power of two"):
        MemberConfig(mac=MAC, queue_size=384)


def test_a_feature_that_no_member_has_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no member can offer: RING_PACKED, BIT_77"):
        MemberConfig(mac=MAC, features_on=Feature.RING_PACKED.mask | 1 << 77)


@pytest.mark.parametrize(
    ("off", "message"),
    [
        ((Feature.CSUM,), "HOST_TSO4 without CSUM"),
        ((Feature.GUEST_TSO4, Feature.GUEST_TSO6), "GUEST_ECN without any of"),
        ((Feature.CTRL_VQ,), "CTRL_GUEST_OFFLOADS without CTRL_VQ"),
    ],
)
def test_a_feature_cannot_be_taken_from_under_another(
    off: tuple[Feature, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"cannot be offered together: {message}"):
        MemberConfig(mac=MAC, features_off=mask_of(off))


@given(st.sets(st.sampled_from(Feature), max_size=4), st.integers(1, 8))
def test_a_member_that_exists_offers_what_its_driver_may_accept_whole(
    off: set[Feature], queue_pairs: int
) -> None:
    try:
        config = attrs.evolve(DEFAULT, features_off=mask_of(off), queue_pairs=queue_pairs)
    except ConfigError:
        assert off & {
            *(Feature.CSUM, Feature.GUEST_CSUM, Feature.CTRL_VQ),
            *(Feature.GUEST_TSO4, Feature.HOST_TSO4),
        }
        return
    assert refusal_untrusted(config.offered, config.offered) is None
    assert config.offered & mask_of(off) & ~Feature.VERSION_1.mask == 0

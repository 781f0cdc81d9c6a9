"""Feature bits: the standard's numbers, names in messages, and what may not be accepted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.virtio.features import (
    NEEDS,
    NEEDS_ONE,
    Feature,
    feature_names,
    mask_of,
    refusal_untrusted,
)

F = Feature
VERSION_1 = 1 << 32
EVERYTHING = (1 << 128) - 1

STANDARD = {
    "CSUM": 0,
    "GUEST_CSUM": 1,
    "CTRL_GUEST_OFFLOADS": 2,
    "MTU": 3,
    "MAC": 5,
    "GUEST_TSO4": 7,
    "GUEST_TSO6": 8,
    "GUEST_ECN": 9,
    "GUEST_UFO": 10,
    "HOST_TSO4": 11,
    "HOST_TSO6": 12,
    "HOST_ECN": 13,
    "HOST_UFO": 14,
    "MRG_RXBUF": 15,
    "STATUS": 16,
    "CTRL_VQ": 17,
    "CTRL_RX": 18,
    "CTRL_VLAN": 19,
    "CTRL_RX_EXTRA": 20,
    "GUEST_ANNOUNCE": 21,
    "MQ": 22,
    "CTRL_MAC_ADDR": 23,
    "INDIRECT_DESC": 28,
    "EVENT_IDX": 29,
    "VERSION_1": 32,
    "ACCESS_PLATFORM": 33,
    "RING_PACKED": 34,
    "IN_ORDER": 35,
    "ORDER_PLATFORM": 36,
    "SR_IOV": 37,
    "NOTIFICATION_DATA": 38,
    "NOTIF_CONFIG_DATA": 39,
    "RING_RESET": 40,
    "ADMIN_VQ": 41,
    "SUSPEND": 43,
    "DEVICE_STATS": 50,
    "HASH_TUNNEL": 51,
    "VQ_NOTF_COAL": 52,
    "NOTF_COAL": 53,
    "GUEST_USO4": 54,
    "GUEST_USO6": 55,
    "HOST_USO": 56,
    "HASH_REPORT": 57,
    "GUEST_HDRLEN": 59,
    "RSS": 60,
    "RSC_EXT": 61,
    "STANDBY": 62,
    "SPEED_DUPLEX": 63,
}
NEED_CSUM = (F.HOST_TSO4, F.HOST_TSO6, F.HOST_UFO, F.HOST_USO)
NEED_GUEST_CSUM = (F.GUEST_TSO4, F.GUEST_TSO6, F.GUEST_UFO, F.GUEST_USO4, F.GUEST_USO6)
NEED_CTRL_VQ = (
    F.CTRL_GUEST_OFFLOADS,
    F.CTRL_RX,
    F.CTRL_VLAN,
    F.GUEST_ANNOUNCE,
    F.MQ,
    F.CTRL_MAC_ADDR,
    F.NOTF_COAL,
    F.VQ_NOTF_COAL,
    F.HASH_TUNNEL,
    F.RSS,
)


def test_the_numbers_are_the_standards() -> None:
    assert {feature.name: feature.value for feature in Feature} == STANDARD


def test_masks() -> None:
    assert mask_of(()) == 0
    assert mask_of((F.CSUM, F.VERSION_1, F.CSUM)) == 1 | VERSION_1
    assert F.SPEED_DUPLEX.mask == 1 << 63


def test_names_go_from_the_lowest_bit_up_and_unknown_bits_have_one_too() -> None:
    assert feature_names(0) == []
    word = 1 << 70 | VERSION_1 | 1 << 4 | 1
    assert feature_names(word) == ["CSUM", "BIT_4", "VERSION_1", "BIT_70"]


@given(st.sets(st.sampled_from(Feature)))
def test_a_word_and_its_names_say_the_same(features: set[Feature]) -> None:
    assert feature_names(mask_of(features)) == [f.name for f in sorted(features)]


@pytest.mark.parametrize(
    ("feature", "needed"),
    [(feature, F.CSUM) for feature in NEED_CSUM]
    + [(feature, F.GUEST_CSUM) for feature in NEED_GUEST_CSUM]
    + [(feature, F.CTRL_VQ) for feature in NEED_CTRL_VQ],
)
def test_what_a_feature_needs(feature: Feature, needed: Feature) -> None:
    others = EVERYTHING & ~needed.mask
    for dependant in NEEDS:
        if dependant is not feature:
            others &= ~dependant.mask
    assert refusal_untrusted(EVERYTHING, others) == f"{feature.name} without {needed.name}"


def test_nothing_else_needs_anything() -> None:
    assert set(NEEDS) == {*NEED_CSUM, *NEED_GUEST_CSUM, *NEED_CTRL_VQ}


@pytest.mark.parametrize(
    ("feature", "choice"),
    [
        (F.GUEST_ECN, (F.GUEST_TSO4, F.GUEST_TSO6)),
        (F.HOST_ECN, (F.HOST_TSO4, F.HOST_TSO6)),
        (F.RSC_EXT, (F.HOST_TSO4, F.HOST_TSO6)),
        (F.HASH_TUNNEL, (F.RSS, F.HASH_REPORT)),
    ],
)
def test_what_a_feature_needs_one_of(feature: Feature, choice: tuple[Feature, Feature]) -> None:
    base = mask_of((F.VERSION_1, F.CSUM, F.GUEST_CSUM, F.CTRL_VQ, feature))
    names = f"{choice[0].name}, {choice[1].name}"
    assert refusal_untrusted(EVERYTHING, base) == f"{feature.name} without any of {names}"
    for one in choice:
        assert refusal_untrusted(EVERYTHING, base | one.mask) is None
    assert len(NEEDS_ONE) == 4


def test_only_what_is_offered_may_be_wanted() -> None:
    offered = mask_of((F.VERSION_1, F.CSUM))
    assert refusal_untrusted(offered, offered) is None
    assert refusal_untrusted(offered, VERSION_1) is None
    assert refusal_untrusted(offered, offered | F.MQ.mask | 1 << 127) == "not offered: MQ, BIT_127"


def test_a_legacy_driver_is_refused() -> None:
    refusal = refusal_untrusted(EVERYTHING, 0)
    assert refusal is not None
    assert "VERSION_1" in refusal


@given(
    st.just(EVERYTHING) | st.integers(0, EVERYTHING),
    st.integers(0, EVERYTHING)
    | st.sets(st.sampled_from(Feature)).map(lambda features: mask_of(features) | VERSION_1),
)
def test_any_word_is_accepted_exactly_if_it_keeps_every_rule(offered: int, wanted: int) -> None:
    def has(feature: Feature) -> bool:
        return bool(wanted >> feature & 1)

    sound = wanted & ~offered == 0 and has(F.VERSION_1)
    sound &= has(F.CSUM) or not any(map(has, NEED_CSUM))
    sound &= has(F.GUEST_CSUM) or not any(map(has, NEED_GUEST_CSUM))
    sound &= has(F.CTRL_VQ) or not any(map(has, NEED_CTRL_VQ))
    sound &= has(F.GUEST_TSO4) or has(F.GUEST_TSO6) or not has(F.GUEST_ECN)
    sound &= has(F.HOST_TSO4) or has(F.HOST_TSO6) or not (has(F.HOST_ECN) or has(F.RSC_EXT))
    sound &= has(F.RSS) or has(F.HASH_REPORT) or not has(F.HASH_TUNNEL)
    assert (refusal_untrusted(offered, wanted) is None) == sound

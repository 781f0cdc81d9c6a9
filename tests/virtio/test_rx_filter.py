"""The receive filter: each rule by example, and all settings at once against the rules as prose."""

from __future__ import annotations

import itertools
from typing import Final

import attrs
import pytest

from vfio_user_virtio import limits
from vfio_user_virtio.virtio.rx_filter import BROADCAST, MAX_VLAN, FilterState, accepts

MAC: Final = bytes.fromhex("020000000001")
OTHER: Final = bytes.fromhex("020000000002")
LISTED: Final = bytes.fromhex("020000000003")
GROUP: Final = bytes.fromhex("333300000001")
LISTED_GROUP: Final = bytes.fromhex("01005e000001")
DESTINATIONS: Final = (MAC, OTHER, LISTED, GROUP, LISTED_GROUP, BROADCAST)
FLAGS: Final = (
    "promisc",
    "allmulti",
    "alluni",
    "nomulti",
    "nouni",
    "nobcast",
    "unicast_overflow",
    "multicast_overflow",
    "filter_vlans",
)


def filtered(**settings: object) -> FilterState:
    """A filter that a driver has set up with one address of each kind, and VLAN 5."""
    state = FilterState(MAC, promisc=False, vlans={5})
    state.set_tables([LISTED], [LISTED_GROUP])
    for name, value in settings.items():
        setattr(state, name, value)
    return state


def passed(state: FilterState, vlan: int | None = None) -> set[bytes]:
    return {destination for destination in DESTINATIONS if accepts(state, destination, vlan)}


def test_a_fresh_device_takes_everything() -> None:
    state = FilterState(MAC)
    assert passed(state) == set(DESTINATIONS)
    assert passed(attrs.evolve(state, filter_vlans=True), vlan=7) == set(DESTINATIONS)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {MAC, LISTED, LISTED_GROUP, BROADCAST}),
        ({"promisc": True}, set(DESTINATIONS)),
        ({"allmulti": True}, {MAC, LISTED, GROUP, LISTED_GROUP, BROADCAST}),
        ({"alluni": True}, {MAC, OTHER, LISTED, LISTED_GROUP, BROADCAST}),
        ({"nomulti": True}, {MAC, LISTED, BROADCAST}),
        ({"nomulti": True, "allmulti": True}, {MAC, LISTED, BROADCAST}),
        ({"nouni": True}, {LISTED_GROUP, BROADCAST}),
        ({"nouni": True, "alluni": True}, {LISTED_GROUP, BROADCAST}),
        ({"nobcast": True}, {MAC, LISTED, LISTED_GROUP}),
        ({"nobcast": True, "allmulti": True}, {MAC, LISTED, GROUP, LISTED_GROUP}),
        ({"nobcast": True, "promisc": True}, set(DESTINATIONS)),
        ({"mac": OTHER}, {OTHER, LISTED, LISTED_GROUP, BROADCAST}),
    ],
)
def test_what_passes(settings: dict[str, object], expected: set[bytes]) -> None:
    assert passed(filtered(**settings)) == expected


def test_tagged_frames_need_their_vlan_once_vlans_are_filtered() -> None:
    state = filtered()
    assert accepts(state, MAC, 6)
    state.filter_vlans = True
    assert accepts(state, MAC, 5)
    assert accepts(state, MAC, None)
    assert not accepts(state, MAC, 6)
    assert not accepts(state, BROADCAST, 0)
    state.vlans.update({0, MAX_VLAN})
    assert accepts(state, BROADCAST, 0)
    assert accepts(state, MAC, MAX_VLAN)
    assert not accepts(state, OTHER, 5)


def test_two_filters_share_no_vlans() -> None:
    first, second = FilterState(MAC), FilterState(MAC)
    first.vlans.add(1)
    assert second.vlans == set()


def _addresses(count: int, first: int) -> list[bytes]:
    return [bytes([first]) + number.to_bytes(5, "big") for number in range(count)]


def test_a_table_that_does_not_fit_passes_all_of_its_kind() -> None:
    state = filtered()
    full, group = _addresses(limits.MAX_MAC_TABLE, 2), _addresses(limits.MAX_MAC_TABLE, 3)
    state.set_tables(full, group)
    assert accepts(state, full[-1], None)
    assert accepts(state, group[-1], None)
    assert passed(state) == {MAC, OTHER, LISTED, BROADCAST}

    state.set_tables([*full, MAC], group)
    assert state.unicast == frozenset()
    assert passed(state) >= {MAC, OTHER, LISTED}
    assert not accepts(state, GROUP, None)

    state.set_tables(full, [*group, GROUP])
    assert state.multicast == frozenset()
    assert accepts(state, LISTED_GROUP, None)
    assert not accepts(state, b"\2\xff\0\0\0\0", None)

    state.set_tables([], [])
    assert passed(state) == {MAC, BROADCAST}


def test_every_setting_at_once() -> None:
    for values in itertools.product((False, True), repeat=len(FLAGS)):
        is_set = dict(zip(FLAGS, values, strict=True))
        state = filtered(**is_set)
        for destination in DESTINATIONS:
            if destination == BROADCAST:
                wanted = not is_set["nobcast"]
            elif destination in (GROUP, LISTED_GROUP):
                every = is_set["allmulti"] or is_set["multicast_overflow"]
                wanted = (every or destination == LISTED_GROUP) and not is_set["nomulti"]
            else:
                every = is_set["alluni"] or is_set["unicast_overflow"]
                wanted = (every or destination in (MAC, LISTED)) and not is_set["nouni"]
            for vlan in (None, 5, 6):
                ours = vlan != 6 or not is_set["filter_vlans"]
                expected = is_set["promisc"] or (wanted and ours)
                assert accepts(state, destination, vlan) == expected, (is_set, destination, vlan)

"""Control commands: what each does, what it needs, and that a refusal changes nothing."""

from __future__ import annotations

import copy
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio import limits
from vfio_user_virtio.virtio.features import Feature, mask_of
from vfio_user_virtio.virtio.net_control import (
    ERR,
    GUEST_OFFLOADS,
    OK,
    Change,
    ControlClass,
    NetState,
    execute_untrusted,
)
from vfio_user_virtio.virtio.rx_filter import FilterState

MAC: Final = bytes.fromhex("020000000001")
UNICAST: Final = [bytes([2, 0, 0, 0, 1, n]) for n in range(3)]
GROUPS: Final = [bytes([1, 0, 0x5E, 0, 0, n]) for n in range(2)]
EVERYTHING: Final = (1 << 64) - 1
TSO4: Final = Feature.GUEST_TSO4.mask

FEATURE_OF: Final = {
    (0, 0): Feature.CTRL_RX,
    (0, 1): Feature.CTRL_RX,
    (0, 2): Feature.CTRL_RX_EXTRA,
    (0, 3): Feature.CTRL_RX_EXTRA,
    (0, 4): Feature.CTRL_RX_EXTRA,
    (0, 5): Feature.CTRL_RX_EXTRA,
    (1, 0): Feature.CTRL_RX,
    (1, 1): Feature.CTRL_MAC_ADDR,
    (2, 0): Feature.CTRL_VLAN,
    (2, 1): Feature.CTRL_VLAN,
    (3, 0): Feature.GUEST_ANNOUNCE,
    (4, 0): Feature.MQ,
    (5, 0): Feature.CTRL_GUEST_OFFLOADS,
}
"""Every command by class and number, with the feature that it needs."""


def table(addresses: list[bytes]) -> bytes:
    return len(addresses).to_bytes(4, "little") + b"".join(addresses)


VALID: Final = {
    **{(0, command): b"\1" for command in range(6)},
    (1, 0): table(UNICAST) + table(GROUPS),
    (1, 1): UNICAST[0],
    (2, 0): b"\x05\x00",
    (2, 1): b"\x07\x00",
    (3, 0): b"",
    (4, 0): b"\x04\x00",
    (5, 0): TSO4.to_bytes(8, "little"),
}
"""Data that each command accepts, and that no shorter data would do for."""


def state(features: int = EVERYTHING) -> NetState:
    """A device whose every setting differs from what `VALID` asks for."""
    return NetState(
        FilterState(MAC, promisc=False, vlans={7}),
        features=features,
        max_queue_pairs=4,
        guest_offloads=Feature.GUEST_CSUM.mask,
        announce=True,
    )


def run(device: NetState, kind: tuple[int, int], data: bytes) -> tuple[bytes, Change]:
    return execute_untrusted(device, bytes(kind) + data)


def refused(device: NetState, kind: tuple[int, int], data: bytes) -> bool:
    """Whether the command is refused; if so, that nothing has changed."""
    before = copy.deepcopy(device)
    answer, change = run(device, kind, data)
    if answer == OK:
        return False
    assert answer == ERR
    assert change == Change.NOTHING
    assert device == before
    return True


# --- all commands alike ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FEATURE_OF)
def test_a_command_needs_its_feature_and_no_other(kind: tuple[int, int]) -> None:
    mask = FEATURE_OF[kind].mask
    offloads = GUEST_OFFLOADS if kind == (5, 0) else 0
    assert not refused(state(mask | offloads), kind, VALID[kind])
    assert refused(state(EVERYTHING & ~mask), kind, VALID[kind])


@pytest.mark.parametrize("kind", FEATURE_OF)
def test_data_may_be_longer_but_not_shorter(kind: tuple[int, int]) -> None:
    for missing in range(1, len(VALID[kind]) + 1):
        assert refused(state(), kind, VALID[kind][:-missing])
    exact, longer = state(), state()
    assert run(exact, kind, VALID[kind]) == run(longer, kind, VALID[kind] + b"\xff" * 9)
    assert exact == longer
    assert exact != state()


def test_every_other_class_and_command_is_refused() -> None:
    device = state()
    for kind in ((cls, command) for cls in range(256) for command in range(256)):
        if kind not in FEATURE_OF:
            assert execute_untrusted(device, bytes(kind) + b"\1" * 16) == (ERR, Change.NOTHING)
    assert device == state()


def test_a_command_without_class_or_number_is_refused() -> None:
    for command in (b"", b"\0", b"\3"):
        assert execute_untrusted(state(), command) == (ERR, Change.NOTHING)


def test_classes_have_the_standards_numbers() -> None:
    assert [(c.name, c.value) for c in ControlClass] == [
        ("RX", 0),
        ("MAC", 1),
        ("VLAN", 2),
        ("ANNOUNCE", 3),
        ("MQ", 4),
        ("GUEST_OFFLOADS", 5),
    ]


# --- each for itself ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "name"),
    [*enumerate(("promisc", "allmulti", "alluni", "nomulti", "nouni", "nobcast"))],
)
def test_rx_modes(command: int, name: str) -> None:
    device = state()
    expected = state()
    setattr(expected.filter, name, True)
    assert run(device, (0, command), b"\1") == (OK, Change.NOTHING)
    assert device == expected
    assert run(device, (0, command), b"\0") == (OK, Change.NOTHING)
    assert device == state()
    assert refused(device, (0, command), b"\2")
    assert refused(device, (0, command), b"\xff")


def test_mac_tables_replace_what_was_there() -> None:
    device = state()
    assert run(device, (1, 0), table(UNICAST) + table(GROUPS)) == (OK, Change.NOTHING)
    assert device.filter.unicast == frozenset(UNICAST)
    assert device.filter.multicast == frozenset(GROUPS)
    assert run(device, (1, 0), table([]) + table(GROUPS[:1])) == (OK, Change.NOTHING)
    assert device.filter.unicast == frozenset()
    assert device.filter.multicast == frozenset(GROUPS[:1])


def test_a_mac_table_that_is_too_long_means_all() -> None:
    device = state()
    many = [b"\2" + n.to_bytes(5, "big") for n in range(limits.MAX_MAC_TABLE + 1)]
    assert run(device, (1, 0), table(many) + table(many[1:])) == (OK, Change.NOTHING)
    assert device.filter.unicast_overflow
    assert not device.filter.multicast_overflow
    assert device.filter.multicast == frozenset(many[1:])


@pytest.mark.parametrize("count", [1, 0x2AAA_AAAB, 0xFFFF_FFFF])
def test_a_mac_table_may_not_promise_more_than_it_has(count: int) -> None:
    promise = count.to_bytes(4, "little")
    assert refused(state(), (1, 0), promise + b"\2" * 5)
    assert refused(state(), (1, 0), table(UNICAST) + promise + b"\1" * 5)


def test_mac_address() -> None:
    device = state()
    assert run(device, (1, 1), UNICAST[1]) == (OK, Change.MAC)
    assert device.filter.mac == UNICAST[1]


def test_vlans() -> None:
    device = state()
    for vlan in (0, 5, 4095, 5):
        assert run(device, (2, 0), vlan.to_bytes(2, "little")) == (OK, Change.NOTHING)
    assert device.filter.vlans == {0, 5, 7, 4095}
    for vlan in (5, 9):
        assert run(device, (2, 1), vlan.to_bytes(2, "little")) == (OK, Change.NOTHING)
    assert device.filter.vlans == {0, 7, 4095}
    for command in (0, 1):
        assert refused(device, (2, command), (4096).to_bytes(2, "little"))
        assert refused(device, (2, command), b"\xff\xff")


def test_announce() -> None:
    device = state()
    assert run(device, (3, 0), b"") == (OK, Change.ANNOUNCED)
    assert not device.announce


@pytest.mark.parametrize(("pairs", "valid"), [(0, False), (1, True), (4, True), (5, False)])
def test_queue_pairs(pairs: int, valid: bool) -> None:
    device = state()
    data = pairs.to_bytes(2, "little")
    assert refused(device, (4, 0), data) != valid
    if valid:
        assert run(device, (4, 0), data) == (OK, Change.QUEUE_PAIRS)
        assert device.queue_pairs == pairs
    assert refused(device, (4, 0), b"\xff\xff")


def test_guest_offloads_are_those_that_were_negotiated() -> None:
    assert (
        mask_of(
            (
                Feature.GUEST_CSUM,
                Feature.GUEST_TSO4,
                Feature.GUEST_TSO6,
                Feature.GUEST_ECN,
                Feature.GUEST_USO4,
                Feature.GUEST_USO6,
            )
        )
        == GUEST_OFFLOADS
    )
    device = state(Feature.CTRL_GUEST_OFFLOADS.mask | Feature.GUEST_CSUM.mask | TSO4)
    for word in (0, TSO4, Feature.GUEST_CSUM.mask | TSO4):
        assert run(device, (5, 0), word.to_bytes(8, "little")) == (OK, Change.OFFLOADS)
        assert device.guest_offloads == word
    for word in (Feature.GUEST_TSO6.mask, Feature.CTRL_GUEST_OFFLOADS.mask, EVERYTHING):
        assert refused(device, (5, 0), word.to_bytes(8, "little"))


# --- anything at all ------------------------------------------------------------------------------

commands = st.binary(max_size=32) | st.tuples(
    st.sampled_from(sorted(VALID)), st.binary(max_size=24)
).map(lambda parts: bytes(parts[0]) + parts[1])


@given(st.integers(0, EVERYTHING), st.lists(commands, max_size=6))
def test_any_commands_are_answered_and_a_refusal_changes_nothing(
    features: int, sequence: list[bytes]
) -> None:
    device = state(features)
    for command in sequence:
        before = copy.deepcopy(device)
        answer, change = execute_untrusted(device, command)
        assert answer in (OK, ERR)
        if answer == ERR:
            assert device == before
            assert change == Change.NOTHING
        assert device.features == features
        assert 1 <= device.queue_pairs <= device.max_queue_pairs == 4
        assert device.guest_offloads & ~(features & GUEST_OFFLOADS | before.guest_offloads) == 0
        assert all(vlan <= 4095 for vlan in device.filter.vlans)
        assert len(device.filter.mac) == 6

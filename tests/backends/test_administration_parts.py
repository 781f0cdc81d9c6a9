"""Device parts through the software owner: metadata, getting, setting, and what fits a member."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.backends.administration_rig import OK, ROOM, Driver, a_config, ready
from vfio_user_virtio.backends.software.member_parts import (
    DeviceState,
    largest_image_size,
    parts_of,
    with_parts_untrusted,
)
from vfio_user_virtio.limits import MAX_MAC_TABLE
from vfio_user_virtio.virtio import admin_commands as commands
from vfio_user_virtio.virtio.admin import Command, GroupType, Opcode, Qualifier, Status
from vfio_user_virtio.virtio.admin_commands import MetadataKind, decode_count_untrusted
from vfio_user_virtio.virtio.common_config import NO_VECTOR, CommonState, QueueState
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
from vfio_user_virtio.virtio.features import Feature, mask_of
from vfio_user_virtio.virtio.net_control import NetState
from vfio_user_virtio.virtio.net_parts import (
    HashConfig,
    MacTable,
    announce_ack_part,
    hash_part,
    mac_addr_part,
    mac_table_part,
    rx_part,
    vlan_part,
    vq_pairs_part,
)
from vfio_user_virtio.virtio.part_header import (
    ControlCommand,
    PartHeader,
    PartType,
    queue_selector,
)
from vfio_user_virtio.virtio.parts import (
    Part,
    PartsError,
    decode_part_list_untrusted,
    encode_headers,
    encode_parts,
    first_out_of_order,
    first_repeated,
    image_size,
    parse_parts_untrusted,
)
from vfio_user_virtio.virtio.rx_filter import FilterState

if TYPE_CHECKING:
    from vfio_user_virtio.backends.software.config import MemberConfig

INVALID_COMMAND: Final = (Status.EINVAL, Qualifier.INVALID_COMMAND)
INVALID_FIELD: Final = (Status.EINVAL, Qualifier.INVALID_FIELD)
ENOMEM: Final = (Status.ENOMEM, Qualifier.INVALID_COMMAND)
LARGE: Final = a_config(queue_pairs=2, mtu=1500)
READY: Final = 0x0F


def stopped(config: MemberConfig = LARGE) -> Driver:
    driver = ready(config)
    driver.result(commands.mode_set(1, stopped=True))
    return driver


def image(driver: Driver) -> list[Part]:
    return parse_parts_untrusted(driver.result(commands.parts_get(1, 5)))


def put(driver: Driver, *parts: Part) -> tuple[int, int]:
    return driver.status(commands.parts_set(1, 6, encode_parts(parts)))


# --- getting --------------------------------------------------------------------------------------


def test_metadata_says_what_getting_gives() -> None:
    driver = stopped()
    parts = image(driver)
    assert first_out_of_order(parts) is None
    assert first_repeated(parts) is None

    def ask(kind: MetadataKind) -> bytes:
        return driver.result(commands.metadata_get(1, 5, kind))

    assert decode_count_untrusted(ask(MetadataKind.SIZE)) == image_size(parts)
    assert decode_count_untrusted(ask(MetadataKind.COUNT)) == len(parts)
    headers = decode_part_list_untrusted(ask(MetadataKind.LIST))
    assert headers == [part.header for part in parts]
    names = [header.name for header in headers]
    assert names[:2] == ["DEV_FEATURES", "DRV_FEATURES"]
    assert names[-1] == "CVQ_CFG MQ_VQ_PAIRS_SET"
    assert "VQ_CFG queue 4" in names


def test_the_size_of_a_running_member_is_the_most_it_can_become() -> None:
    driver = ready(LARGE)
    size = decode_count_untrusted(driver.result(commands.metadata_get(1, 5, MetadataKind.SIZE)))
    assert size == largest_image_size(LARGE)
    rules = driver.member().state.filter
    rules.vlans.update(range(4096))
    rules.set_tables([bytes(6)] * (MAX_MAC_TABLE + 1), [bytes(6)] * (MAX_MAC_TABLE + 1))
    assert image_size(image(driver)) == size


@pytest.mark.parametrize("kind", MetadataKind)
def test_metadata_that_does_not_fit(kind: MetadataKind) -> None:
    driver = ready()
    command = commands.metadata_get(1, 5, kind)
    size = len(driver.result(command))
    assert driver.status(command, 8 + size) == OK
    assert driver.status(command, 8 + size - 1) == ENOMEM
    assert driver.status(command, 8) == ENOMEM


def test_an_image_that_does_not_fit_is_cut() -> None:
    driver = stopped()
    whole = encode_parts(image(driver))
    for room in (0, 1, 16, 100, len(whole) - 1, len(whole)):
        answer = driver.answer(commands.parts_get(1, 5), 8 + room)
        assert answer.ok
        assert answer.result == whole[:room]


def test_selected_parts_come_in_their_own_order_and_absent_ones_do_not() -> None:
    driver = ready()

    def names(*headers: PartHeader) -> list[str]:
        result = driver.result(commands.parts_get(1, 5, encode_headers(headers)))
        return [part.name for part in parse_parts_untrusted(result)]

    status = PartHeader(PartType.DEVICE_STATUS, length=77)
    first = PartHeader(PartType.VQ_CFG, selector=queue_selector(0))
    absent = PartHeader(PartType.VQ_CFG, selector=queue_selector(9))
    unknown = PartHeader(0x4FF)
    assert names(first, status, unknown, absent) == ["DEVICE_STATUS", "VQ_CFG queue 0"]
    assert names(status, status) == ["DEVICE_STATUS"]
    assert names(absent) == []
    assert names() == []


def test_too_many_selected_parts() -> None:
    headers = encode_headers([PartHeader(PartType.DEVICE_STATUS)]) * 16_385
    assert ready().status(commands.parts_get(1, 5, headers)) == INVALID_FIELD


# --- setting --------------------------------------------------------------------------------------


def test_only_a_stopped_member_is_set() -> None:
    driver = ready()
    whole = image(driver)
    assert put(driver, *whole) == INVALID_COMMAND
    assert driver.status(commands.parts_set(1, 6, b"rubbish")) == INVALID_COMMAND
    driver.result(commands.mode_set(1, stopped=True))
    assert put(driver, *whole) == OK
    driver.result(commands.mode_set(1, stopped=False))
    assert put(driver, *whole) == INVALID_COMMAND


def test_modes_may_be_set_twice() -> None:
    driver = ready()
    for stop in (False, True, True, False, False):
        driver.result(commands.mode_set(1, stopped=stop))
        assert driver.member().mode.stopped is stop


def test_what_is_set_is_seen_at_once_but_takes_effect_at_resume() -> None:
    driver = stopped()
    assert put(driver, device_status_part(3)) == OK
    assert put(driver, vlan_part((7,)), rx_part(ControlCommand.RX_ALLMULTI, on=True)) == OK
    assert put(driver, device_status_part(1), device_status_part(2)) == OK, "repeated"
    assert device_status_part(2) in image(driver)
    assert vlan_part((7,)) in image(driver)
    member = driver.member()
    assert member.function.common.state.status == 0
    assert member.state.filter.vlans == set()
    driver.result(commands.object_destroy(1, 6))
    driver.result(commands.mode_set(1, stopped=False))
    assert member.function.common.state.status == 2
    assert member.state.filter.vlans == {7}
    assert member.state.filter.allmulti


@pytest.mark.parametrize("tail", [b"", bytes(7), bytes(15), bytes(16), bytes(4096)])
def test_zeros_after_the_last_part(tail: bytes) -> None:
    driver = stopped()
    data = encode_parts([device_status_part(1)]) + tail
    assert driver.status(commands.parts_set(1, 6, data)) == OK
    assert device_status_part(1) in image(driver)


@pytest.mark.parametrize("tail", [b"\1" + bytes(6), bytes(15) + b"\1", b"\3\1" + bytes(10) + b"\2"])
def test_malformed_parts(tail: bytes) -> None:
    driver = stopped()
    before = image(driver)
    data = encode_parts([device_status_part(1)]) + tail
    assert driver.status(commands.parts_set(1, 6, data)) == INVALID_FIELD
    assert image(driver) == before


def a_queue(size: int = 64, msix_vector: int = 1) -> VqCfg:
    return VqCfg(size, msix_vector, True, 0x1000, 0x2000, 0x3000)


MISFITS: Final = (
    (dev_features_part(LARGE.offered & ~Feature.MQ.mask), "only this device offers MQ"),
    (dev_features_part(LARGE.offered | Feature.RSS.mask), "does not offer RSS"),
    (dev_features_part(LARGE.offered, words=1), "not 16"),
    (drv_features_part(0, words=1), "not 16"),
    (drv_features_part(0, words=3), "not 16"),
    (common_cfg_part(18, 3), "this device has 5 queues"),
    (common_cfg_part(16, 6), "MSI-X vector 6; this device has 6"),
    (Part(PartType.PCI_COMMON_CFG, bytes(2), (17).to_bytes(8, "little")), "no register"),
    (Part(PartType.PCI_COMMON_CFG, bytes(4), (16).to_bytes(8, "little")), "not 2"),
    (device_status_part(0x10), "never has 0x10"),
    (device_status_part(0x20), "never has 0x20"),
    (device_status_part(0x04), "DRIVER_OK without FEATURES_OK"),
    (Part(PartType.DEVICE_STATUS, bytes(2)), "not 1"),
    (vq_cfg_part(5, a_queue()), "this device has 5 queues"),
    (vq_cfg_part(0, a_queue(size=512)), "at most 256"),
    (vq_cfg_part(0, a_queue(size=0)), "its size is 0"),
    (vq_cfg_part(0, a_queue(size=48)), "its size is 48"),
    (vq_cfg_part(0, a_queue(msix_vector=6)), "MSI-X vector 6"),
    (Part(PartType.VQ_CFG, bytes(31)), "not 32"),
    (vq_notify_cfg_part(1, VqNotifyCfg(2, 0)), "queue_notify_off is 2"),
    (vq_notify_cfg_part(5, VqNotifyCfg(5, 0)), "this device has 5 queues"),
    (Part(PartType.CVQ_CFG, b"\2", bytes(8)), "not 0 or 1"),
    (Part(PartType.CVQ_CFG, b"", b"\2\1" + bytes(6)), "no control command"),
    (hash_part(HashConfig(0, b"")), "does not offer HASH_REPORT"),
    (vq_pairs_part(0), "0 queue pairs"),
    (vq_pairs_part(3), "this device has 1 to 2"),
    (mac_table_part(MacTable((bytes(6),) * 11_000)), "at most 65536"),
    (mac_addr_part(bytes(5)), "not 6"),
    (vlan_part((4096,)), "VLAN 4096"),
    (Part(PartType.CVQ_CFG, b"\0", b"\3\0" + bytes(6)), "not 0"),
    (Part(0x0FF, b""), "no such part"),
    (Part(0x106, b"x"), "no such part"),
    (Part(0x201, b""), "no such part"),
)


@pytest.mark.parametrize(("part", "message"), MISFITS)
def test_a_part_that_does_not_fit_is_named_and_changes_nothing(part: Part, message: str) -> None:
    driver = stopped()
    assert put(driver, rx_part(ControlCommand.RX_NOUNI, on=True)) == OK
    before = image(driver)
    changed = vlan_part((5,)), device_status_part(1)
    for parts in ((*changed, part), (part, *changed)):
        assert put(driver, *parts) == INVALID_FIELD
        assert image(driver) == before
        with pytest.raises(PartsError, match=message) as refusal:
            driver.member().mode.set_parts_untrusted(parts)
        assert part.name in str(refusal.value)


def test_features_that_the_driver_cannot_have_are_named() -> None:
    driver = stopped()
    wanted = mask_of((Feature.VERSION_1, Feature.RSS, Feature.RING_PACKED))
    for parts in (
        (drv_features_part(wanted), device_status_part(READY)),
        (device_status_part(READY), drv_features_part(wanted)),
    ):
        with pytest.raises(PartsError, match="not offered: RING_PACKED, RSS"):
            driver.member().mode.set_parts_untrusted(parts)
    assert put(driver, drv_features_part(wanted)) == OK, "not negotiated yet"
    assert put(driver, device_status_part(READY)) == INVALID_FIELD


def test_an_image_in_pieces_that_never_became_whole_needs_a_reset() -> None:
    driver = stopped()
    assert put(driver, device_status_part(READY)) == OK
    driver.result(commands.mode_set(1, stopped=False))
    assert driver.member().function.common.state.status == READY | 0x40
    assert not driver.member().running


def test_parts_that_are_skipped_and_values_that_are_not_looked_at() -> None:
    driver = stopped()
    before = image(driver)
    assert (
        put(
            driver,
            Part(0x0FF, b"x" * 9, flags=1),
            Part(PartType.CVQ_CFG, b"", b"\5\0" + bytes(6), flags=1),
            common_cfg_part(4, 0xDEAD),
            common_cfg_part(24, 0xDEAD),
            vq_notify_cfg_part(1, VqNotifyCfg(1, 0xBEEF)),
            announce_ack_part(),
        )
        == OK
    )
    assert image(driver) == before


def test_an_acknowledged_announcement() -> None:
    driver = stopped()
    driver.member().state.announce = True
    assert put(driver, announce_ack_part()) == OK
    driver.result(commands.mode_set(1, stopped=False))
    assert not driver.member().state.announce


def test_the_parts_of_a_plain_member() -> None:
    plain = a_config(
        features_off=Feature.CTRL_VQ.mask
        | mask_of(
            (
                Feature.CTRL_RX,
                Feature.CTRL_RX_EXTRA,
                Feature.CTRL_VLAN,
                Feature.GUEST_ANNOUNCE,
                Feature.CTRL_MAC_ADDR,
                Feature.CTRL_GUEST_OFFLOADS,
            )
        )
    )
    driver = stopped(plain)
    assert not any(part.type == PartType.CVQ_CFG for part in image(driver))
    assert put(driver, mac_addr_part(bytes(6))) == INVALID_FIELD


# --- anything -------------------------------------------------------------------------------------

macs = st.binary(min_size=6, max_size=6)
tables = st.frozensets(macs, max_size=4)
flags = st.booleans()
vectors = st.one_of(st.integers(0, 5), st.just(NO_VECTOR))
words = st.integers(0, 2**32 - 1)
addresses = st.integers(0, 2**64 - 1)
queues = st.builds(
    QueueState, st.sampled_from((1, 2, 128, 256)), vectors, flags, addresses, addresses, addresses
)
rules = st.builds(
    FilterState,
    macs,
    flags,
    flags,
    flags,
    flags,
    flags,
    flags,
    tables,
    tables,
    flags,
    flags,
    st.sets(st.integers(0, 4095), max_size=5),
).map(
    lambda made: attrs.evolve(
        made,
        unicast=frozenset() if made.unicast_overflow else made.unicast,
        multicast=frozenset() if made.multicast_overflow else made.multicast,
    )
)
negotiated = st.sampled_from(
    (0, LARGE.offered, Feature.VERSION_1.mask, LARGE.offered & ~Feature.CTRL_VLAN.mask)
)
states = st.builds(
    DeviceState,
    st.builds(
        CommonState,
        st.lists(queues, min_size=5, max_size=5),
        words,
        words,
        negotiated,
        vectors,
        st.sampled_from((0, 1, 3, 0x0B, 0x0F, 0x4F, 0x8F)),
        st.integers(0, 255),
        st.integers(0, 0xFFFF),
    ),
    st.builds(NetState, rules, max_queue_pairs=st.just(2), queue_pairs=st.integers(1, 2)),
)


@given(states)
def test_any_state_comes_back_as_it_was(state: DeviceState) -> None:
    driver = stopped()
    parts = parts_of(LARGE, state)
    whole = encode_parts(parts)
    assert len(whole) <= largest_image_size(LARGE)
    assert driver.status(commands.parts_set(1, 6, whole)) == OK
    assert driver.result(commands.parts_get(1, 5)).startswith(whole)
    driver.result(commands.mode_set(1, stopped=False))
    if state.common.driver_features or not state.common.status & 8:
        assert driver.result(commands.parts_get(1, 5)).startswith(whole)
    assert driver.member().state.filter == attrs.evolve(
        state.net.filter, filter_vlans=driver.member().state.filter.filter_vlans
    )


@given(states, st.data())
def test_a_damaged_image_is_refused_or_saves_to_itself(
    state: DeviceState, data: st.DataObject
) -> None:
    driver = stopped()
    before = driver.result(commands.parts_get(1, 5))
    whole = bytearray(encode_parts(parts_of(LARGE, state)))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    command = Command(
        Opcode.DEV_PARTS_SET, GroupType.SR_IOV, 1, bytes(4) + b"\6\0\0\0" + bytes(whole)
    )
    answer = driver.answer(command, ROOM)
    after = driver.result(commands.parts_get(1, 5))
    if not answer.ok:
        assert after == before
        return
    assert driver.status(commands.parts_set(1, 6, after)) == OK
    assert driver.result(commands.parts_get(1, 5)) == after


def test_the_original_is_left_alone() -> None:
    state = DeviceState(
        CommonState([QueueState(256) for _ in range(5)]), NetState(FilterState(bytes(6)))
    )
    before = parts_of(LARGE, state)
    made = with_parts_untrusted(LARGE, state, [vq_cfg_part(0, a_queue()), vlan_part((3,))])
    assert parts_of(LARGE, state) == before
    assert made.common.queues[0].desc == 0x1000

"""What is said of a migration beforehand: the device itself is asked whether it was true."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.backends.software.config import OPTIONAL_FEATURES, MemberConfig
from vfio_user_virtio.backends.software.member_parts import (
    DeviceState,
    parts_of,
    shape_of,
    with_parts_untrusted,
)
from vfio_user_virtio.errors import HostError
from vfio_user_virtio.migration.preflight import MAX_NAMED, Preflight
from vfio_user_virtio.migration.stream import (
    RecordHeader,
    encode_image,
    encode_private_record,
    encode_record_header,
)
from vfio_user_virtio.virtio.common_config import CommonState, QueueState
from vfio_user_virtio.virtio.features import Feature
from vfio_user_virtio.virtio.net_control import NetState
from vfio_user_virtio.virtio.parts import Part, PartsError, encode_parts
from vfio_user_virtio.virtio.rx_filter import FilterState

if TYPE_CHECKING:
    from collections.abc import Sequence

MAC: Final = bytes.fromhex("020000000001")


def config(**options: object) -> MemberConfig:
    return MemberConfig(mac=MAC, **options)  # type: ignore[arg-type]  # passed on


def state_of(made: MemberConfig, **registers: object) -> DeviceState:
    queues = [QueueState(made.queue_size) for _ in range(made.num_queues)]
    common = CommonState(queues, **registers)  # type: ignore[arg-type]  # passed on
    net = NetState(FilterState(MAC), max_queue_pairs=made.queue_pairs)
    return DeviceState(common, net)


def stream(made: MemberConfig, **registers: object) -> bytes:
    return encode_image(encode_parts(parts_of(made, state_of(made, **registers))))


def flight_to(target: bytes, vectors: int | None = None) -> Preflight:
    flight = Preflight()
    flight.target_saves_untrusted(target, vectors)
    return flight


def refusal(source: bytes, target: bytes, *, vectors: int | None = None) -> str | None:
    """What is said of a stream that comes in pieces."""
    flight = flight_to(target, vectors)
    try:
        for start in range(0, len(source), 100):
            flight.source_saves_untrusted(source[start : start + 100])
    except HostError as error:
        return str(error)
    return None


def test_a_target_like_the_source() -> None:
    made = config(queue_pairs=4, mtu=9000)
    running = stream(made, driver_features=made.offered, status=0x0F)
    assert refusal(running, stream(made), vectors=made.num_vectors) is None
    assert flight_to(stream(made), made.num_vectors).shape == shape_of(made)


def test_it_is_a_matter_of_configuration() -> None:
    flight = flight_to(stream(config()))
    with pytest.raises(HostError) as caught:
        flight.source_saves_untrusted(stream(config(mtu=1500)))
    assert caught.value.exit_code == os.EX_CONFIG


def test_features_are_named_both_ways() -> None:
    said = refusal(stream(config(mtu=1500)), stream(config(queue_pairs=2)))
    assert said is not None
    assert said.startswith("the target would refuse what the source has, with: DEV_FEATURES")
    assert "this device does not offer MTU; only this device offers MQ; configure source" in said
    assert "; PCI_COMMON_CFG num_queues at byte " in said
    assert ": it is 3, this device has 5 queues" in said
    assert "more" not in said


def test_of_many_misfits_the_first_are_named() -> None:
    said = refusal(stream(config(queue_pairs=8)), stream(config(queue_pairs=2)))
    assert said is not None
    assert "num_queues" in said
    assert "VQ_CFG queue 7" in said
    assert "VQ_CFG queue 8" not in said
    assert said.endswith(f"; and {1 + 12 + 12 - MAX_NAMED} more"), "VQ_CFG, VQ_NOTIFY_CFG"


def test_sizes_and_vectors_where_they_are_known() -> None:
    large, small = config(queue_size=512), config()
    said = refusal(stream(large), stream(small))
    assert said is not None
    assert "VQ_CFG queue 0" in said
    assert "at most 256" in said
    assert refusal(stream(large), stream(small, status=1)) is None, "the target may know better"
    uses = stream(small, config_msix_vector=3)
    assert refusal(uses, stream(small)) is None
    assert "vector 3; this device has 2" in (refusal(uses, stream(small), vectors=2) or "")


def test_every_image_is_looked_at() -> None:
    made = config()
    good, bad = stream(made), stream(made, status=0x0F, driver_features=1 << 60)
    between = encode_private_record(b"anything")
    other = encode_record_header(RecordHeader(3, 1, 0x1234)) + b"abc"
    assert refusal(good + between + other + good, good) is None
    said = refusal(good + between + other + bad, good)
    assert said is not None
    assert "not offered: RSS" in said


@pytest.mark.parametrize(
    "target",
    [
        b"",
        b"not a stream of ours, but of another kind of device",
        encode_image(b"no parts at all "),
    ],
)
def test_targets_that_cannot_be_read_judge_for_themselves(target: bytes) -> None:
    assert flight_to(target).shape is None
    assert refusal(stream(config()), target) is None


def test_so_do_those_whose_source_cannot_be_read() -> None:
    target = stream(config())
    assert refusal(b"not a stream of ours, but of another kind" * 9, target) is None
    assert refusal(encode_image(b"no parts at all " * 3) + stream(config(mtu=68)), target) is None


# --- one truth ------------------------------------------------------------------------------------

configs = st.builds(
    config,
    queue_pairs=st.integers(1, 3),
    mtu=st.sampled_from((None, 1500)),
    queue_size=st.sampled_from((64, 256)),
    features_off=st.sampled_from((0, Feature.GUEST_ANNOUNCE.mask, Feature.CTRL_VLAN.mask)),
    features_on=st.sampled_from((0, OPTIONAL_FEATURES)),
)
extra = st.lists(
    st.builds(
        Part,
        st.sampled_from((0x0FF, 0x103, 0x105, 0x106, 0x200)),
        st.binary(max_size=2) | st.just(bytes(8)),
        st.sampled_from((bytes(8), b"\4\0" + bytes(6), b"\3\0" + bytes(6), b"\x09" + bytes(7))),
        st.sampled_from((0, 1)),
    ),
    max_size=2,
)
words = st.sampled_from((0, Feature.VERSION_1.mask, 1 << 60, (1 << 32) | (1 << 22)))
statuses = st.sampled_from((0, 3, 0x0B, 0x0F, 0x04, 0x10))


def accepted(made: MemberConfig, parts: Sequence[Part]) -> bool:
    try:
        with_parts_untrusted(made, state_of(made), parts)
    except PartsError:
        return False
    return True


@given(configs, configs, words, statuses, st.sampled_from((0xFFFF, 0, 4, 7)), extra, st.booleans())
def test_what_is_said_is_what_the_device_does(
    source: MemberConfig,
    target: MemberConfig,
    driver: int,
    status: int,
    vector: int,
    more: list[Part],
    is_reset: bool,
) -> None:
    """All of it, of a target that has been reset; of another, nothing that it does not do."""
    state = state_of(source, driver_features=driver, status=status, config_msix_vector=vector)
    image = encode_image(encode_parts([*parts_of(source, state), *more]))
    idle = stream(target, status=0 if is_reset else 0x0F)
    said = refusal(image, idle, vectors=target.num_vectors)
    takes = accepted(target, [*parts_of(source, state), *more])
    if said is not None or is_reset:
        assert takes == (said is None), said


@given(configs, configs, st.binary(max_size=200), st.integers(0, 2000))
def test_damaged_streams_are_read_without_a_complaint_of_ours(
    source: MemberConfig, target: MemberConfig, junk: bytes, at: int
) -> None:
    """Whatever they are: the worst is a refusal."""
    whole = stream(source)
    damaged = whole[:at] + junk + whole[at + len(junk) :]
    refusal(damaged, stream(target))
    refusal(stream(source), damaged)

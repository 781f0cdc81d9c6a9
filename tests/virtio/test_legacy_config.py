"""A legacy driver's registers, and what they make of the modern device behind them."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.virtio.common_config import NO_VECTOR, CommonConfig, Status
from vfio_user_virtio.virtio.features import Feature, mask_of
from vfio_user_virtio.virtio.legacy_config import (
    ANY_LAYOUT,
    LEGACY_CONFIG_SIZE,
    LegacyConfig,
    LegacyField,
    NotOneField,
)
from vfio_user_virtio.virtio.split_queue import check_alignment_untrusted

LOW: Final = mask_of(
    (Feature.CSUM, Feature.HOST_TSO4, Feature.MRG_RXBUF, Feature.CTRL_VQ, Feature.EVENT_IDX)
)
NOT_SHOWN: Final = mask_of((Feature.MQ, Feature.MTU))
HIGH: Final = mask_of((Feature.VERSION_1, Feature.ACCESS_PLATFORM, Feature.RING_RESET))
OFFERED: Final = LOW | NOT_SHOWN | HIGH
READY: Final = Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK


class Device:
    """A modern device of two queues and three vectors, seen by a legacy driver."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.isr = 0
        self.msix = True
        self.common = CommonConfig(
            offered=OFFERED, num_queues=2, queue_size=256, num_vectors=3, consequences=self
        )
        self.legacy = LegacyConfig(
            self.common,
            OFFERED,
            read_isr=self.read_isr,
            kick=lambda queue: self.events.append(f"kick {queue}"),
            vectors=lambda: self.msix,
        )

    def read_isr(self) -> int:
        value, self.isr = self.isr, 0
        return value

    def features_accepted(self, features: int) -> None:
        self.events.append(f"features {features:#x}")

    def driver_ok(self) -> None:
        self.events.append("driver ok")

    def queue_enabled(self, index: int) -> None:
        self.events.append(f"enabled {index}")

    def queue_reset(self, index: int) -> None:
        self.events.append(f"reset {index}")

    def device_reset(self) -> None:
        self.events.append("device reset")

    def read(self, field: LegacyField) -> int:
        return int.from_bytes(self.legacy.read_untrusted(*field.value), "little")

    def write(self, field: LegacyField, value: int) -> None:
        offset, size = field.value
        self.legacy.write_untrusted(offset, value.to_bytes(size, "little"))


def negotiated(features: int = LOW) -> Device:
    device = Device()
    device.write(LegacyField.DEVICE_STATUS, 0)
    device.write(LegacyField.DEVICE_STATUS, Status.ACKNOWLEDGE | Status.DRIVER)
    device.write(LegacyField.DRIVER_FEATURES, features)
    device.events.clear()
    return device


def test_a_legacy_driver_starts_the_device_as_a_modern_one_would() -> None:
    device = negotiated()
    device.write(LegacyField.QUEUE_SELECT, 1)
    assert device.read(LegacyField.QUEUE_SELECT) == 1
    assert device.read(LegacyField.QUEUE_SIZE) == 256
    assert device.read(LegacyField.QUEUE_ADDRESS) == 0
    device.write(LegacyField.QUEUE_ADDRESS, 0x12345)
    assert device.read(LegacyField.QUEUE_ADDRESS) == 0x12345
    device.write(LegacyField.DEVICE_STATUS, READY)
    assert device.events == [f"features {LOW | HIGH:#x}", "enabled 1", "driver ok"]
    assert device.common.live
    assert device.read(LegacyField.DEVICE_STATUS) == READY, "without FEATURES_OK"
    queue = device.common.state.queues[1]
    assert queue.desc == 0x12345 << 12
    assert queue.driver == queue.desc + 16 * 256
    assert queue.device == (queue.desc + 16 * 256 + 6 + 2 * 256 + 4095) & ~4095
    check_alignment_untrusted(queue.desc, queue.driver, queue.device)


def test_only_what_a_legacy_bar_can_show_is_offered() -> None:
    device = Device()
    assert device.read(LegacyField.DEVICE_FEATURES) == LOW | ANY_LAYOUT
    device.write(LegacyField.DEVICE_FEATURES, 0)
    assert device.read(LegacyField.DEVICE_FEATURES) == LOW | ANY_LAYOUT
    device.write(LegacyField.DRIVER_FEATURES, 0xFFFF_FFFF)
    assert device.read(LegacyField.DRIVER_FEATURES) == LOW


def test_a_device_without_queues_is_accepted_with_driver_ok() -> None:
    device = negotiated()
    device.write(LegacyField.DEVICE_STATUS, READY)
    assert device.events == [f"features {LOW | HIGH:#x}", "driver ok"]
    device.write(LegacyField.DEVICE_STATUS, READY)
    assert len(device.events) == 2


@pytest.mark.parametrize("features", [LOW & ~Feature.MRG_RXBUF.mask, LOW & ~Feature.CSUM.mask, 0])
def test_features_that_cannot_be_served_ask_for_a_reset(features: int) -> None:
    device = negotiated(features)
    device.write(LegacyField.QUEUE_ADDRESS, 1)
    device.write(LegacyField.DEVICE_STATUS, READY)
    assert device.common.refusal is not None
    assert device.read(LegacyField.DEVICE_STATUS) & Status.DEVICE_NEEDS_RESET
    assert not device.common.live
    assert device.events == ["enabled 0"]
    device.write(LegacyField.DEVICE_STATUS, 0)
    assert device.read(LegacyField.DEVICE_STATUS) == 0
    assert device.events[-1] == "device reset"


def test_a_queue_is_given_back_by_address_0_and_may_come_again() -> None:
    device = negotiated()
    device.write(LegacyField.QUEUE_ADDRESS, 7)
    device.write(LegacyField.QUEUE_ADDRESS, 0)
    assert device.read(LegacyField.QUEUE_ADDRESS) == 0
    device.write(LegacyField.QUEUE_ADDRESS, 8)
    assert device.read(LegacyField.QUEUE_ADDRESS) == 8
    assert device.events[1:] == ["enabled 0", "reset 0", "enabled 0"]


def test_a_queue_that_does_not_exist_has_no_size_and_takes_no_address() -> None:
    device = negotiated()
    device.write(LegacyField.QUEUE_SELECT, 2)
    assert device.read(LegacyField.QUEUE_SIZE) == 0
    device.write(LegacyField.QUEUE_ADDRESS, 1)
    assert device.read(LegacyField.QUEUE_ADDRESS) == 0
    assert device.events == []


def test_kicks_isr_and_vectors() -> None:
    device = negotiated()
    device.write(LegacyField.QUEUE_NOTIFY, 1)
    assert device.events == ["kick 1"]
    assert device.read(LegacyField.QUEUE_NOTIFY) == 0
    device.isr = 3
    assert [device.read(LegacyField.ISR_STATUS) for _ in range(2)] == [3, 0]
    assert device.read(LegacyField.CONFIG_VECTOR) == NO_VECTOR
    device.write(LegacyField.CONFIG_VECTOR, 0)
    device.write(LegacyField.QUEUE_VECTOR, 2)
    assert device.read(LegacyField.CONFIG_VECTOR) == 0
    assert device.read(LegacyField.QUEUE_VECTOR) == 2
    device.write(LegacyField.QUEUE_VECTOR, 3)
    assert device.read(LegacyField.QUEUE_VECTOR) == NO_VECTOR


def test_vectors_are_there_only_with_msix() -> None:
    device = negotiated()
    device.msix = False
    for field in (LegacyField.CONFIG_VECTOR, LegacyField.QUEUE_VECTOR):
        with pytest.raises(NotOneField):
            device.read(field)
        with pytest.raises(NotOneField):
            device.write(field, 0)


FIELDS: Final = frozenset(field.value for field in LegacyField)


def test_every_access_that_is_not_one_field_is_refused_and_changes_nothing() -> None:
    device = negotiated()
    for offset in range(LEGACY_CONFIG_SIZE + 4):
        for size in range(9):
            if (offset, size) in FIELDS:
                continue
            with pytest.raises(NotOneField):
                device.legacy.read_untrusted(offset, size)
            with pytest.raises(NotOneField):
                device.legacy.write_untrusted(offset, b"\xff" * size)
    assert device.events == []
    assert device.read(LegacyField.DRIVER_FEATURES) == LOW


@given(st.lists(st.tuples(st.sampled_from(sorted(FIELDS)), st.integers(0, 2**32 - 1))))
def test_no_sequence_of_writes_makes_a_device_run_that_a_modern_driver_could_not(
    writes: list[tuple[tuple[int, int], int]],
) -> None:
    device = Device()
    for (offset, size), value in writes:
        device.legacy.write_untrusted(offset, (value % (1 << 8 * size)).to_bytes(size, "little"))
        if device.common.live:
            assert device.common.features & HIGH == HIGH
            assert device.common.features & Feature.MRG_RXBUF.mask
        for field in LegacyField:
            assert len(device.legacy.read_untrusted(*field.value)) == field.value[1]

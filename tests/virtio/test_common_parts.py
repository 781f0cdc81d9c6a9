"""Values of the parts every virtio device has: golden bytes, any values, wrong lengths."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.virtio.part_images import PARTS
from vfio_user_virtio import limits
from vfio_user_virtio.virtio.common_parts import (
    VqCfg,
    VqNotifyCfg,
    common_cfg_part,
    decode_common_cfg_untrusted,
    decode_device_status_untrusted,
    decode_features_untrusted,
    decode_vq_cfg_untrusted,
    decode_vq_notify_cfg_untrusted,
    dev_features_part,
    device_status_part,
    drv_features_part,
    vq_cfg_part,
    vq_notify_cfg_part,
)
from vfio_user_virtio.virtio.part_header import (
    COMMON_REGISTERS,
    OPTIONAL,
    PartType,
    queue_selector,
    register_selector,
)
from vfio_user_virtio.virtio.parts import Part, PartsError

u16 = st.integers(0, 0xFFFF)
u64 = st.integers(0, (1 << 64) - 1)
FEATURES = 1 << 0 | 1 << 1 | 1 << 5 | 1 << 32
VQ_CFG = VqCfg(256, 2, True, 0x1000, 0x2000, 0x3000)


def test_golden_values_both_ways() -> None:
    dev, drv, vector, generation, status, queue, notify, *_ = PARTS
    assert dev_features_part(FEATURES) == dev
    assert drv_features_part(FEATURES) == drv
    assert decode_features_untrusted(dev) == decode_features_untrusted(drv) == FEATURES
    assert common_cfg_part(16, 7) == vector
    assert decode_common_cfg_untrusted(vector) == 7
    assert common_cfg_part(21, 9) == generation
    assert decode_common_cfg_untrusted(generation) == 9
    assert device_status_part(0xF) == status
    assert decode_device_status_untrusted(status) == 0xF
    assert vq_cfg_part(3, VQ_CFG) == queue
    assert decode_vq_cfg_untrusted(queue) == VQ_CFG
    assert vq_notify_cfg_part(2, VqNotifyCfg(2, 3)) == notify
    assert decode_vq_notify_cfg_untrusted(notify) == VqNotifyCfg(2, 3)


def test_only_the_device_features_are_optional() -> None:
    assert dev_features_part(0).flags == OPTIONAL
    assert drv_features_part(0).flags == 0


@given(st.integers(0, (1 << 128) - 1), st.integers(2, limits.MAX_FEATURE_WORDS))
def test_features_come_back(features: int, words: int) -> None:
    for part in (dev_features_part(features, words), drv_features_part(features, words)):
        assert len(part.value) == 8 * words
        assert decode_features_untrusted(part) == features


@pytest.mark.parametrize("size", [0, 7, 9])
def test_features_that_are_not_words(size: int) -> None:
    with pytest.raises(PartsError, match=f"DRV_FEATURES: its value has {size} bytes, which are"):
        decode_features_untrusted(Part(PartType.DRV_FEATURES, bytes(size)))


def test_too_many_features() -> None:
    with pytest.raises(PartsError, match="17 words of features; the limit is 16"):
        decode_features_untrusted(Part(PartType.DEV_FEATURES, bytes(8 * 17)))


@given(st.sampled_from(sorted(COMMON_REGISTERS)), u64)
def test_registers_come_back_at_their_size(offset: int, number: int) -> None:
    value = number & (1 << 8 * COMMON_REGISTERS[offset].size) - 1
    part = common_cfg_part(offset, value)
    assert len(part.value) == COMMON_REGISTERS[offset].size
    assert part.header.register == offset
    assert decode_common_cfg_untrusted(part) == value


def test_what_is_no_register() -> None:
    selector = register_selector(5)
    with pytest.raises(PartsError, match="PCI_COMMON_CFG offset 5: no register starts there"):
        decode_common_cfg_untrusted(Part(PartType.PCI_COMMON_CFG, bytes(1), selector))


@given(u16, u16, u16, st.booleans(), u64, u64, u64)
def test_queues_come_back(
    index: int, size: int, vector: int, enabled: bool, desc: int, driver: int, device: int
) -> None:
    cfg = VqCfg(size, vector, enabled, desc, driver, device)
    part = vq_cfg_part(index, cfg)
    assert part.header.queue == index
    assert decode_vq_cfg_untrusted(part) == cfg
    notify = vq_notify_cfg_part(index, VqNotifyCfg(size, vector))
    assert notify.header.queue == index
    assert decode_vq_notify_cfg_untrusted(notify) == VqNotifyCfg(size, vector)


def test_a_queue_is_enabled_or_not() -> None:
    part = Part(PartType.VQ_CFG, bytes(4) + b"\0\1" + bytes(26), queue_selector(4))
    with pytest.raises(PartsError, match="VQ_CFG queue 4: enabled is 256, not 0 or 1"):
        decode_vq_cfg_untrusted(part)


def test_reserved_bytes_are_ignored() -> None:
    part = Part(PartType.VQ_CFG, bytes(6) + b"\xff\xff" + bytes(24), queue_selector(4))
    assert decode_vq_cfg_untrusted(part) == VqCfg(0, 0, False, 0, 0, 0)
    part = Part(PartType.VQ_NOTIFY_CFG, bytes(4) + b"\xff" * 4, queue_selector(4))
    assert decode_vq_notify_cfg_untrusted(part) == VqNotifyCfg(0, 0)


@pytest.mark.parametrize("more", [-1, 1])
def test_lengths_must_match(more: int) -> None:
    with pytest.raises(PartsError, match="PCI_COMMON_CFG num_queues: its value has"):
        decode_common_cfg_untrusted(
            Part(PartType.PCI_COMMON_CFG, bytes(2 + more), register_selector(18))
        )
    with pytest.raises(PartsError, match="DEVICE_STATUS: its value has"):
        decode_device_status_untrusted(Part(PartType.DEVICE_STATUS, bytes(1 + more)))
    with pytest.raises(PartsError, match="VQ_CFG queue 0: its value has"):
        decode_vq_cfg_untrusted(Part(PartType.VQ_CFG, bytes(32 + more)))
    with pytest.raises(PartsError, match="VQ_NOTIFY_CFG queue 0: its value has"):
        decode_vq_notify_cfg_untrusted(Part(PartType.VQ_NOTIFY_CFG, bytes(8 + more)))

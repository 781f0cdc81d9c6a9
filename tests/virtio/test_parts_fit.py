"""Which parts fit a device, all that does not fit by name, and a device's shape from its image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import pytest

from vfio_user_virtio.virtio.common_config import NO_VECTOR
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
from vfio_user_virtio.virtio.net_parts import (
    HashConfig,
    MacTable,
    announce_ack_part,
    decode_control_untrusted,
    hash_part,
    mac_table_part,
    rx_part,
    vlan_part,
    vq_pairs_part,
)
from vfio_user_virtio.virtio.part_header import ControlCommand, PartType
from vfio_user_virtio.virtio.parts import Part, PartsError
from vfio_user_virtio.virtio.parts_fit import (
    CONTROL_FEATURES,
    MAX_VECTORS,
    MAX_VIRTQUEUE_SIZE,
    DeviceShape,
    QueueShape,
    misfits_untrusted,
    negotiated_untrusted,
    shape_of_untrusted,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

OFFERED: Final = mask_of(
    (Feature.VERSION_1, Feature.CTRL_VQ, Feature.CTRL_RX, Feature.CTRL_VLAN, Feature.MQ)
)
SHAPE: Final = DeviceShape(OFFERED, tuple(QueueShape(256, n) for n in range(5)), 6)
NUM_QUEUES: Final = 18
CONFIG_VECTOR: Final = 16


def queue(size: int = 256, vector: int = 5) -> VqCfg:
    return VqCfg(size, vector, True, 0x1000, 0x2000, 0x3000)


def image(
    offered: int = OFFERED, *, queues: int = 5, status: int = 0, driver: int = 0
) -> list[Part]:
    return [
        dev_features_part(offered),
        drv_features_part(driver),
        common_cfg_part(CONFIG_VECTOR, NO_VECTOR),
        common_cfg_part(NUM_QUEUES, queues),
        device_status_part(status),
        *(vq_cfg_part(n, queue()) for n in range(queues)),
        *(vq_notify_cfg_part(n, VqNotifyCfg(n, 0)) for n in range(queues)),
        rx_part(ControlCommand.RX_PROMISC, on=True),
        vq_pairs_part(queues // 2),
    ]


FITTING: Final = (
    *image(status=0x0F, driver=OFFERED),
    common_cfg_part(CONFIG_VECTOR, 5),
    common_cfg_part(24, 9),
    vq_cfg_part(4, queue(1, NO_VECTOR)),
    vlan_part((1, 2)),
    mac_table_part(MacTable((bytes(6),))),
    Part(PartType.CVQ_CFG, b"?", b"\x63\0" + bytes(6), flags=1),
    Part(0x106, b"?", flags=1),
)


@pytest.mark.parametrize("part", FITTING, ids=lambda part: part.name)
def test_what_fits(part: Part) -> None:
    SHAPE.check_untrusted(part)


MISFITS: Final = (
    (dev_features_part(OFFERED | 1 << 60), "DEV_FEATURES: this device does not offer RSS; conf"),
    (dev_features_part(OFFERED & ~Feature.MQ.mask), "only this device offers MQ; configure"),
    (
        dev_features_part(OFFERED ^ Feature.MQ.mask ^ Feature.MTU.mask),
        "does not offer MTU; only this device offers MQ",
    ),
    (dev_features_part(OFFERED, words=1), "8 bytes, not 16"),
    (drv_features_part(OFFERED, words=3), "24 bytes, not 16"),
    (common_cfg_part(NUM_QUEUES, 3), "num_queues: it is 3, this device has 5 queues"),
    (common_cfg_part(CONFIG_VECTOR, 6), "MSI-X vector 6; this device has 6"),
    (Part(PartType.PCI_COMMON_CFG, b"\0", b"\x11" + bytes(7)), "no register starts there"),
    (device_status_part(0x20), "never has 0x20"),
    (device_status_part(0x04), "DRIVER_OK without FEATURES_OK"),
    (vq_cfg_part(5, queue()), "VQ_CFG queue 5: this device has 5 queues"),
    (vq_cfg_part(0, queue(0)), "its size is 0"),
    (vq_cfg_part(0, queue(512)), "512; here it is a power of two of at most 256"),
    (vq_cfg_part(0, queue(3)), "its size is 3"),
    (vq_cfg_part(0, queue(vector=6)), "MSI-X vector 6"),
    (vq_notify_cfg_part(5, VqNotifyCfg(5, 0)), "this device has 5 queues"),
    (vq_notify_cfg_part(1, VqNotifyCfg(0, 0)), "queue_notify_off is 0, here it is 1"),
    (Part(PartType.CVQ_CFG, b"?", b"\x63\0" + bytes(6)), "no control command"),
    (hash_part(HashConfig(0, b"")), "does not offer HASH_REPORT"),
    (announce_ack_part(), "does not offer GUEST_ANNOUNCE"),
    (mac_table_part(MacTable((bytes(6),) * 11_000)), "at most 65536"),
    (vlan_part((4096,)), "VLAN 4096"),
    (vq_pairs_part(0), "0 queue pairs; this device has 1 to 2"),
    (vq_pairs_part(3), "3 queue pairs"),
    (Part(0x106, b"?"), "part 0x106: this device has no such part, and it is not optional"),
)


@pytest.mark.parametrize(("part", "message"), MISFITS)
def test_what_does_not_fit_is_named(part: Part, message: str) -> None:
    with pytest.raises(PartsError) as caught:
        SHAPE.check_untrusted(part)
    assert message in caught.value.args[0]
    assert [error.args for error in misfits_untrusted(SHAPE, [part])] == [caught.value.args]


def test_values_are_given() -> None:
    assert SHAPE.dev_features_untrusted(dev_features_part(OFFERED)) == OFFERED
    assert SHAPE.drv_features_untrusted(drv_features_part(7)) == 7
    assert SHAPE.common_cfg_untrusted(common_cfg_part(NUM_QUEUES, 5)) == 5
    assert SHAPE.device_status_untrusted(device_status_part(3)) == 3
    assert SHAPE.vq_cfg_untrusted(vq_cfg_part(2, queue(64))) == queue(64)
    assert SHAPE.control_untrusted(vlan_part((9,))) == frozenset({9})
    assert SHAPE.control_untrusted(vq_pairs_part(2)) == 2
    assert decode_control_untrusted(ControlCommand.VLAN_ADD, vlan_part((9,))) == frozenset({9})


def test_each_command_of_a_part_needs_a_feature() -> None:
    assert CONTROL_FEATURES.keys() == set(ControlCommand)


def test_an_unknown_notify_off_may_be_any() -> None:
    shape = attrs.evolve(SHAPE, queues=(QueueShape(256, None),))
    shape.check_untrusted(vq_notify_cfg_part(0, VqNotifyCfg(7, 0)))


def test_features_in_force() -> None:
    assert negotiated_untrusted(OFFERED, OFFERED, 0x0B) == OFFERED
    assert negotiated_untrusted(OFFERED, 1 << 60, 0x03) == 0, "not in force yet"
    assert negotiated_untrusted(OFFERED, 0, 0x0B) == 0, "yet to come"
    with pytest.raises(PartsError, match="DRV_FEATURES: with FEATURES_OK: not offered: RSS"):
        negotiated_untrusted(OFFERED, 1 << 60 | 1 << 32, 0x0B)


# --- images ---------------------------------------------------------------------------------------


def names(parts: Iterable[Part], shape: DeviceShape = SHAPE) -> list[str]:
    return [error.part for error in misfits_untrusted(shape, parts)]


def test_an_image_that_fits_has_no_misfits() -> None:
    assert names(image()) == []
    assert names(image(status=0x0F, driver=OFFERED)) == []


def test_all_misfits_of_an_image() -> None:
    assert names(image(queues=7)) == [
        "PCI_COMMON_CFG num_queues",
        "VQ_CFG queue 5",
        "VQ_CFG queue 6",
        "VQ_NOTIFY_CFG queue 5",
        "VQ_NOTIFY_CFG queue 6",
        "CVQ_CFG MQ_VQ_PAIRS_SET",
    ]
    assert names(image(OFFERED | 1 << 60, status=0x0F, driver=OFFERED | 1 << 60)) == [
        "DEV_FEATURES",
        "DRV_FEATURES",
    ]


def test_the_shape_of_a_device_that_is_reset() -> None:
    sizes = (256, 64, 256, 1, 32)
    parts = [part for part in image() if part.type != PartType.VQ_CFG]
    parts += [vq_cfg_part(n, queue(size)) for n, size in enumerate(sizes)]
    found = shape_of_untrusted(parts, 6)
    queues = tuple(QueueShape(size, n) for n, size in enumerate(sizes))
    assert found == DeviceShape(OFFERED, queues, 6)


def test_what_an_image_does_not_tell_may_be_anything() -> None:
    largest = DeviceShape(OFFERED, (QueueShape(MAX_VIRTQUEUE_SIZE, None),) * 5, MAX_VECTORS)
    whole = image(status=0x0F)
    known = attrs.evolve(
        largest,
        queues=tuple(attrs.evolve(one, notify_off=n) for n, one in enumerate(largest.queues)),
    )
    assert shape_of_untrusted(whole) == known, "its driver may have chosen smaller sizes"
    without = [part for part in image() if part.type not in (PartType.VQ_CFG, 0x105)]
    assert shape_of_untrusted(without) == largest
    no_status = [part for part in image() if part.type != PartType.DEVICE_STATUS]
    assert shape_of_untrusted(no_status) == known


@pytest.mark.parametrize("missing", ["DEV_FEATURES", "PCI_COMMON_CFG num_queues"])
def test_an_image_without_what_matters_tells_nothing(missing: str) -> None:
    assert shape_of_untrusted([part for part in image() if part.name != missing]) is None


def test_a_malformed_image() -> None:
    with pytest.raises(PartsError, match="not 1"):
        shape_of_untrusted([*image(), Part(PartType.DEVICE_STATUS, b"")])

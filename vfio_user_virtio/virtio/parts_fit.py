"""Whether the device parts of one device fit another (virtio 1.4, Device parts).

One truth for two who ask: the device that is given parts, and refuses the first that does not fit,
and who wants to know beforehand all that a device would refuse.  `DeviceShape` is what decides it.
A device knows its own; that of another is read from its image (`shape_of_untrusted`).

Where the standard leaves it open:

* features on offer must be equal, as it says ("match"), though the part that carries them is marked
  OPTIONAL
* what a driver cannot write (num_queues, queue_notify_off) must be equal; a register that has a
  part of its own is looked at for its length only
* a part that is unknown here is skipped if it is marked OPTIONAL, else refused
* an image may come in pieces and in any order, so features of 0 with FEATURES_OK are not refused:
  they may be yet to come

An image does not tell what the largest size of a queue is once a driver has chosen one, nor how
many MSI-X vectors there are.  Then the most that virtio allows is assumed, so that nothing is
refused which the device would take.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio import limits
from vfio_user_virtio.virtio.common_config import NO_VECTOR, Status
from vfio_user_virtio.virtio.common_parts import (
    FEATURE_WORDS,
    decode_common_cfg_untrusted,
    decode_device_status_untrusted,
    decode_features_untrusted,
    decode_vq_cfg_untrusted,
    decode_vq_notify_cfg_untrusted,
)
from vfio_user_virtio.virtio.features import Feature, feature_names, refusal_untrusted
from vfio_user_virtio.virtio.net_parts import decode_control_untrusted
from vfio_user_virtio.virtio.part_header import COMMON_REGISTERS, ControlCommand, PartType
from vfio_user_virtio.virtio.parts import PartsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from vfio_user_virtio.virtio.common_parts import VqCfg
    from vfio_user_virtio.virtio.net_parts import ControlValue
    from vfio_user_virtio.virtio.parts import Part

CONTROL_FEATURES: Final[Mapping[ControlCommand, Feature]] = {
    ControlCommand.RX_PROMISC: Feature.CTRL_RX,
    ControlCommand.RX_ALLMULTI: Feature.CTRL_RX,
    ControlCommand.RX_ALLUNI: Feature.CTRL_RX_EXTRA,
    ControlCommand.RX_NOMULTI: Feature.CTRL_RX_EXTRA,
    ControlCommand.RX_NOUNI: Feature.CTRL_RX_EXTRA,
    ControlCommand.RX_NOBCAST: Feature.CTRL_RX_EXTRA,
    ControlCommand.MAC_TABLE_SET: Feature.CTRL_RX,
    ControlCommand.MAC_ADDR_SET: Feature.CTRL_MAC_ADDR,
    ControlCommand.VLAN_ADD: Feature.CTRL_VLAN,
    ControlCommand.ANNOUNCE_ACK: Feature.GUEST_ANNOUNCE,
    ControlCommand.MQ_VQ_PAIRS_SET: Feature.MQ,
    ControlCommand.MQ_RSS_CONFIG: Feature.RSS,
    ControlCommand.MQ_HASH_CONFIG: Feature.HASH_REPORT,
}
"""The feature that each control command needs, in the order of the parts."""

MAX_VIRTQUEUE_SIZE: Final = 32_768
MAX_VECTORS: Final = 2_048
"""The most that virtio and PCI allow, for what is not known of a device."""

_STATUS_BITS: Final = (
    Status.ACKNOWLEDGE
    | Status.DRIVER
    | Status.DRIVER_OK
    | Status.FEATURES_OK
    | Status.DEVICE_NEEDS_RESET
    | Status.FAILED
)


@attrs.frozen
class QueueShape:
    """A queue: the most descriptors it can have, and its queue_notify_off, None if unknown."""

    size: int
    notify_off: int | None


@attrs.frozen
class DeviceShape:
    """What of a device decides which parts fit it; `num_vectors` are its MSI-X vectors.

    The methods give the value of one part of the kind that they are for.  They raise PartsError if
    it is malformed or does not fit.
    """

    offered: int
    queues: tuple[QueueShape, ...]
    num_vectors: int

    def check_untrusted(self, part: Part) -> None:
        """Look at any part."""
        _CHECKS.get(part.type, DeviceShape.skip_untrusted)(self, part)

    def skip_untrusted(self, part: Part) -> None:
        """Look at a part of a type that is not known here."""
        if not part.header.optional:
            raise part.refuse("this device has no such part, and it is not optional")

    def dev_features_untrusted(self, part: Part) -> int:
        part.require_size(8 * FEATURE_WORDS)
        theirs = decode_features_untrusted(part)
        differences = [
            f"{whose} {', '.join(feature_names(word))}"
            for whose, word in (
                ("this device does not offer", theirs & ~self.offered),
                ("only this device offers", self.offered & ~theirs),
            )
            if word
        ]
        if differences:
            raise part.refuse(
                "; ".join(differences) + "; configure source and target with the same features"
            )
        return theirs

    def drv_features_untrusted(self, part: Part) -> int:
        part.require_size(8 * FEATURE_WORDS)
        return decode_features_untrusted(part)

    def common_cfg_untrusted(self, part: Part) -> int:
        value = decode_common_cfg_untrusted(part)
        name = COMMON_REGISTERS[part.header.register].name
        if name == "config_msix_vector":
            self._require_vector(part, value)
        elif name == "num_queues" and value != len(self.queues):
            raise part.refuse(
                f"it is {value}, this device has {len(self.queues)} queues; configure "
                "source and target with the same number of queue pairs"
            )
        return value

    def device_status_untrusted(self, part: Part) -> int:
        value = decode_device_status_untrusted(part)
        if unknown := value & ~_STATUS_BITS:
            raise part.refuse(f"it is {value:#x}; this device never has {unknown:#x}")
        if value & Status.DRIVER_OK and not value & Status.FEATURES_OK:
            raise part.refuse(f"it is {value:#x}: DRIVER_OK without FEATURES_OK")
        return value

    def vq_cfg_untrusted(self, part: Part) -> VqCfg:
        largest = self._queue(part).size
        value = decode_vq_cfg_untrusted(part)
        if not 0 < value.size <= largest or value.size & (value.size - 1):
            raise part.refuse(
                f"its size is {value.size}; here it is a power of two of at most {largest}"
            )
        self._require_vector(part, value.msix_vector)
        return value

    def vq_notify_cfg_untrusted(self, part: Part) -> None:
        ours = self._queue(part).notify_off
        theirs = decode_vq_notify_cfg_untrusted(part).queue_notify_off
        if ours is not None and theirs != ours:
            raise part.refuse(f"queue_notify_off is {theirs}, here it is {ours}")

    def control_untrusted(self, part: Part) -> ControlValue | None:
        """None for a command that no part may carry, if the part is optional."""
        command = part.header.control
        if command is None:
            if part.header.optional:
                return None
            raise part.refuse("no control command that a part may carry has this number")
        feature = CONTROL_FEATURES[command]
        if not self.offered >> feature & 1:
            raise part.refuse(f"this device does not offer {feature.name}")
        if len(part.value) > limits.MAX_CONTROL_SIZE:
            raise part.refuse(
                f"its value has {len(part.value)} bytes; a control command has at most "
                f"{limits.MAX_CONTROL_SIZE}"
            )
        value = decode_control_untrusted(command, part)
        if command is ControlCommand.MQ_VQ_PAIRS_SET:
            pairs = len(self.queues) // 2
            if not isinstance(value, int) or not 1 <= value <= pairs:
                raise part.refuse(f"{value!r} queue pairs; this device has 1 to {pairs}")
        return value

    def _queue(self, part: Part) -> QueueShape:
        index = part.header.queue
        if index >= len(self.queues):
            raise part.refuse(f"this device has {len(self.queues)} queues")
        return self.queues[index]

    def _require_vector(self, part: Part, vector: int) -> None:
        if vector != NO_VECTOR and vector >= self.num_vectors:
            raise part.refuse(f"it uses MSI-X vector {vector}; this device has {self.num_vectors}")


_CHECKS: Final[Mapping[int, Callable[[DeviceShape, Part], object]]] = {
    PartType.DEV_FEATURES: DeviceShape.dev_features_untrusted,
    PartType.DRV_FEATURES: DeviceShape.drv_features_untrusted,
    PartType.PCI_COMMON_CFG: DeviceShape.common_cfg_untrusted,
    PartType.DEVICE_STATUS: DeviceShape.device_status_untrusted,
    PartType.VQ_CFG: DeviceShape.vq_cfg_untrusted,
    PartType.VQ_NOTIFY_CFG: DeviceShape.vq_notify_cfg_untrusted,
    PartType.CVQ_CFG: DeviceShape.control_untrusted,
}


def negotiated_untrusted(offered: int, driver_features: int, status: int) -> int:
    """The features that are in force: the driver's, once it has said FEATURES_OK.

    Raises PartsError if a device that offers `offered` must not accept them.
    """
    features = driver_features if status & Status.FEATURES_OK else 0
    if features and (refusal := refusal_untrusted(offered, features)) is not None:
        raise PartsError("DRV_FEATURES", None, f"with FEATURES_OK: {refusal}")
    return features


# --- another device -----------------------------------------------------------------------------


def shape_of_untrusted(image: Iterable[Part], num_vectors: int = MAX_VECTORS) -> DeviceShape | None:
    """The shape of the device whose complete image it is; None if the image does not tell.

    Raises PartsError for malformed parts.
    """
    parts = {part.header.key: part for part in image}
    features = parts.get((PartType.DEV_FEATURES, 0))
    num_queues = parts.get((PartType.PCI_COMMON_CFG, _NUM_QUEUES))
    if features is None or num_queues is None:
        return None
    status = parts.get((PartType.DEVICE_STATUS, 0))
    is_reset = status is not None and not decode_device_status_untrusted(status)
    queues: list[QueueShape] = []
    for index in range(decode_common_cfg_untrusted(num_queues)):
        queue = parts.get((PartType.VQ_CFG, index)) if is_reset else None
        notify = parts.get((PartType.VQ_NOTIFY_CFG, index))
        queues.append(
            QueueShape(
                MAX_VIRTQUEUE_SIZE if queue is None else decode_vq_cfg_untrusted(queue).size,
                None if notify is None else decode_vq_notify_cfg_untrusted(notify).queue_notify_off,
            )
        )
    return DeviceShape(decode_features_untrusted(features), tuple(queues), num_vectors)


def misfits_untrusted(shape: DeviceShape, image: Iterable[Part]) -> list[PartsError]:
    """All that a device of `shape` would refuse in a complete image, in the image's order."""
    found: list[PartsError] = []
    wanted = status = 0
    for part in image:
        try:
            shape.check_untrusted(part)
        except PartsError as error:
            found.append(error)
            continue
        if part.type == PartType.DRV_FEATURES:
            wanted = shape.drv_features_untrusted(part)
        elif part.type == PartType.DEVICE_STATUS:
            status = shape.device_status_untrusted(part)
    try:
        negotiated_untrusted(shape.offered, wanted, status)
    except PartsError as error:
        found.append(error)
    return found


_NUM_QUEUES: Final = next(
    offset for offset, register in COMMON_REGISTERS.items() if register.name == "num_queues"
)

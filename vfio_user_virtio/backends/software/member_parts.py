"""What device parts carry of a member, and whether another device's parts fit it (virtio 1.4,
Device parts).

`DeviceState` is all of it as plain data: the registers of the common configuration, and what the
driver has set by control commands.  `parts_of` gives its parts, and `with_parts_untrusted` a state
with parts put in.  They are put into a copy, so that a refusal has changed nothing, and the refusal
names the features or the part that do not fit.

Which parts there are follows from what the member offers, not from what was negotiated: an image of
one member always has the same parts, though tables in it vary in length.

Where the standard leaves it open:

* what a driver cannot write (num_queues, queue_notify_off) must be equal, and other registers are
  taken over, since config_msix_vector and config_generation are nowhere else; a register that has a
  part of its own is looked at for its length only
* a part that is unknown here is skipped if it is marked OPTIONAL, else refused
* an image may come in pieces and in any order, so features of 0 with FEATURES_OK are not refused:
  they may be yet to come.  A device that is let run like that needs a reset.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.backends.software.member_control_parts import (
    control_parts,
    put_control_part_untrusted,
)
from vfio_user_virtio.virtio.common_config import NO_VECTOR, CommonState, QueueState, Status
from vfio_user_virtio.virtio.common_parts import (
    FEATURE_WORDS,
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
from vfio_user_virtio.virtio.features import Feature, feature_names, refusal_untrusted
from vfio_user_virtio.virtio.net_control import GUEST_OFFLOADS, NetState
from vfio_user_virtio.virtio.part_header import COMMON_CFG_OFFSETS, COMMON_REGISTERS, PartType
from vfio_user_virtio.virtio.parts import PartsError, image_size
from vfio_user_virtio.virtio.rx_filter import MAX_VLAN, FilterState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from vfio_user_virtio.backends.software.config import MemberConfig
    from vfio_user_virtio.virtio.parts import Part

_STATUS_BITS: Final = (
    Status.ACKNOWLEDGE
    | Status.DRIVER
    | Status.DRIVER_OK
    | Status.FEATURES_OK
    | Status.DEVICE_NEEDS_RESET
    | Status.FAILED
)

_TAKEN_OVER: Final = frozenset(
    ("device_feature_select", "driver_feature_select", "config_generation", "queue_select")
)


@attrs.define
class DeviceState:
    """What parts carry, as plain data."""

    common: CommonState
    net: NetState

    def copy(self) -> DeviceState:
        """Another one that shares nothing with this."""
        rules = self.net.filter
        return DeviceState(
            attrs.evolve(self.common, queues=[attrs.evolve(q) for q in self.common.queues]),
            attrs.evolve(self.net, filter=attrs.evolve(rules, vlans=set(rules.vlans))),
        )


def parts_of(config: MemberConfig, state: DeviceState) -> list[Part]:
    """Every part of a member, in the canonical order."""
    common = state.common
    registers = {
        "device_feature_select": common.device_feature_select,
        "driver_feature_select": common.driver_feature_select,
        "config_msix_vector": common.config_msix_vector,
        "num_queues": len(common.queues),
        "config_generation": common.config_generation,
        "queue_select": common.queue_select,
    }
    return [
        dev_features_part(config.offered),
        drv_features_part(common.driver_features),
        *(
            common_cfg_part(offset, registers[COMMON_REGISTERS[offset].name])
            for offset in COMMON_CFG_OFFSETS
        ),
        device_status_part(common.status),
        *(vq_cfg_part(index, _vq_cfg(queue)) for index, queue in enumerate(common.queues)),
        *(vq_notify_cfg_part(index, VqNotifyCfg(index, 0)) for index in range(len(common.queues))),
        *control_parts(config.offered, state.net),
    ]


def largest_image_size(config: MemberConfig) -> int:
    """Bytes of an image of a member whose driver has filled every table."""
    rules = FilterState(
        config.mac,
        unicast_overflow=True,
        multicast_overflow=True,
        vlans=set(range(MAX_VLAN + 1)),
    )
    queues = [QueueState(config.queue_size) for _ in range(config.num_queues)]
    return image_size(parts_of(config, DeviceState(CommonState(queues), NetState(rules))))


def with_parts_untrusted(
    config: MemberConfig, state: DeviceState, parts: Iterable[Part]
) -> DeviceState:
    """A copy of `state` with `parts` put in.  Raises PartsError if one does not fit the member."""
    target = _Target(config, state.copy())
    for part in parts:
        put = _PUT.get(part.type)
        if put is not None:
            put(target, part)
        elif not part.header.optional:
            raise part.refuse("this device has no such part, and it is not optional")
    target.settle()
    return target.state


def _vq_cfg(queue: QueueState) -> VqCfg:
    return VqCfg(
        queue.size, queue.msix_vector, queue.enabled, queue.desc, queue.driver, queue.device
    )


class _Target:
    """A state that parts are put into, one by one."""

    def __init__(self, config: MemberConfig, state: DeviceState) -> None:
        self.state = state
        self._config = config
        self._common = state.common
        self._features = state.net.features

    def dev_features(self, part: Part) -> None:
        part.require_size(8 * FEATURE_WORDS)
        theirs, ours = decode_features_untrusted(part), self._config.offered
        differences = [
            f"{whose} {', '.join(feature_names(word))}"
            for whose, word in (
                ("this device does not offer", theirs & ~ours),
                ("only this device offers", ours & ~theirs),
            )
            if word
        ]
        if differences:
            raise part.refuse(
                "; ".join(differences) + "; configure source and target with the same features"
            )

    def drv_features(self, part: Part) -> None:
        part.require_size(8 * FEATURE_WORDS)
        self._common.driver_features = decode_features_untrusted(part)
        self._features = -1

    def common_cfg(self, part: Part) -> None:
        value = decode_common_cfg_untrusted(part)
        name = COMMON_REGISTERS[part.header.register].name
        if name in _TAKEN_OVER:
            setattr(self._common, name, value)
        elif name == "config_msix_vector":
            self._common.config_msix_vector = self._vector(part, value)
        elif name == "num_queues" and value != len(self._common.queues):
            raise part.refuse(
                f"it is {value}, this device has {len(self._common.queues)} queues; configure "
                "source and target with the same number of queue pairs"
            )

    def device_status(self, part: Part) -> None:
        value = decode_device_status_untrusted(part)
        if unknown := value & ~_STATUS_BITS:
            raise part.refuse(f"it is {value:#x}; this device never has {unknown:#x}")
        if value & Status.DRIVER_OK and not value & Status.FEATURES_OK:
            raise part.refuse(f"it is {value:#x}: DRIVER_OK without FEATURES_OK")
        self._common.status = value

    def vq_cfg(self, part: Part) -> None:
        queue = self._queue(part)
        value = decode_vq_cfg_untrusted(part)
        largest = self._config.queue_size
        if not 0 < value.size <= largest or value.size & (value.size - 1):
            raise part.refuse(
                f"its size is {value.size}; here it is a power of two of at most {largest}"
            )
        queue.size = value.size
        queue.msix_vector = self._vector(part, value.msix_vector)
        queue.enabled = value.enabled
        queue.desc, queue.driver, queue.device = value.desc, value.driver, value.device

    def vq_notify_cfg(self, part: Part) -> None:
        self._queue(part)
        value = decode_vq_notify_cfg_untrusted(part)
        if value.queue_notify_off != part.header.queue:
            raise part.refuse(
                f"queue_notify_off is {value.queue_notify_off}, here it is {part.header.queue}"
            )

    def cvq_cfg(self, part: Part) -> None:
        if part.header.control is None and part.header.optional:
            return
        put_control_part_untrusted(self._config.offered, self.state.net, part)

    def settle(self) -> None:
        """All parts are in: see that they go together, and work out what follows from them."""
        common, net = self._common, self.state.net
        features = common.driver_features if common.status & Status.FEATURES_OK else 0
        if features:
            refusal = refusal_untrusted(self._config.offered, features)
            if refusal is not None:
                raise PartsError("DRV_FEATURES", None, f"with FEATURES_OK: {refusal}")
        if features != self._features:
            net.features = features
            net.guest_offloads = features & GUEST_OFFLOADS
            net.filter.filter_vlans = bool(features & Feature.CTRL_VLAN.mask)

    def _queue(self, part: Part) -> QueueState:
        index, queues = part.header.queue, self._common.queues
        if index >= len(queues):
            raise part.refuse(f"this device has {len(queues)} queues")
        return queues[index]

    def _vector(self, part: Part, vector: int) -> int:
        if vector != NO_VECTOR and vector >= self._config.num_vectors:
            raise part.refuse(
                f"it uses MSI-X vector {vector}; this device has {self._config.num_vectors}"
            )
        return vector


_PUT: Final[Mapping[int, Callable[[_Target, Part], None]]] = {
    PartType.DEV_FEATURES: _Target.dev_features,
    PartType.DRV_FEATURES: _Target.drv_features,
    PartType.PCI_COMMON_CFG: _Target.common_cfg,
    PartType.DEVICE_STATUS: _Target.device_status,
    PartType.VQ_CFG: _Target.vq_cfg,
    PartType.VQ_NOTIFY_CFG: _Target.vq_notify_cfg,
    PartType.CVQ_CFG: _Target.cvq_cfg,
}

"""What device parts carry of a member, and how another device's are put into it (virtio 1.4, Device
parts).

`DeviceState` is all of it as plain data: the registers of the common configuration, and what the
driver has set by control commands.  `parts_of` gives its parts, and `with_parts_untrusted` a state
with parts put in.  They are put into a copy, so that a refusal has changed nothing, and the refusal
names the features or the part that do not fit (`virtio.parts_fit`).

Which parts there are follows from what the member offers, not from what was negotiated: an image of
one member always has the same parts, though tables in it vary in length.

Where the standard leaves it open: registers of the common configuration are taken over if a driver
can write them, since config_msix_vector is nowhere else, and config_generation too.  A device that
is let run with FEATURES_OK and no features needs a reset.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.backends.software.member_control_parts import (
    control_parts,
    put_control_part,
)
from vfio_user_virtio.virtio.common_config import CommonState, QueueState
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
from vfio_user_virtio.virtio.features import Feature
from vfio_user_virtio.virtio.net_control import GUEST_OFFLOADS, NetState
from vfio_user_virtio.virtio.part_header import COMMON_CFG_OFFSETS, COMMON_REGISTERS, PartType
from vfio_user_virtio.virtio.parts import image_size
from vfio_user_virtio.virtio.parts_fit import DeviceShape, QueueShape, negotiated_untrusted
from vfio_user_virtio.virtio.rx_filter import MAX_VLAN, FilterState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from vfio_user_virtio.backends.software.config import MemberConfig
    from vfio_user_virtio.virtio.parts import Part

_TAKEN_OVER: Final = frozenset(
    (
        "device_feature_select",
        "driver_feature_select",
        "config_msix_vector",
        "config_generation",
        "queue_select",
    )
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


def shape_of(config: MemberConfig) -> DeviceShape:
    """Which parts fit a member."""
    queues = tuple(QueueShape(config.queue_size, index) for index in range(config.num_queues))
    return DeviceShape(config.offered, queues, config.num_vectors)


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
        if put is None:
            target.shape.check_untrusted(part)
        else:
            put(target, part)
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
        self.shape = shape_of(config)
        self._common = state.common
        self._features = state.net.features

    def drv_features(self, part: Part) -> None:
        self._common.driver_features = self.shape.drv_features_untrusted(part)
        self._features = -1

    def common_cfg(self, part: Part) -> None:
        value = self.shape.common_cfg_untrusted(part)
        name = COMMON_REGISTERS[part.header.register].name
        if name in _TAKEN_OVER:
            setattr(self._common, name, value)

    def device_status(self, part: Part) -> None:
        self._common.status = self.shape.device_status_untrusted(part)

    def vq_cfg(self, part: Part) -> None:
        value = self.shape.vq_cfg_untrusted(part)
        queue = self._common.queues[part.header.queue]
        queue.size, queue.msix_vector, queue.enabled = value.size, value.msix_vector, value.enabled
        queue.desc, queue.driver, queue.device = value.desc, value.driver, value.device

    def cvq_cfg(self, part: Part) -> None:
        value, command = self.shape.control_untrusted(part), part.header.control
        if value is not None and command is not None:
            put_control_part(self.state.net, command, value)

    def settle(self) -> None:
        """All parts are in: see that they go together, and work out what follows from them."""
        common, net = self._common, self.state.net
        features = negotiated_untrusted(self.shape.offered, common.driver_features, common.status)
        if features != self._features:
            net.features = features
            net.guest_offloads = features & GUEST_OFFLOADS
            net.filter.filter_vlans = bool(features & Feature.CTRL_VLAN.mask)


_PUT: Final[Mapping[int, Callable[[_Target, Part], None]]] = {
    PartType.DRV_FEATURES: _Target.drv_features,
    PartType.PCI_COMMON_CFG: _Target.common_cfg,
    PartType.DEVICE_STATUS: _Target.device_status,
    PartType.VQ_CFG: _Target.vq_cfg,
    PartType.CVQ_CFG: _Target.cvq_cfg,
}
"""Parts that change something; all others are only looked at."""

"""Wake a physical function that goes on where another has stopped: each of its queues is kicked.

No device part says that a notification was under way, so one that the source had not acted upon is
lost, and the driver does not send it again.  The function would wait for the driver and the driver
for the function.  A queue that is kicked for nothing costs a look at its ring.

The queues that are enabled, and where each is kicked, are in the function's common configuration,
which is read as its driver reads it: by selecting one after the other.  What the driver had
selected is put back; but it must not be doing the same meanwhile, so its guest must not be setting
the device up.

Rejected: to take both from the image that was loaded.  VQ_NOTIFY_CFG would do, but parts that an
owner need not know are no place to find out what its device wants.

A driver that has negotiated NOTIFICATION_DATA says with each kick how far its ring has come, which
nobody else knows; its queues are not kicked, and the log says so.

Source: virtio 1.4, Virtio Over PCI Bus, Available Buffer Notifications.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Final, Protocol

from vfio_user_virtio.backends.vfio.owner_transport import (
    COMMAND,
    COMMAND_MEMORY,
    CONFIG_SPACE,
    GONE,
    Register,
    capabilities_untrusted,
    structures_untrusted,
)
from vfio_user_virtio.device import VfioRegion
from vfio_user_virtio.virtio.common_config import Status
from vfio_user_virtio.virtio.features import Feature
from vfio_user_virtio.virtio.pci_capabilities import CfgType

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_user_virtio.backends.vfio.owner_transport import Location

_log: Final = logging.getLogger(__name__)

_TRANSPORT_FEATURES: Final = 1
"""Which word of the features has those of 32 to 63."""


class Registers(Protocol):
    """The regions of a function (`VfioDevice`)."""

    @property
    def name(self) -> str: ...

    def read(self, region: int, offset: int, count: int) -> bytes: ...

    def write(self, region: int, offset: int, data: bytes) -> None: ...


def kick_queues(device: Registers) -> int:
    """Kick each queue that is enabled; how many.  None of a function whose driver is not up, or
    that is no virtio function.  Raises KernelRefusal."""
    config = device.read(VfioRegion.CONFIG, 0, CONFIG_SPACE)
    found = structures_untrusted(config, capabilities_untrusted(config))
    common, notify = found.get(CfgType.COMMON), found.get(CfgType.NOTIFY)
    if common is None or notify is None or not config[COMMAND] & COMMAND_MEMORY:
        return 0
    registers = _Common(device, common)
    status = registers.read(Register.DEVICE_STATUS)
    if status == GONE or not status & Status.DRIVER_OK:
        return 0
    with registers.kept(Register.DRIVER_FEATURE_SELECT):
        registers.write(Register.DRIVER_FEATURE_SELECT, _TRANSPORT_FEATURES)
        features = registers.read(Register.DRIVER_FEATURE) << 32 * _TRANSPORT_FEATURES
    if features & Feature.NOTIFICATION_DATA.mask:
        _log.warning(
            "%s: its queues cannot be kicked, as its driver uses NOTIFICATION_DATA; if it stands "
            "still, take its interface down and up in the guest",
            device.name,
        )
        return 0
    with registers.kept(Register.QUEUE_SELECT):
        kicks = list(_kicks(registers, notify, features))
    for offset, value in kicks:
        device.write(notify.bar, offset, value.to_bytes(2, "little"))
    return len(kicks)


def _kicks(registers: _Common, notify: Location, features: int) -> Iterator[tuple[int, int]]:
    """Where in the BAR each enabled queue is kicked, and by which number."""
    for index in range(registers.read(Register.NUM_QUEUES)):
        registers.write(Register.QUEUE_SELECT, index)
        if not registers.read(Register.QUEUE_ENABLE):
            continue
        offset = registers.read(Register.QUEUE_NOTIFY_OFF) * notify.multiplier
        value = index
        if features & Feature.NOTIF_CONFIG_DATA.mask:
            value = registers.read(Register.QUEUE_NOTIF_CONFIG_DATA)
        if offset + 2 <= notify.length:
            yield notify.offset + offset, value


class _Common:
    """The common configuration structure of `device`, at `where`."""

    def __init__(self, device: Registers, where: Location) -> None:
        self._device = device
        self._where = where

    def read(self, register: Register) -> int:
        offset, size = register.value
        data = self._device.read(self._where.bar, self._where.offset + offset, size)
        return int.from_bytes(data, "little")

    def write(self, register: Register, value: int) -> None:
        offset, size = register.value
        data = value.to_bytes(size, "little")
        self._device.write(self._where.bar, self._where.offset + offset, data)

    @contextlib.contextmanager
    def kept(self, register: Register) -> Iterator[None]:
        """`register` is in the end what it was."""
        value = self.read(register)
        try:
            yield
        finally:
            self.write(register, value)

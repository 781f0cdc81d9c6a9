"""The registers of a legacy driver, of before virtio 1.0, over the common configuration of a
modern device (virtio 1.4, Legacy Interfaces: A Note on PCI Device Layout; Legacy Interfaces of
group administration commands).

    0  device features u32        12  queue size u16      18  device status u8
    4  driver features u32        14  queue select u16    19  ISR status u8
    8  queue address u32          16  queue notify u16    20  configuration vector u16
       (in pages of 4096)                                 22  queue vector u16

All little-endian; the two vectors are there only while MSI-X is on.  An access has to be exactly
one field, as administration commands demand it; any other is refused.

What a legacy driver does is carried out as what a modern one would have done, so that all that
follows, migration included, knows one kind of device.  The differences are bridged here:

* features end at bit 31; those that a modern device cannot do without are taken as accepted
* there is no FEATURES_OK; it is set with the first queue, or with DRIVER_OK if there is none
* a queue is one piece of memory, of the size that the device says, and is enabled by its address
* a legacy header is 10 bytes without MRG_RXBUF and 12 with it, as always in a modern device.  A
  driver that does without cannot be served: the device then needs a reset, as it does after
  features that go together only in part
* MQ and MTU are not offered: their configuration lies behind what a legacy BAR can show
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.virtio.common_config import Status
from vfio_user_virtio.virtio.features import Feature, mask_of
from vfio_user_virtio.virtio.split_queue import ring_layout

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_user_virtio.virtio.common_config import CommonConfig

LEGACY_CONFIG_SIZE: Final = 24
LEGACY_PAGE: Final = 4096
ANY_LAYOUT: Final = 1 << 27
"""VIRTIO_F_ANY_LAYOUT, which modern devices have no bit for: a header may share its buffer."""

_LEGACY_BITS: Final = 0xFFFF_FFFF
_NOT_FOR_LEGACY: Final = mask_of((Feature.MQ, Feature.MTU))
_TAKEN_AS_ACCEPTED: Final = mask_of(
    (Feature.VERSION_1, Feature.ACCESS_PLATFORM, Feature.RING_RESET)
)


class LegacyField(enum.Enum):
    """Fields as (offset, size)."""

    DEVICE_FEATURES = (0, 4)
    DRIVER_FEATURES = (4, 4)
    QUEUE_ADDRESS = (8, 4)
    QUEUE_SIZE = (12, 2)
    QUEUE_SELECT = (14, 2)
    QUEUE_NOTIFY = (16, 2)
    DEVICE_STATUS = (18, 1)
    ISR_STATUS = (19, 1)
    CONFIG_VECTOR = (20, 2)
    QUEUE_VECTOR = (22, 2)


_FIELDS: Final = {field.value: field for field in LegacyField}
_VECTORS: Final = frozenset((LegacyField.CONFIG_VECTOR, LegacyField.QUEUE_VECTOR))


class NotOneField(Exception):
    """An access that is not exactly one field that is there."""


class LegacyConfig:
    """The legacy registers over `common` of a device that offers `offered`.

    `read_isr` reads and clears the ISR status; `kick` notifies a queue; `vectors` says whether
    MSI-X is on.
    """

    def __init__(
        self,
        common: CommonConfig,
        offered: int,
        *,
        read_isr: Callable[[], int],
        kick: Callable[[int], None],
        vectors: Callable[[], bool],
    ) -> None:
        self._common = common
        self._offered = offered
        self._read_isr = read_isr
        self._kick = kick
        self._vectors = vectors

    @property
    def device_features(self) -> int:
        """What a legacy driver is offered."""
        return self._offered & _LEGACY_BITS & ~_NOT_FOR_LEGACY | ANY_LAYOUT

    def read_untrusted(self, offset: int, size: int) -> bytes:
        """The field of `size` bytes at `offset`.  Raises NotOneField."""
        return self._value(self._field(offset, size)).to_bytes(size, "little")

    def write_untrusted(self, offset: int, data: bytes) -> None:
        """Write the field at `offset`; one that is read-only ignores it.  Raises NotOneField."""
        field = self._field(offset, len(data))
        value = int.from_bytes(data, "little")
        match field:
            case LegacyField.DRIVER_FEATURES:
                self._write_features(value)
            case LegacyField.QUEUE_ADDRESS:
                self._place_queue(value)
            case LegacyField.QUEUE_SELECT:
                self._write(22, value, 2)
            case LegacyField.QUEUE_NOTIFY:
                self._kick(value)
            case LegacyField.DEVICE_STATUS:
                self._write_status(value)
            case LegacyField.CONFIG_VECTOR:
                self._write(16, value, 2)
            case LegacyField.QUEUE_VECTOR:
                self._write(26, value, 2)
            case _:
                return

    def _field(self, offset: int, size: int) -> LegacyField:
        field = _FIELDS.get((offset, size))
        if field is None or (field in _VECTORS and not self._vectors()):
            raise NotOneField
        return field

    def _value(self, field: LegacyField) -> int:
        state = self._common.state
        match field:
            case LegacyField.DEVICE_FEATURES:
                return self.device_features
            case LegacyField.DRIVER_FEATURES:
                return state.driver_features & _LEGACY_BITS
            case LegacyField.QUEUE_ADDRESS:
                return self._read(32, 8) // LEGACY_PAGE & _LEGACY_BITS if self._enabled() else 0
            case LegacyField.QUEUE_SIZE:
                return self._read(24, 2)
            case LegacyField.QUEUE_SELECT:
                return state.queue_select
            case LegacyField.DEVICE_STATUS:
                return state.status & ~Status.FEATURES_OK
            case LegacyField.ISR_STATUS:
                return self._read_isr()
            case LegacyField.CONFIG_VECTOR:
                return state.config_msix_vector
            case LegacyField.QUEUE_VECTOR:
                return self._read(26, 2)
            case _:  # queue notify
                return 0

    def _write_features(self, value: int) -> None:
        self._write(8, 0, 4)
        self._write(12, value & self.device_features & ~ANY_LAYOUT, 4)
        self._write(8, 1, 4)
        self._write(12, (self._offered & _TAKEN_AS_ACCEPTED) >> 32, 4)

    def _write_status(self, value: int) -> None:
        if value & Status.DRIVER_OK:
            self._accept_features()
        self._write(20, value & ~Status.FEATURES_OK, 1)

    def _accept_features(self) -> None:
        """What a modern driver does by FEATURES_OK; the device needs a reset if it cannot be."""
        common = self._common
        state = common.state
        if state.status & (Status.FEATURES_OK | Status.DEVICE_NEEDS_RESET):
            return
        if not state.driver_features & Feature.MRG_RXBUF.mask:
            common.refusal = "a legacy driver without MRG_RXBUF, whose headers have 10 bytes"
            common.needs_reset()
            return
        self._write(20, state.status | Status.FEATURES_OK, 1)
        if not state.status & Status.FEATURES_OK:
            common.needs_reset()

    def _place_queue(self, page: int) -> None:
        if not page:
            self._write(58, 1, 2)
            return
        size = self._read(24, 2)
        if not size:
            return
        self._accept_features()
        layout = ring_layout(size)
        desc = page * LEGACY_PAGE
        driver = desc + layout.desc
        end = driver + layout.avail
        self._write(32, desc, 8)
        self._write(40, driver, 8)
        self._write(48, end + -end % LEGACY_PAGE, 8)
        self._write(28, 1, 2)

    def _enabled(self) -> bool:
        return bool(self._read(28, 2))

    def _read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._common.read(offset, size), "little")

    def _write(self, offset: int, value: int, size: int) -> None:
        self._common.write_untrusted(offset, value.to_bytes(size, "little"))

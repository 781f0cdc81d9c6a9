"""The common configuration structure of the PCI transport, and the device status it holds
(virtio 1.4, Virtio Over PCI Bus, Common configuration structure layout).

64 bytes, little-endian, of which the driver reads and writes single fields at their natural width
(64-bit fields also as two halves).  The registers are plain data in `CommonState`; what a write
sets in motion is the business of a `Consequences`.  Wrong values never raise: as on a real device,
a write that makes no sense is ignored, and a negotiation that cannot be is refused by FEATURES_OK
reading back as 0.

Administration virtqueues come behind the others and are not counted in num_queues; a member has
none, and reads 0 where an owner has their first index and their number (offsets 60 to 63).
"""

from __future__ import annotations

import enum
import struct
from typing import Final, Protocol

import attrs

from vfio_user_virtio.virtio.features import Feature, refusal_untrusted

NO_VECTOR: Final = 0xFFFF
COMMON_CONFIG_SIZE: Final = 64
FEATURE_WORDS: Final = 4
"""device_feature_select reaches 128 bits; virtio-net's own features go beyond 64."""


class Status(enum.IntFlag):
    """device_status (virtio 1.4, Device Status Field)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    SUSPEND = 16
    DEVICE_NEEDS_RESET = 64
    FAILED = 128


@attrs.define
class QueueState:
    """The registers of one queue; addresses are IOVAs in bytes, `size` in descriptors."""

    size: int
    msix_vector: int = NO_VECTOR
    enabled: bool = False
    desc: int = 0
    driver: int = 0
    device: int = 0


@attrs.define
class CommonState:
    """All registers of the structure that hold state, as plain data."""

    queues: list[QueueState]
    device_feature_select: int = 0
    driver_feature_select: int = 0
    driver_features: int = 0
    config_msix_vector: int = NO_VECTOR
    status: int = 0
    config_generation: int = 0
    queue_select: int = 0


class Consequences(Protocol):
    """What register writes set in motion."""

    def features_accepted(self, features: int) -> None:
        """FEATURES_OK was granted for this feature word."""
        ...

    def driver_ok(self) -> None:
        """The driver is ready: queues that are enabled may run."""
        ...

    def queue_enabled(self, index: int) -> None:
        """queue_enable was written 1 (before or after DRIVER_OK)."""
        ...

    def queue_reset(self, index: int) -> None:
        """queue_reset was written 1: forget the queue; its registers are at their defaults."""
        ...

    def device_reset(self) -> None:
        """device_status was written 0: stop everything; the registers are at their defaults."""
        ...


class CommonConfig:
    """The registers of one device with `num_queues` queues, and `admin_queues` administration
    virtqueues behind them, of at most `queue_size` descriptors each."""

    def __init__(
        self,
        *,
        offered: int,
        num_queues: int,
        queue_size: int,
        num_vectors: int,
        consequences: Consequences,
        admin_queues: int = 0,
    ) -> None:
        self._offered = offered
        self._queue_size = queue_size
        self._num_vectors = num_vectors
        self._consequences = consequences
        self._num_queues = num_queues
        self._admin_queues = admin_queues
        self.state = CommonState([QueueState(queue_size) for _ in range(num_queues + admin_queues)])
        self.refusal: str | None = None
        """Why FEATURES_OK was last refused, for the log."""

    def reset(self) -> None:
        """Put every register to its default (virtio 1.4, Device Reset)."""
        generation = self.state.config_generation
        self.state = CommonState(
            [QueueState(self._queue_size) for _ in self.state.queues],
            config_generation=generation,
        )

    @property
    def features(self) -> int:
        """The negotiated feature word, 0 until FEATURES_OK."""
        return self.state.driver_features if self.state.status & Status.FEATURES_OK else 0

    @property
    def live(self) -> bool:
        """Whether queues may run: DRIVER_OK, and neither failed nor in need of a reset."""
        return self.state.status & _LIVE_MASK == Status.DRIVER_OK

    def needs_reset(self) -> None:
        """Raise DEVICE_NEEDS_RESET; the caller sends the configuration interrupt."""
        self.state.status |= Status.DEVICE_NEEDS_RESET

    def config_changed(self) -> None:
        """Count a change of the device-specific configuration (config_generation)."""
        self.state.config_generation = (self.state.config_generation + 1) & 0xFF

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset`; bytes outside the structure read 0."""
        image = self._image()
        return image[offset : offset + count].ljust(count, b"\0")

    def write_untrusted(self, offset: int, data: bytes | memoryview) -> None:
        """A write of the guest.  One that does not cover exactly one field, or one half of a
        64-bit field, is ignored, as the standard leaves it undefined."""
        field = _FIELDS.get((offset, len(data)))
        if field is not None:
            self._write(field, int.from_bytes(data, "little"))

    def _image(self) -> bytes:
        state = self.state
        queue = self._selected()
        present = queue if queue is not None else _ABSENT
        shift = 32 * state.device_feature_select
        device_word = self._offered >> shift & 0xFFFF_FFFF if shift < 32 * FEATURE_WORDS else 0
        shift = 32 * state.driver_feature_select
        driver_word = (
            state.driver_features >> shift & 0xFFFF_FFFF if shift < 32 * FEATURE_WORDS else 0
        )
        return _LAYOUT.pack(
            state.device_feature_select,
            device_word,
            state.driver_feature_select,
            driver_word,
            state.config_msix_vector,
            self._num_queues,
            state.status,
            state.config_generation,
            state.queue_select,
            present.size,
            present.msix_vector,
            present.enabled,
            state.queue_select if queue is not None else 0,
            present.desc,
            present.driver,
            present.device,
            0,
            0,
            self._num_queues if self._admin_queues else 0,
            self._admin_queues,
        )

    def _selected(self) -> QueueState | None:
        index = self.state.queue_select
        return self.state.queues[index] if index < len(self.state.queues) else None

    def _write(self, field: _Field, value: int) -> None:
        state = self.state
        match field:
            case _Field.DEVICE_FEATURE_SELECT:
                state.device_feature_select = value
            case _Field.DRIVER_FEATURE_SELECT:
                state.driver_feature_select = value
            case _Field.DRIVER_FEATURE:
                self._write_driver_feature(value)
            case _Field.CONFIG_MSIX_VECTOR:
                state.config_msix_vector = self._vector(value)
            case _Field.DEVICE_STATUS:
                self._write_status(value)
            case _Field.QUEUE_SELECT:
                state.queue_select = value
            case _:
                queue = self._selected()
                if queue is not None:
                    self._write_queue(queue, field, value)

    def _vector(self, value: int) -> int:
        return value if value < self._num_vectors else NO_VECTOR

    def _write_driver_feature(self, value: int) -> None:
        state = self.state
        shift = 32 * state.driver_feature_select
        if shift < 32 * FEATURE_WORDS and not state.status & Status.FEATURES_OK:
            state.driver_features &= ~(0xFFFF_FFFF << shift)
            state.driver_features |= value << shift

    def _write_status(self, value: int) -> None:
        state = self.state
        if value == 0:
            self.reset()
            self._consequences.device_reset()
            return
        added = Status(value & ~state.status & _DRIVER_BITS)
        if added & Status.FEATURES_OK:
            self.refusal = refusal_untrusted(self._offered, state.driver_features)
            if self.refusal is not None:
                added &= ~Status.FEATURES_OK
        if added & Status.DRIVER_OK and not (state.status | added) & Status.FEATURES_OK:
            added &= ~Status.DRIVER_OK
        state.status |= added
        if added & Status.FEATURES_OK:
            self._consequences.features_accepted(state.driver_features)
        if added & Status.DRIVER_OK:
            self._consequences.driver_ok()

    def _write_queue(self, queue: QueueState, field: _Field, value: int) -> None:
        if field is _Field.QUEUE_MSIX_VECTOR:
            queue.msix_vector = self._vector(value)
        elif field is _Field.QUEUE_RESET:
            if value == 1 and self.features & Feature.RING_RESET.mask:
                self._reset_queue(queue)
        elif not queue.enabled:
            self._configure_queue(queue, field, value)

    def _reset_queue(self, queue: QueueState) -> None:
        self.state.queues[self.state.queue_select] = QueueState(self._queue_size)
        if queue.enabled:
            self._consequences.queue_reset(self.state.queue_select)

    def _configure_queue(self, queue: QueueState, field: _Field, value: int) -> None:
        match field:
            case _Field.QUEUE_SIZE:
                valid = value.bit_count() == 1 and value <= self._queue_size
                queue.size = value if valid else queue.size
            case _Field.QUEUE_ENABLE:
                if value == 1:
                    queue.enabled = True
                    self._consequences.queue_enabled(self.state.queue_select)
            case _Field.QUEUE_DESC:
                queue.desc = value
            case _Field.QUEUE_DESC_HIGH:
                queue.desc = queue.desc & _LOW | value << 32
            case _Field.QUEUE_DESC_LOW:
                queue.desc = queue.desc & ~_LOW | value
            case _Field.QUEUE_DRIVER:
                queue.driver = value
            case _Field.QUEUE_DRIVER_HIGH:
                queue.driver = queue.driver & _LOW | value << 32
            case _Field.QUEUE_DRIVER_LOW:
                queue.driver = queue.driver & ~_LOW | value
            case _Field.QUEUE_DEVICE:
                queue.device = value
            case _Field.QUEUE_DEVICE_HIGH:
                queue.device = queue.device & _LOW | value << 32
            case _:
                queue.device = queue.device & ~_LOW | value


class _Field(enum.Enum):
    """Writable fields as (offset, size)."""

    DEVICE_FEATURE_SELECT = (0, 4)
    DRIVER_FEATURE_SELECT = (8, 4)
    DRIVER_FEATURE = (12, 4)
    CONFIG_MSIX_VECTOR = (16, 2)
    DEVICE_STATUS = (20, 1)
    QUEUE_SELECT = (22, 2)
    QUEUE_SIZE = (24, 2)
    QUEUE_MSIX_VECTOR = (26, 2)
    QUEUE_ENABLE = (28, 2)
    QUEUE_DESC = (32, 8)
    QUEUE_DESC_LOW = (32, 4)
    QUEUE_DESC_HIGH = (36, 4)
    QUEUE_DRIVER = (40, 8)
    QUEUE_DRIVER_LOW = (40, 4)
    QUEUE_DRIVER_HIGH = (44, 4)
    QUEUE_DEVICE = (48, 8)
    QUEUE_DEVICE_LOW = (48, 4)
    QUEUE_DEVICE_HIGH = (52, 4)
    QUEUE_RESET = (58, 2)


_LAYOUT: Final = struct.Struct("<IIIIHHBBHHHHHQQQHHHH")
"""Fields in the standard's order: device_feature_select, device_feature, driver_feature_select,
driver_feature, config_msix_vector, num_queues, device_status, config_generation, queue_select,
queue_size, queue_msix_vector, queue_enable, queue_notify_off, queue_desc, queue_driver,
queue_device, queue_notif_config_data, queue_reset, admin_queue_index, admin_queue_num."""
assert _LAYOUT.size == COMMON_CONFIG_SIZE

_FIELDS: Final = {field.value: field for field in _Field}
_ABSENT: Final = QueueState(0)
_LOW: Final = 0xFFFF_FFFF
_DRIVER_BITS: Final = (
    Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK | Status.FEATURES_OK | Status.FAILED
)
_LIVE_MASK: Final = Status.DRIVER_OK | Status.DEVICE_NEEDS_RESET | Status.FAILED

"""A device's common configuration, and a driver that knows the offsets of its registers."""

from __future__ import annotations

from typing import Final

from vfio_user_virtio.virtio.common_config import COMMON_CONFIG_SIZE, CommonConfig, Status
from vfio_user_virtio.virtio.features import Feature, mask_of

OFFERED: Final = (
    mask_of(
        (
            Feature.VERSION_1,
            Feature.CSUM,
            Feature.HOST_TSO4,
            Feature.EVENT_IDX,
            Feature.RING_RESET,
        )
    )
    | 1 << 70
)
NUM_QUEUES: Final = 3
QUEUE_SIZE: Final = 256
NUM_VECTORS: Final = 4

FEATURES_READ: Final = Status.ACKNOWLEDGE | Status.DRIVER
NEGOTIATED: Final = FEATURES_READ | Status.FEATURES_OK
RUNNING: Final = NEGOTIATED | Status.DRIVER_OK

U32: Final = 4
U16: Final = 2
U64: Final = 8
U8: Final = 1
WRITABLE: Final = {
    (0, U32): "device_feature_select",
    (8, U32): "driver_feature_select",
    (12, U32): "driver_feature",
    (16, U16): "config_msix_vector",
    (20, U8): "device_status",
    (22, U16): "queue_select",
    (24, U16): "queue_size",
    (26, U16): "queue_msix_vector",
    (28, U16): "queue_enable",
    (32, U64): "queue_desc",
    (32, U32): "queue_desc",
    (36, U32): "queue_desc",
    (40, U64): "queue_driver",
    (40, U32): "queue_driver",
    (44, U32): "queue_driver",
    (48, U64): "queue_device",
    (48, U32): "queue_device",
    (52, U32): "queue_device",
    (58, U16): "queue_reset",
}
"""Where and how wide a driver may write; everything else must be ignored."""


class Recorder:
    """Consequences that are only written down."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def features_accepted(self, features: int) -> None:
        self.calls.append(("features_accepted", features))

    def driver_ok(self) -> None:
        self.calls.append(("driver_ok", 0))

    def queue_enabled(self, index: int) -> None:
        self.calls.append(("queue_enabled", index))

    def queue_reset(self, index: int) -> None:
        self.calls.append(("queue_reset", index))

    def device_reset(self) -> None:
        self.calls.append(("device_reset", 0))

    def taken(self) -> list[tuple[str, int]]:
        calls, self.calls = self.calls, []
        return calls


class Driver:
    """A device and the accesses of a driver that knows the offsets."""

    def __init__(self, *, offered: int = OFFERED) -> None:
        self.recorder = Recorder()
        self.config = CommonConfig(
            offered=offered,
            num_queues=NUM_QUEUES,
            queue_size=QUEUE_SIZE,
            num_vectors=NUM_VECTORS,
            consequences=self.recorder,
        )

    def read(self, offset: int, width: int) -> int:
        data = self.config.read(offset, width)
        assert len(data) == width
        return int.from_bytes(data, "little")

    def write(self, offset: int, width: int, value: int) -> None:
        self.config.write_untrusted(offset, value.to_bytes(width, "little"))

    @property
    def status(self) -> int:
        return self.read(20, 1)

    @status.setter
    def status(self, value: int) -> None:
        self.write(20, 1, value)

    def set_features(self, word: int) -> None:
        for select in range(4):
            self.write(8, 4, select)
            self.write(12, 4, word >> 32 * select & 0xFFFF_FFFF)

    def negotiate(self, word: int = OFFERED) -> None:
        self.status = Status.ACKNOWLEDGE
        self.status = FEATURES_READ
        self.set_features(word)
        self.status = NEGOTIATED

    def run(self, word: int = OFFERED) -> None:
        self.negotiate(word)
        self.status = RUNNING
        self.recorder.taken()

    def enable_queue(self, index: int) -> None:
        self.write(22, 2, index)
        self.write(28, 2, 1)


def image(driver: Driver) -> bytes:
    return driver.config.read(0, COMMON_CONFIG_SIZE)

"""A `Device` as libvfio-user is to show it: its regions, interrupts, memory and migration.

The library keeps nothing of the device: the configuration space too is the device's
(VFU_REGION_FLAG_ALWAYS_CB), because its own PCI code knows less than ours.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from vfio_user_virtio.device import FeatureOperation, RegionFlags
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.libvfio_user.declarations import Irq, Region, RegionFlag
from vfio_user_virtio.limits import MAX_DMA_MAPS
from vfio_user_virtio.protocol.feature import Feature

if TYPE_CHECKING:
    from vfio_user_virtio.device import Device
    from vfio_user_virtio.libvfio_user.context import Context, DmaRegion
    from vfio_user_virtio.libvfio_user.declarations import MigrationState, ResetKind

_SMALLEST_MEMORY_BAR: Final = 16
"""Bytes; the library takes a smaller BAR for one of I/O ports only."""


class Answers(Protocol):
    """Who answers for the device when the library calls.  OSError refuses."""

    def region_read(self, index: int, offset: int, count: int) -> bytes: ...

    def region_write(self, index: int, offset: int, data: memoryview) -> None: ...

    def registered(self, region: DmaRegion) -> None: ...

    def unregistered(self, region: DmaRegion) -> None: ...

    def reset(self, kind: ResetKind) -> None: ...

    def quiesce(self) -> None: ...

    def transition(self, state: MigrationState) -> None: ...

    def read_data(self, count: int) -> bytes | memoryview: ...

    def write_data(self, data: memoryview) -> None: ...


async def can_migrate(device: Device) -> bool:
    """Whether `device` has the feature MIGRATION."""
    try:
        await device.feature(Feature.MIGRATION, FeatureOperation.PROBE | FeatureOperation.GET, b"")
    except ClientError:
        return False
    return True


def describe(context: Context, device: Device, answers: Answers, *, migration: bool) -> None:
    """Tell `context` all of `device`, but for `Context.realize`.  Raises OSError."""
    info = device.device_info()
    for index in Region:
        if index < info.num_regions:
            _describe_region(context, device, answers, index)
    for kind in Irq:
        count = device.irq_info(kind).count if kind < info.num_irqs else 0
        context.setup_irqs(kind, count)
    context.setup_dma(
        register=answers.registered, unregister=answers.unregistered, max_regions=MAX_DMA_MAPS
    )
    context.setup_reset(answers.reset)
    context.setup_quiesce(answers.quiesce)
    if migration:
        context.setup_migration(answers)


def _describe_region(context: Context, device: Device, answers: Answers, index: Region) -> None:
    info = device.region_info(index)
    if not info.size:
        return
    flags = RegionFlag(info.flags & (RegionFlags.READ | RegionFlags.WRITE))
    if index is Region.CONFIG:
        flags |= RegionFlag.ALWAYS_CALLBACK
    elif info.size >= _SMALLEST_MEMORY_BAR:
        flags |= RegionFlag.MEM
    mapped = bool(info.flags & RegionFlags.MMAP) and info.fd is not None
    context.setup_region(
        index,
        info.size,
        read=partial(answers.region_read, index) if info.flags & RegionFlags.READ else None,
        write=partial(answers.region_write, index) if info.flags & RegionFlags.WRITE else None,
        flags=flags,
        areas=[(area.offset, area.size) for area in info.areas] if mapped else (),
        fd=info.fd if mapped else None,
        offset=info.fd_offset if mapped else 0,
    )

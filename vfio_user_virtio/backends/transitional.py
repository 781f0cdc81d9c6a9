"""The transitional view of a member: a modern virtio-net function that also looks like one of
before virtio 1.0, for guests with nothing newer than a legacy driver (virtio 1.4, Legacy Interfaces
of group administration commands).

A VF has no I/O BAR, so that a legacy driver finds nothing to talk to.  This view puts a BAR0 of 32
I/O ports in front of it, and carries each access out as an administration command of the owner; a
notification is written where the owner says, without a command.  What the client sees is what
Linux's vfio-virtio driver shows in its legacy mode:

    configuration space   device id 0x1000, revision 0, subsystem 1af4:0001, BAR0 as an I/O BAR
    BAR0                  0 … 19 legacy registers, 20 … 23 their vectors while MSI-X is on, then the
                          device's configuration

Everything else, the modern registers included, is the device's own; migration too, since to the
owner there is only one kind of device.  The register of BAR0 and the I/O bit of COMMAND are kept
here and are no state of the device: a client that migrates carries them in its PCI state.

An access is never split: one that is not exactly one field is refused by the owner (EINVAL).
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.device import IrqAction, RegionFlags, RegionInfo, VfioIrq, VfioRegion
from vfio_user_virtio.errors import ClientError, HostError
from vfio_user_virtio.migration.admin_client import AdminError
from vfio_user_virtio.virtio.admin import Opcode
from vfio_user_virtio.virtio.admin_commands import (
    NOTIFY_INFO_SIZE,
    NotifyPlace,
    decode_notify_info_untrusted,
    legacy_notify_info,
    legacy_read,
    legacy_write,
)
from vfio_user_virtio.virtio.legacy_config import LEGACY_CONFIG_SIZE, LegacyField

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_user_virtio.device import (
        Device,
        DeviceInfo,
        DmaMapping,
        FeatureOperation,
        IrqInfo,
        IrqRequest,
        RemoteMemory,
        ResetCause,
    )
    from vfio_user_virtio.migration.admin_client import AdminClient

BAR0_SIZE: Final = 32
_BAR0: Final = RegionInfo(BAR0_SIZE, RegionFlags.READ | RegionFlags.WRITE)
_COMMAND: Final = 0x04
_COMMAND_IO: Final = 1
_BAR0_REGISTER: Final = 0x10
_BAR_REGISTER_SIZE: Final = 4
_FIXED: Final = (
    (0x02, struct.pack("<H", 0x1000)),
    (0x08, b"\0"),
    (0x2C, struct.pack("<HH", 0x1AF4, 1)),
)
"""Device id, revision, subsystem vendor and id (1 is the type of a network device)."""

_NOTIFY_OFFSET, _NOTIFY_SIZE = LegacyField.QUEUE_NOTIFY.value
_WITHOUT_VECTORS: Final = LEGACY_CONFIG_SIZE - 4


class TransitionalDevice:
    """`device`, which is member `member_id` of the owner behind `client`, as a transitional one.

    Made by `transitional`, which asks where notifications go: (`bar`, `offset`) of the device.
    """

    def __init__(
        self, device: Device, client: AdminClient, member_id: int, notify: tuple[int, int]
    ) -> None:
        self.inner: Final = device
        self._device = device
        self._client = client
        self._member_id = member_id
        self._notify_bar, self._notify_offset = notify
        self._command = 0
        self._bar0 = bytearray(_BAR_REGISTER_SIZE)
        self._msix_on = False

    # --- what differs --------------------------------------------------------------------------

    def region_info(self, index: int) -> RegionInfo:
        return _BAR0 if index == VfioRegion.BAR0 else self._device.region_info(index)

    async def region_read(self, index: int, offset: int, count: int) -> bytes:
        if index == VfioRegion.BAR0:
            return await self._read_bar0(offset, count)
        data = await self._device.region_read(index, offset, count)
        return self._patched(offset, data) if index == VfioRegion.CONFIG else data

    async def region_write(self, index: int, offset: int, data: bytes | memoryview) -> None:
        if index == VfioRegion.BAR0:
            await self._write_bar0(offset, bytes(data))
            return
        if index == VfioRegion.CONFIG:
            self._shadow(offset, data)
        await self._device.region_write(index, offset, data)

    async def set_irqs(self, request: IrqRequest) -> None:
        await self._device.set_irqs(request)
        if request.index == VfioIrq.MSIX and request.action is IrqAction.TRIGGER:
            if request.eventfds:
                self._msix_on = True
            elif request.eventfds is None and request.bools is None and not request.count:
                self._msix_on = False

    async def reset(self, cause: ResetCause) -> None:
        self._command = 0
        await self._device.reset(cause)

    async def release(self) -> None:
        self._msix_on = False
        await self._device.release()

    def _patched(self, offset: int, data: bytes) -> bytes:
        patched = bytearray(data)
        bar0 = (int.from_bytes(self._bar0, "little") & -BAR0_SIZE | 1).to_bytes(4, "little")
        for start, value in (*_FIXED, (_BAR0_REGISTER, bar0)):
            for position, byte in enumerate(value, start - offset):
                if 0 <= position < len(patched):
                    patched[position] = byte
        if 0 <= _COMMAND - offset < len(patched):
            patched[_COMMAND - offset] |= self._command & _COMMAND_IO
        return bytes(patched)

    def _shadow(self, offset: int, data: bytes | memoryview) -> None:
        for register, byte in enumerate(data, offset):
            if register == _COMMAND:
                self._command = byte
            elif 0 <= register - _BAR0_REGISTER < _BAR_REGISTER_SIZE:
                self._bar0[register - _BAR0_REGISTER] = byte

    async def _read_bar0(self, offset: int, count: int) -> bytes:
        self._check_untrusted(offset, count)
        if offset == _NOTIFY_OFFSET:
            return await self._device.region_read(self._notify_bar, self._notify_offset, count)
        opcode, start = self._place(offset, reading=True)
        try:
            return (await self._client.execute(legacy_read(opcode, self._member_id, start), count))[
                :count
            ]
        except AdminError as error:
            raise ClientError(error.errno, str(error)) from None

    async def _write_bar0(self, offset: int, data: bytes) -> None:
        self._check_untrusted(offset, len(data))
        if offset == _NOTIFY_OFFSET:
            await self._device.region_write(self._notify_bar, self._notify_offset, data)
            return
        opcode, start = self._place(offset, reading=False)
        try:
            await self._client.execute(legacy_write(opcode, self._member_id, start, data))
        except AdminError as error:
            raise ClientError(error.errno, str(error)) from None

    def _check_untrusted(self, offset: int, count: int) -> None:
        if not self._command & _COMMAND_IO:
            raise ClientError(errno.EIO, "BAR0: I/O space is not enabled in COMMAND")
        if offset == _NOTIFY_OFFSET and count != _NOTIFY_SIZE:
            raise ClientError(
                errno.EINVAL, f"BAR0: queue notify takes {_NOTIFY_SIZE} bytes, not {count}"
            )

    def _place(self, offset: int, *, reading: bool) -> tuple[Opcode, int]:
        """Which command is for `offset` of BAR0, and what is its offset there."""
        split = LEGACY_CONFIG_SIZE if self._msix_on else _WITHOUT_VECTORS
        if offset < split:
            common = Opcode.LEGACY_COMMON_CFG_READ if reading else Opcode.LEGACY_COMMON_CFG_WRITE
            return common, offset
        device = Opcode.LEGACY_DEV_CFG_READ if reading else Opcode.LEGACY_DEV_CFG_WRITE
        return device, offset - split

    # --- what is handed on ---------------------------------------------------------------------

    def device_info(self) -> DeviceInfo:
        return self._device.device_info()

    def irq_info(self, index: int) -> IrqInfo:
        return self._device.irq_info(index)

    async def dma_map(self, mapping: DmaMapping) -> None:
        await self._device.dma_map(mapping)

    async def dma_unmap(self, iova: int, size: int) -> None:
        await self._device.dma_unmap(iova, size)

    async def feature(self, index: int, operation: FeatureOperation, data: bytes) -> bytes:
        return await self._device.feature(index, operation, data)

    async def migration_read(self, count: int) -> bytes | memoryview:
        return await self._device.migration_read(count)

    async def migration_write(self, data: bytes | memoryview) -> None:
        await self._device.migration_write(data)

    async def precopy_info(self) -> tuple[int, int]:
        return await self._device.precopy_info()

    def work(self) -> None:
        self._device.work()

    async def serve(self, memory: RemoteMemory) -> None:
        await self._device.serve(memory)


async def transitional(device: Device, client: AdminClient, member_id: int) -> TransitionalDevice:
    """The transitional view of `device`.

    The owner must have been asked for its commands (`PartsOwner.discover`).  Raises HostError if it
    cannot give this view, or if the device has a BAR0 of its own.
    """
    if device.region_info(VfioRegion.BAR0).size:
        raise HostError(f"member {member_id} has a BAR0 of its own; serve it without legacy")
    try:
        result = await client.execute(legacy_notify_info(member_id), NOTIFY_INFO_SIZE)
    except AdminError as error:
        raise HostError(f"no legacy view: {error}; serve it without legacy") from None
    places = _usable(device, result)
    notify = next(places, None)
    if notify is None:
        raise HostError(
            f"no legacy view: the owner names no usable place in member {member_id} for legacy "
            "notifications; serve it without legacy"
        )
    return TransitionalDevice(device, client, member_id, notify)


def _usable(device: Device, result: bytes) -> Iterator[tuple[int, int]]:
    for entry in decode_notify_info_untrusted(result):
        room = device.region_info(entry.bar).size
        if entry.place is NotifyPlace.MEMBER and entry.offset + _NOTIFY_SIZE <= room:
            yield entry.bar, entry.offset

"""A client of a device that maps what it may of the BARs, as a VMM does for its guest.

Why: a device whose BARs are mapped has registers that cost no message, and a driver that uses them
shows whether packets go by without the server.  `MappedBars` stands between a driver (`VirtioPci`)
and its client: an access inside a mapped area is a load or store of its size, any other a message.

Who maps a device's BAR keeps the device open: `close` gives it back.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Final, Literal, Protocol

import attrs

from vfio_user_virtio.device import RegionFlags, SparseArea, VfioRegion
from vfio_user_virtio.testing.virtio_pci import PciClient

if TYPE_CHECKING:
    from vfio_user_virtio.device import IrqRequest, RegionInfo

_FORMATS: Final[dict[int, Literal["B", "H", "I"]]] = {1: "B", 2: "H", 4: "I"}


class RegionClient(PciClient, Protocol):
    """The part of a vfio-user client that is needed here."""

    async def region_info(self, index: int) -> RegionInfo:
        """Region `index`; its fd, if there is one, is the caller's to close."""
        ...


@attrs.frozen
class _Mapped:
    """`size` bytes from `offset` of region `region`, mapped."""

    region: int
    offset: int
    size: int
    memory: mmap.mmap

    def holds(self, region: int, offset: int, size: int) -> bool:
        inside = self.offset <= offset and offset + size <= self.offset + self.size
        return region == self.region and inside


class MappedBars:
    """`client`, with what `map_all` has mapped; `loads` and `stores` count what was no message."""

    def __init__(self, client: RegionClient) -> None:
        self.client = client
        self.loads = 0
        self.stores = 0
        self._mapped: list[_Mapped] = []

    async def map_all(self) -> list[tuple[int, SparseArea]]:
        """Map every area that the device offers; which they are, with their regions."""
        for index in range(VfioRegion.BAR5 + 1):
            info = await self.client.region_info(index)
            if info.fd is None:
                continue
            try:
                if info.flags & RegionFlags.MMAP:
                    for area in info.areas or (SparseArea(0, info.size),):
                        memory = mmap.mmap(
                            info.fd, area.size, mmap.MAP_SHARED, offset=info.fd_offset + area.offset
                        )
                        self._mapped.append(_Mapped(index, area.offset, area.size, memory))
            finally:
                os.close(info.fd)
        return [(one.region, SparseArea(one.offset, one.size)) for one in self._mapped]

    def close(self) -> None:
        for one in self._mapped:
            one.memory.close()
        self._mapped.clear()

    # --- PciClient -----------------------------------------------------------------------------

    async def region_read(self, index: int, offset: int, count: int) -> bytes:
        one = self._find(index, offset, count)
        if one is None:
            return await self.client.region_read(index, offset, count)
        self.loads += 1
        start = offset - one.offset
        with (
            memoryview(one.memory) as view,
            view[start : start + count] as part,
            part.cast(_FORMATS[count]) as register,
        ):
            return register[0].to_bytes(count, "little")

    async def region_write(
        self, index: int, offset: int, data: bytes, *, no_reply: bool = False
    ) -> None:
        one = self._find(index, offset, len(data))
        if one is None:
            await self.client.region_write(index, offset, data, no_reply=no_reply)
            return
        self.stores += 1
        start = offset - one.offset
        with (
            memoryview(one.memory) as view,
            view[start : start + len(data)] as part,
            part.cast(_FORMATS[len(data)]) as register,
        ):
            register[0] = int.from_bytes(data, "little")

    async def set_irqs(self, request: IrqRequest) -> None:
        await self.client.set_irqs(request)

    def _find(self, region: int, offset: int, size: int) -> _Mapped | None:
        """Where the access can be made as one load or store."""
        if size not in _FORMATS or offset % size:
            return None
        return next((one for one in self._mapped if one.holds(region, offset, size)), None)

"""Accesses to mapped BARs are loads and stores; all others are messages."""

from __future__ import annotations

import os

from tests.transport.memory_device import BAR2_FD_OFFSET, MemoryDevice
from vfio_user_virtio.device import SparseArea, VfioRegion
from vfio_user_virtio.testing.loopback import served
from vfio_user_virtio.testing.mapped_bars import MappedBars


async def test_registers_in_a_mapped_area_cost_no_message() -> None:
    device = MemoryDevice()
    async with served(device) as client:
        bars = MappedBars(client)
        areas = await bars.map_all()
        assert areas[:2] == [(2, SparseArea(0x1000, 0x1000)), (2, SparseArea(0x3000, 0x1000))]
        device.calls.clear()
        await bars.region_write(VfioRegion.BAR2, 0x1004, b"\x78\x56\x34\x12")
        assert os.pread(device.fd, 4, BAR2_FD_OFFSET + 0x1004) == b"\x78\x56\x34\x12"
        os.pwrite(device.fd, b"\xcd\xab", BAR2_FD_OFFSET + 0x3002)
        assert await bars.region_read(VfioRegion.BAR2, 0x3002, 2) == b"\xcd\xab"
        assert device.calls == []
        assert (bars.loads, bars.stores) == (1, 1)
        bars.close()
    device.close()


async def test_all_other_registers_do() -> None:
    device = MemoryDevice()
    async with served(device) as client:
        bars = MappedBars(client)
        await bars.map_all()
        device.calls.clear()
        await bars.region_write(VfioRegion.BAR2, 0, b"\x01\x02")  # left out of the map
        await bars.region_write(VfioRegion.BAR2, 0x1002, b"\x01\x02\x03\x04")  # not aligned
        await bars.region_write(VfioRegion.BAR0, 8, b"\x05")
        assert await bars.region_read(VfioRegion.BAR0, 8, 1) == b"\x05"
        assert await bars.region_read(VfioRegion.BAR2, 0x1FFC, 8) == bytes(8)
        assert device.calls == ["region_write"] * 3 + ["region_read"] * 2
        assert (bars.loads, bars.stores) == (0, 0)
        bars.close()
    device.close()

"""Every command end to end: client, two sockets, session, a device of plain memory."""

from __future__ import annotations

from tests.transport.served import client_of, served
from vfio_user_virtio.device import DeviceFlags, DeviceInfo, VfioRegion


async def test_device_info() -> None:
    async with served() as one, client_of(one) as client:
        info = await client.device_info()
    assert info == DeviceInfo(DeviceFlags.RESET | DeviceFlags.PCI, 9, 5)


async def test_a_register_is_written_and_read() -> None:
    async with served() as one, client_of(one) as client:
        await client.region_write(VfioRegion.BAR0, 8, b"\x01\x02\x03\x04")
        assert await client.region_read(VfioRegion.BAR0, 6, 8) == b"\0\0\x01\x02\x03\x04\0\0"
    assert one.device.writes == [(0, 8, b"\x01\x02\x03\x04")]

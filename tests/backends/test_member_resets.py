"""Every way to reset a member or a part of it, under traffic, and odd corners of its registers."""

from __future__ import annotations

import pytest
import trio

from tests.backends.member_rig import (
    MAC_A,
    MAC_B,
    configs,
    frame,
    guests,
    nothing_comes,
    ping_pong,
    receive,
)
from vfio_user_virtio.testing.virtio_pci import Register
from vfio_user_virtio.virtio.common_config import Status
from vfio_user_virtio.virtio.features import Feature

pytestmark = pytest.mark.usefixtures("engine")


async def test_a_driver_may_come_and_go() -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver()
        await db.start()
        for _ in range(20):
            await da.start()
            await ping_pong(da, db, count=2)
            await da.stop()
            await db.send(frame(MAC_A, MAC_B, b"to nobody"))
            await db.flush()


@pytest.mark.parametrize("kind", ["flr", "d3", "client", "virtio"])
async def test_resets_in_mid_traffic(kind: str) -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver()
        await db.start()
        stop = trio.Event()

        async def blast() -> None:
            while not stop.is_set():
                await db.send(frame(MAC_A, MAC_B, b"noise"))
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(blast)
            for _ in range(5):
                await da.start()
                await da.control.set_rx_mode("promisc", True)
                for _ in range(5):
                    await da.send(frame(MAC_B, MAC_A))
                    await receive(da)
                if kind == "flr":
                    await a.pci.function_level_reset()
                elif kind == "d3":
                    await a.pci.set_power_state(3)
                    await a.pci.set_power_state(0)
                elif kind == "client":
                    await a.client.reset()
                else:
                    await a.pci.reset()
                assert not await a.pci.status()
                assert (await da.config()).mac == MAC_A
            stop.set()
        await da.start()
        with trio.move_on_after(0.05):
            while True:
                await da.receive()
        with trio.move_on_after(0.05):
            while True:
                await db.receive()
        await ping_pong(da, db)


async def test_ring_reset_of_each_queue_in_mid_traffic() -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        for _ in range(3):
            for index in (0, 1, 2):
                await ping_pong(da, db)
                await da.reset_queue(index)
                await da.control.set_rx_mode("allmulti", True)
        await ping_pong(da, db)
        assert a.member.statistics().driver_errors == 0


async def test_bus_mastering_off_stops_the_queues() -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        await a.pci.config_write(0x04, 0x02, 2)
        await da.send(frame(MAC_B, MAC_A, b"held"))
        assert await nothing_comes(db)
        await a.pci.set_up()
        await da.kick(1)
        assert (await receive(db)).data[14:18] == b"held"


async def test_no_frame_moves_before_driver_ok() -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        ring_ready = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
        await a.pci.negotiate(da.features)
        assert await a.pci.status() == ring_ready
        await db.send(frame(MAC_A, MAC_B))
        await db.flush()
        assert not da.received()


async def test_the_configuration_window_reaches_the_registers() -> None:
    async with guests(*configs(MAC_A)) as (guest,):
        pci = guest.pci
        common = pci.common
        assert await pci.access_read(common.bar, common.offset + 18, 2) == 3
        await pci.access_write(common.bar, common.offset + 22, 1, 2)
        assert await pci.read(Register.QUEUE_SELECT) == 1
        assert await pci.access_read(common.bar, 1 << 20, 4) == 0
        assert await pci.access_read(3, 0, 4) == 0
        await pci.access_write(5, 0, 0xFFFF_FFFF, 4)
        driver = guest.driver()
        await driver.start()
        mac = await pci.access_read(common.bar, 0x2000, 4)
        assert mac.to_bytes(4, "little") == MAC_A[:4]


async def test_notification_data() -> None:
    members = configs(MAC_A, MAC_B, features_on=Feature.NOTIFICATION_DATA.mask)
    async with guests(*members) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        assert da.has(Feature.NOTIFICATION_DATA)
        await ping_pong(da, db, count=10)

"""Control commands, interrupts and changes of the link, as a guest's driver meets them."""

from __future__ import annotations

import struct
from functools import partial

import pytest
import trio

from tests.backends.member_rig import (
    BROADCAST,
    LONG,
    MAC_A,
    MAC_B,
    MAC_C,
    VERSION_1,
    configs,
    frame,
    guests,
    nothing_comes,
    ping_pong,
    receive,
    until,
    without,
)
from vfio_user_virtio.device import IrqAction, IrqRequest, VfioIrq
from vfio_user_virtio.testing.control_commands import RX_MODES, ControlRefused
from vfio_user_virtio.testing.net_driver import KNOWN_FEATURES
from vfio_user_virtio.testing.virtio_pci import Register
from vfio_user_virtio.virtio.features import Feature
from vfio_user_virtio.virtio.net_config import NetStatus

pytestmark = pytest.mark.usefixtures("engine")

# --- control commands ---------------------------------------------------------------------------


async def test_every_control_command_is_accepted() -> None:
    async with guests(*configs(MAC_A, queue_pairs=2)) as (guest,):
        driver = guest.driver(max_pairs=2)
        await driver.start()
        control = driver.control
        for mode in RX_MODES:
            await control.set_rx_mode(mode, True)
            await control.set_rx_mode(mode, False)
        await control.set_mac_table([MAC_B] * 3, [b"\x33\x33\0\0\0\1"])
        await control.set_mac_table([], [])
        await control.add_vlan(0)
        await control.add_vlan(4095)
        await control.remove_vlan(4095)
        await control.acknowledge_announcement()
        await control.set_pairs(1)
        await control.set_pairs(2)
        await control.set_offloads(0)
        await control.set_offloads(Feature.GUEST_CSUM.mask)
        await control.set_mac(MAC_C)
        assert (await driver.config()).mac == MAC_C


BAD_COMMANDS = [
    (0, 6, b"\1"),
    (0, 0, b""),
    (0, 0, b"\2"),
    (1, 0, b""),
    (1, 0, b"\1\0\0\0" + MAC_A),
    (1, 0, b"\xff\xff\xff\xff" + MAC_A),
    (1, 0, struct.pack("<I", 0) + struct.pack("<I", 0x2AAAAAAB)),
    (1, 1, MAC_B[:5]),
    (1, 2, MAC_B),
    (2, 0, b"\1"),
    (2, 0, b"\0\x10"),
    (2, 2, b"\1\0"),
    (3, 1, b""),
    (4, 0, b"\0\0"),
    (4, 0, b"\3\0"),
    (4, 0, b"\1"),
    (4, 1, bytes(100)),
    (5, 0, b"\xff" * 8),
    (5, 0, b"\0" * 7),
    (6, 0, bytes(8)),
    (9, 0, b""),
    (255, 255, bytes(64)),
]


async def test_every_bad_control_command_is_refused_and_changes_nothing() -> None:
    async with guests(*configs(MAC_A, MAC_B, queue_pairs=2)) as (a, b):
        da, db = a.driver(max_pairs=2), b.driver()
        await da.start()
        await db.start()
        before = await da.config()
        for command_class, command, data in BAD_COMMANDS:
            assert await da.command(command_class, command, data) == 1, (command_class, command)
        assert await da.raw_command(b"\0") == 1
        assert await da.raw_command(b"\0\0\1" + bytes(70_000)) in (0, 1)
        assert await da.config() == before
        await ping_pong(da, db)
        with pytest.raises(ControlRefused, match="MQ command 0 with 03 00"):
            await da.control.set_pairs(3)


async def test_commands_that_were_not_negotiated_are_refused() -> None:
    async with guests(*configs(MAC_A)) as (guest,):
        driver = guest.driver(features=VERSION_1 | Feature.CTRL_VQ.mask)
        await driver.start()
        for command_class, command, data in (
            (0, 0, b"\1"),
            (0, 2, b"\1"),
            (1, 0, bytes(8)),
            (1, 1, MAC_B),
            (2, 0, b"\1\0"),
            (3, 0, b""),
            (4, 0, b"\1\0"),
            (5, 0, bytes(8)),
        ):
            assert await driver.command(command_class, command, data) == 1


async def test_a_command_with_no_room_for_the_answer_or_with_much() -> None:
    async with guests(*configs(MAC_A)) as (guest,):
        driver = guest.driver()
        await driver.start()
        with trio.move_on_after(0.2):
            await driver.raw_command(b"\0\0\1", room=0)
        await driver.start()
        assert await driver.raw_command(b"\0\0\1", room=100) == 0


async def test_receive_modes_and_filters() -> None:
    group = bytes.fromhex("333300000001")
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        control = db.control

        async def passes(to: bytes) -> bool:
            await da.send(frame(to, MAC_A))
            return not await nothing_comes(db)

        assert await passes(MAC_C)  # a device begins promiscuous
        await control.set_rx_mode("promisc", False)
        assert await passes(MAC_B)
        assert await passes(BROADCAST)
        assert not await passes(MAC_C)
        await control.set_rx_mode("promisc", True)
        assert await passes(MAC_C)
        await control.set_rx_mode("promisc", False)
        assert not await passes(MAC_C)
        await control.set_mac_table([MAC_C], [group])
        assert await passes(MAC_C)
        assert await passes(group)
        await control.set_mac_table([], [])
        assert not await passes(group)
        await control.set_rx_mode("allmulti", True)
        assert await passes(group)
        await control.set_rx_mode("nobcast", True)
        assert not await passes(BROADCAST)
        await control.set_mac(MAC_C)
        assert await passes(MAC_C)
        assert not await passes(MAC_B)


async def test_vlan_filter() -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()

        async def passes(vlan: int) -> bool:
            tagged = MAC_B + MAC_A + b"\x81\x00" + struct.pack(">H", vlan) + b"\x88\xb5" + bytes(50)
            await da.send(tagged)
            return not await nothing_comes(db)

        assert await passes(5)
        await db.control.set_rx_mode("promisc", False)
        assert not await passes(5)
        await db.control.add_vlan(5)
        assert await passes(5)
        assert not await passes(6)
        await db.control.remove_vlan(5)
        assert not await passes(5)
        await da.send(frame(MAC_B, MAC_A, b"untagged"))
        assert (await receive(db)).data[14:22] == b"untagged"


# --- interrupts ---------------------------------------------------------------------------------


async def test_intx() -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(msix=False), b.driver(msix=False)
        await da.start()
        await db.start()
        await ping_pong(da, db, count=10)
        await da.control.set_rx_mode("allmulti", True)
        await da.flush()
        assert await a.pci.isr() == 0


async def test_a_queue_without_a_vector_never_interrupts() -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        await b.pci.write(Register.QUEUE_SELECT, 0)
        await b.pci.write(Register.QUEUE_MSIX_VECTOR, 0xFFFF)
        await da.send(frame(MAC_B, MAC_A))
        await da.flush()
        await until(db.received)
        assert not db.interrupt(0).poll()


async def test_an_eventfd_may_be_exchanged_and_taken_away() -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        for _ in range(3):
            await b.client.set_irqs(IrqRequest(VfioIrq.MSIX, 1, 1, IrqAction.TRIGGER, eventfds=()))
            db.queue(0).enable_interrupts()
            await da.send(frame(MAC_B, MAC_A))
            await until(db.received)
            assert not db.interrupt(0).poll()
            eventfd = db.interrupt(0).fd
            await b.client.set_irqs(
                IrqRequest(VfioIrq.MSIX, 1, 1, IrqAction.TRIGGER, eventfds=(eventfd,))
            )
            await receive(db)
            assert db.interrupt(0).poll()  # what was pending comes with the new eventfd


async def test_no_interrupt_where_none_is_asked_for() -> None:
    for features in (KNOWN_FEATURES, without(Feature.EVENT_IDX)):
        async with guests(*configs(MAC_A, MAC_B)) as (a, b):
            da, db = a.driver(features=features), b.driver(features=features)
            await da.start()
            await db.start()
            db.queue(0).disable_interrupts()
            for _ in range(10):
                await da.send(frame(MAC_B, MAC_A))
            await da.flush()
            await until(partial(lambda queue: queue.used_waiting == 10, db.queue(0)))
            assert not db.interrupt(0).poll()


async def test_a_changed_link_is_announced_with_an_interrupt() -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        generation = await a.pci.read(Register.CONFIG_GENERATION)
        a.member.set_link(False)
        with trio.fail_after(LONG):
            await da.config_changed()
        assert not (await da.config()).status & NetStatus.LINK_UP
        assert await a.pci.read(Register.CONFIG_GENERATION) != generation
        await db.send(frame(MAC_A, MAC_B))
        assert await nothing_comes(da)
        a.member.set_link(True)
        with trio.fail_after(LONG):
            await da.config_changed()
        await ping_pong(da, db)


async def test_announce() -> None:
    async with guests(*configs(MAC_A)) as (guest,):
        driver = guest.driver()
        await driver.start()
        guest.member.announce()
        with trio.fail_after(LONG):
            await driver.config_changed()
        assert (await driver.config()).status & NetStatus.ANNOUNCE
        await driver.control.acknowledge_announcement()
        assert not (await driver.config()).status & NetStatus.ANNOUNCE

"""A guest that moves in the middle of what it tells its device, and how what it told fares."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.backends.member_rig import LONG, MAC_A, until
from tests.migration.guest_move_network import MAC_HOST
from tests.migration.guest_move_rig import rig
from vfio_user_virtio.testing.net_header import F_NEEDS_CSUM, GSO_TCPV4, NetHeader
from vfio_user_virtio.virtio.features import Feature
from vfio_user_virtio.virtio.net_config import NetStatus

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.migration.guest_move_rig import Rig
    from vfio_user_virtio.testing.control_commands import ControlCommands

pytestmark = pytest.mark.usefixtures("engine")

MAC_NEW = bytes.fromhex("0200000000aa")
UNICAST = [bytes.fromhex(f"02000000010{n}") for n in range(4)]
MULTICAST = [bytes.fromhex(f"03000000010{n}") for n in range(3)]


# --- a command that is posted and not answered ----------------------------------------------------

COMMANDS: dict[str, Callable[[ControlCommands], Awaitable[None]]] = {
    "RX": lambda control: control.set_rx_mode("allmulti", True),
    "MAC_TABLE_SET": lambda control: control.set_mac_table(UNICAST, MULTICAST),
    "MAC_ADDR_SET": lambda control: control.set_mac(MAC_A),
    "VLAN_ADD": lambda control: control.add_vlan(7),
    "MQ": lambda control: control.set_pairs(2),
    "GUEST_OFFLOADS": lambda control: control.set_offloads(Feature.GUEST_CSUM.mask),
}


@pytest.mark.parametrize("precopy", [True, False], ids=["precopy", "stop-copy"])
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
async def test_posted_before_the_move(
    command: Callable[[ControlCommands], Awaitable[None]], precopy: bool
) -> None:
    """The guest is paused between its command and the kick: the target finds it in the ring."""
    async with rig(member={"queue_pairs": 2}, max_pairs=2) as made:
        await made.start()
        ring = made.driver.queue(made.driver.control_index).ring
        before = ring.used_idx
        done = trio.Event()

        async def send() -> None:
            await command(made.driver.control)
            done.set()

        await made.guest.client.pause()
        made.nursery.start_soon(send)
        with trio.fail_after(LONG):
            while ring.avail_idx == before:
                await trio.lowlevel.checkpoint()
        assert ring.used_idx == before
        await made.move(precopy=precopy)
        with trio.fail_after(LONG):
            await done.wait()
        assert ring.used_idx == ring.avail_idx == before + 1
        await made.traffic.goes_on("b")
        await made.finish()


async def test_posted_while_neither_device_runs() -> None:
    """What the guest adds to its rings then has no kick of a device that saw it."""
    async with rig() as made:
        await made.start()
        queue = made.driver.queue(made.driver.control_index)
        done = trio.Event()

        async def send() -> None:
            await made.driver.control.add_vlan(9)
            done.set()

        await made.move(while_stopped=lambda: made.nursery.start_soon(send))
        with trio.fail_after(LONG):
            await done.wait()
        assert made.members["b"].state.filter.vlans == {9}
        assert queue.ring.used_idx == queue.ring.avail_idx == 1
        await made.finish()


# --- a sequence of commands -----------------------------------------------------------------------


@pytest.mark.parametrize("remote", [False, True], ids=["mapped", "messages"])
async def test_commands_all_the_time(remote: bool) -> None:
    """Each is carried out once, on whichever device; the last state is the sum of all."""
    async with rig(remote=remote, twin=True, ram_size=2 << 20) as made:
        await made.start()
        control = made.driver.control
        ring = made.driver.queue(made.driver.control_index).ring
        ends, ended = trio.Event(), trio.Event()
        vlans: set[int] = set()
        count = 0

        async def configure() -> None:
            nonlocal count
            while not ends.is_set():
                step = count // 3
                await control.set_mac_table(UNICAST[: step % 5], MULTICAST[: step % 4])
                await control.add_vlan(step % 4096)
                vlans.add(step % 4096)
                if step >= 5:
                    await control.remove_vlan(step - 5)
                    vlans.discard(step - 5)
                else:
                    await control.set_rx_mode("allmulti", bool(step % 2))
                count += 3
            ended.set()

        made.nursery.start_soon(configure)
        for number in range(4 if remote else 10):
            await made.move(precopy=bool(number % 3))
            await made.traffic.goes_on("ba"[number % 2])
        await until(lambda: count >= 20)
        ends.set()
        with trio.fail_after(LONG):
            await ended.wait()
        rules = made.members[made.here].state.filter
        step = count // 3 - 1
        assert step >= 5
        assert rules.unicast == frozenset(UNICAST[: step % 5])
        assert rules.multicast == frozenset(MULTICAST[: step % 4])
        assert rules.vlans == vlans
        assert rules.allmulti == (4 % 2 == 1)
        assert ring.used_idx == ring.avail_idx == count & 0xFFFF
        await made.finish()


# --- what has been set is so at the new place -----------------------------------------------------


async def arrives(made: Rig, to: bytes, tag: int | None = None) -> bool:
    """Whether a frame from the host passes the filters; one that does for sure comes behind it."""
    tagged = b"" if tag is None else b"\x81\x00" + tag.to_bytes(2, "big")
    await made.host.send(MAC_A, to + MAC_HOST + tagged + b"\x88\xb5" + b"is it?".ljust(60))
    marker = b"\xff" * 6 + MAC_HOST + b"\x88\xb5" + b"marker".ljust(60)
    await made.host.send(MAC_A, marker)
    with trio.fail_after(LONG):
        first = (await made.driver.receive()).data
        if first == marker:
            return False
        assert b"is it?" in first
        assert (await made.driver.receive()).data == marker
    return True


async def test_filters() -> None:
    async with rig() as made:
        driver, control = made.driver, made.driver.control
        await driver.start()
        await driver.send(b"\xff" * 6 + MAC_A + b"\x88\xb5" + bytes(50))
        await made.host.news.until(lambda: made.host.is_behind(MAC_A, "a"), "a")
        await control.set_rx_mode("promisc", False)
        await control.set_mac_table(UNICAST[:2], MULTICAST[:1])
        for vlan in (5, 4000):
            await control.add_vlan(vlan)

        async def check(own: bytes) -> None:
            assert await arrives(made, own)
            assert [await arrives(made, to) for to in UNICAST] == [True, True, False, False]
            assert [await arrives(made, to) for to in MULTICAST] == [True, False, False]
            assert [await arrives(made, own, tag) for tag in (4, 5, 4000)] == [False, True, True]

        await check(MAC_A)
        for place in "ba":
            await made.move()
            await made.host.news.until(lambda: made.host.announced[-1:] == [made.here], place)
            await check(MAC_A)
        await control.set_mac(MAC_NEW)
        await made.move()
        await made.host.news.until(lambda: made.host.is_behind(MAC_NEW, "b"), "the new address")
        assert (await driver.config()).mac == MAC_NEW
        made.host.where[MAC_A] = "b"
        await check(MAC_NEW)
        assert not await arrives(made, MAC_A)
        await control.set_rx_mode("promisc", True)
        await made.move()
        await made.host.news.until(lambda: made.host.is_behind(MAC_NEW, "a"), "and again")
        made.host.where[MAC_A] = "a"
        assert await arrives(made, MAC_A)


async def test_the_driver_is_asked_to_announce_itself() -> None:
    async with rig() as made:
        await made.start()
        driver = made.driver
        interrupt = driver._config_interrupt
        assert interrupt is not None
        for place in "ba":
            assert (await driver.config()).status == NetStatus.LINK_UP
            seen = interrupt.count
            await made.move()
            with trio.fail_after(LONG):
                await driver.config_changed(seen)
            assert (await driver.config()).status == NetStatus.LINK_UP | NetStatus.ANNOUNCE
            await driver.control.acknowledge_announcement()
            await made.traffic.goes_on(place)
        await made.finish()


@pytest.mark.parametrize("acknowledged", [True, False])
async def test_an_announcement_that_is_under_way(acknowledged: bool) -> None:
    """Asked for before the move, acknowledged never or after."""
    async with rig() as made:
        await made.start()
        made.members["a"].announce()
        await made.move()
        if acknowledged:
            await made.driver.control.acknowledge_announcement()
            assert (await made.driver.config()).status == NetStatus.LINK_UP
        await made.move()
        assert (await made.driver.config()).status & NetStatus.ANNOUNCE
        await made.finish()


async def test_offloads_of_what_is_sent() -> None:
    """A frame to be segmented and summed, before and after."""
    async with rig() as made:
        driver, host = made.driver, made.host
        await driver.start()
        payload = bytes(range(250)) * 12
        header = NetHeader(F_NEEDS_CSUM, GSO_TCPV4, 54, 1000, 34, 16)
        ip = bytes.fromhex("450000000000400040060000 0a000001 0a000002")
        ip = ip[:2] + (40 + len(payload)).to_bytes(2, "big") + ip[4:]
        tcp = bytes.fromhex("1000 2000 00000000 00000000 5018 0100 0000 0000")
        whole = MAC_HOST + MAC_A + b"\x08\x00" + ip + tcp + payload
        for place in "aba":
            if made.here != place:
                await made.move()
            host.others.clear()
            await driver.send(whole, header)
            await host.news.until(lambda: len(host.others) == 3, "three segments")
            assert b"".join(segment[54:] for segment in host.others) == payload
            sequence = [int.from_bytes(segment[38:42], "big") for segment in host.others]
            assert sequence == [0, 1000, 2000]


@pytest.mark.parametrize("offloads", [0, Feature.GUEST_CSUM.mask])
async def test_offloads_of_what_is_received(offloads: int) -> None:
    async with rig() as made:
        await made.start()
        await made.driver.control.set_offloads(offloads)
        for place in "ba":
            await made.move()
            assert made.members[place].state.guest_offloads == offloads
            await made.traffic.goes_on(place)
        await made.finish()

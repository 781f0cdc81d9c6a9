"""A guest that goes on where another member stopped: by its parts, in the same memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from tests.backends.member_rig import (
    MAC_A,
    MAC_B,
    frame,
    nothing_comes,
    ping_pong,
    receive,
    receive_on_any,
    until,
)
from tests.backends.migration_rig import rig
from vfio_user_virtio.testing.virtio_pci import Register
from vfio_user_virtio.virtio.common_config import Status
from vfio_user_virtio.virtio.features import Feature
from vfio_user_virtio.virtio.net_config import NetStatus

if TYPE_CHECKING:
    from vfio_user_virtio.testing.net_driver import NetDriver


async def numbered(sender: NetDriver, to: bytes, of: bytes, count: int) -> None:
    for number in range(count):
        await sender.send(frame(to, of, number.to_bytes(4, "big")))


def number_of(data: bytes) -> int:
    return int.from_bytes(data[14:18], "big")


@pytest.mark.parametrize("remote", [False, True])
async def test_a_guest_that_moves_does_not_notice(remote: bool) -> None:
    async with rig(remote=remote) as made:
        await ping_pong(made.driver, made.peer)
        for _ in range(4):
            await made.migrate()
            assert made.here.member.running
            assert not made.there.member.running
            await ping_pong(made.driver, made.peer)


async def test_there_and_back_again_many_times_under_traffic() -> None:
    count = 5000
    async with rig() as made:
        got: list[int] = []

        async def take() -> None:
            while True:
                got.append(number_of((await made.driver.receive()).data))

        async def move(times: int) -> None:
            for _ in range(times):
                await made.migrate()
                for _ in range(5):
                    await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            async with trio.open_nursery() as traffic:
                traffic.start_soon(numbered, made.driver, MAC_B, MAC_A, count)
                traffic.start_soon(numbered, made.peer, MAC_A, MAC_B, count)
                traffic.start_soon(move, 100)
                for number in range(count):
                    assert number_of((await receive(made.peer)).data) == number
            await made.peer.flush()
            places = (made.here.member, made.there.member)
            switch = made.here.member._switch
            delivered = sum(switch.statistics(member).frames_out for member in places)
            await until(lambda: len(got) == delivered)
            nursery.cancel_scope.cancel()
        assert got == sorted(set(got))
        assert [member.statistics().missed for member in places] == [0, 0]
        assert [member.statistics().driver_errors for member in places] == [0, 0]
        assert await nothing_comes(made.peer)
        await ping_pong(made.driver, made.peer)


async def test_all_that_the_driver_has_set_moves() -> None:
    mac = bytes.fromhex("0200000000aa")
    async with rig(queue_pairs=4, max_pairs=3) as made:
        driver, control = made.driver, made.driver.control
        for mode in ("promisc", "nobcast"):
            await control.set_rx_mode(mode, mode == "nobcast")
        await control.set_mac_table([b"\2abcde", b"\2fghij"], [b"\3klmno"])
        await control.set_mac(mac)
        for vlan in (0, 7, 4095):
            await control.add_vlan(vlan)
        await control.set_offloads(Feature.GUEST_CSUM.mask)
        made.here.member.announce()
        source = made.here.member
        state, common = source.state, source.function.common.state
        config = await driver.config()
        await made.migrate()
        target = made.here.member
        assert target is not source
        assert target.state == state
        restored = attrs.evolve(target.function.common.state, queue_select=common.queue_select)
        assert restored == common
        assert await driver.config() == config
        assert (config.mac, config.status) == (mac, NetStatus.LINK_UP | NetStatus.ANNOUNCE)
        assert target.steering.pairs == 3
        assert (await made.here.pci.status()) & Status.DRIVER_OK
        assert source.state.filter.mac == MAC_A, "it has been reset"
        await made.peer.send(frame(mac, MAC_B, b"to the new address"))
        assert [got.data for got in await receive_on_any(driver)] == [
            frame(mac, MAC_B, b"to the new address")
        ]
        await made.peer.send(frame(MAC_A, MAC_B, b"to the old one"))
        assert await nothing_comes(driver)
        await control.acknowledge_announcement()
        assert (await driver.config()).status == NetStatus.LINK_UP


async def test_without_our_private_state_offloads_are_those_negotiated() -> None:
    async with rig() as made:
        await made.driver.control.set_offloads(0)
        made.here.member.announce()
        await made.migrate(private=False)
        state = made.here.member.state
        assert state.guest_offloads == state.features & (
            Feature.GUEST_CSUM.mask
            | Feature.GUEST_TSO4.mask
            | Feature.GUEST_TSO6.mask
            | Feature.GUEST_ECN.mask
            | Feature.GUEST_USO4.mask
            | Feature.GUEST_USO6.mask
        )
        await ping_pong(made.driver, made.peer)


@pytest.mark.parametrize(
    "missing",
    [
        Feature.EVENT_IDX.mask,
        Feature.INDIRECT_DESC.mask,
        Feature.MRG_RXBUF.mask,
        Feature.CTRL_VQ.mask,
        Feature.EVENT_IDX.mask | Feature.MRG_RXBUF.mask | Feature.CTRL_VQ.mask,
    ],
)
async def test_with_fewer_features(missing: int) -> None:
    async with rig(start=False) as made:
        made.driver._wanted &= ~missing
        await made.driver.start()
        await made.peer.start()
        for _ in range(2):
            await ping_pong(made.driver, made.peer)
            await made.migrate()
        await ping_pong(made.driver, made.peer)


async def test_with_eight_queue_pairs() -> None:
    async with rig(queue_pairs=8, max_pairs=8) as made:
        for _ in range(2):
            for pair in range(8):
                await made.driver.send(frame(MAC_B, MAC_A, bytes((pair,))), pair=pair)
                assert (await receive(made.peer)).data == frame(MAC_B, MAC_A, bytes((pair,)))
                await made.peer.send(frame(MAC_A, MAC_B, bytes((pair,))))
                await receive_on_any(made.driver)
            await made.migrate()
        await made.driver.control.set_pairs(1)


async def test_with_no_room_for_frames_that_come() -> None:
    async with rig(rx_buffers=2) as made:
        await numbered(made.peer, MAC_A, MAC_B, 2)
        await made.peer.flush()
        await made.migrate()
        for number in range(2):
            assert number_of((await receive(made.driver)).data) == number
        await ping_pong(made.driver, made.peer)


async def test_before_the_driver_is_ready() -> None:
    async with rig(start=False) as made:
        pci = made.here.pci
        await pci.reset()
        await pci.set_status(Status.ACKNOWLEDGE | Status.DRIVER)
        await pci.write(Register.DRIVER_FEATURE_SELECT, 1)
        await pci.write(Register.DRIVER_FEATURE, 0xDEAD_BEEF)
        await pci.write(Register.QUEUE_SELECT, 1)
        await pci.write(Register.QUEUE_SIZE, 64)
        member, target = made.here.member, made.there.member
        await member.mode.stop()
        await target.mode.stop()
        target.mode.set_parts_untrusted(member.mode.parts())
        target.mode.resume()
        assert attrs.asdict(target.function.common.state) == attrs.asdict(
            member.function.common.state
        )
        pci = made.there.pci
        assert await pci.read(Register.QUEUE_SIZE) == 64
        assert await pci.read(Register.DRIVER_FEATURE) == 0xDEAD_BEEF
        made.driver.pci = pci
        await made.driver.start()
        await made.peer.start()
        await ping_pong(made.driver, made.peer)


async def test_a_move_that_is_given_up() -> None:
    async with rig() as made:
        source, target = made.here.member, made.there.member
        await source.mode.stop()
        await target.mode.stop()
        target.mode.set_parts_untrusted(source.mode.parts())
        source.mode.resume()
        await ping_pong(made.driver, made.peer)
        await made.there.client.reset()
        await made.there.pci.set_up()
        await made.migrate()
        await ping_pong(made.driver, made.peer)


async def test_snapshots_of_a_running_member_make_no_difference() -> None:
    async with rig() as made:
        target = made.there.member
        assert await target.mode.stop()
        for number in range(5):
            target.mode.set_parts_untrusted(made.here.member.mode.parts())
            await made.driver.control.add_vlan(number)
            await ping_pong(made.driver, made.peer)
        await made.migrate()
        assert target.state.filter.vlans == set(range(5))
        await ping_pong(made.driver, made.peer)


async def test_a_queue_that_lies_in_the_wrong_place_is_the_drivers_error() -> None:
    async with rig() as made:
        source = made.here.member
        await source.mode.stop()
        queue = source.function.common.state.queues[1]
        made.driver.ram.view(queue.device + 2, 2)[:] = b"\x34\x12"
        source.mode.resume()
        await made.driver.kick(1)
        await until(lambda: source.statistics().driver_errors == 1)
        assert await made.here.pci.status() & Status.DEVICE_NEEDS_RESET
        await made.driver.start()
        await ping_pong(made.driver, made.peer)

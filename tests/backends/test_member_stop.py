"""STOPPED mode: what a member leaves alone, what it goes on doing, and that nothing gets lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from tests.backends.member_rig import (
    LONG,
    MAC_A,
    MAC_B,
    configs,
    frame,
    guests,
    nothing_comes,
    ping_pong,
    receive,
    until,
)
from vfio_user_virtio.migration.private_record import PrivateState
from vfio_user_virtio.testing.virtio_pci import Register
from vfio_user_virtio.virtio.features import Feature
from vfio_user_virtio.virtio.net_config import NetStatus
from vfio_user_virtio.virtio.net_parts import vlan_part
from vfio_user_virtio.virtio.parts import PartsError

if TYPE_CHECKING:
    from tests.backends.member_rig import Guest
    from vfio_user_virtio.testing.net_driver import NetDriver


async def settle(driver: NetDriver) -> None:
    """See all interrupts that are under way."""
    await trio.testing.wait_all_tasks_blocked()
    for index in (0, 1, driver.control_index):
        driver.interrupt(index).poll()


@pytest.mark.parametrize("remote", [False, True])
async def test_a_stopped_member_touches_nothing_but_takes_register_writes(remote: bool) -> None:
    async with guests(*configs(MAC_A, MAC_B), remote=remote) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        await ping_pong(da, db)
        assert await a.member.mode.stop()
        assert not a.member.running
        assert a.member.up, "frames wait"
        await settle(da)
        counts = [da.interrupt(index).count for index in (0, 1, da.control_index)]
        signalled = a.member.function.interrupts.statistics()
        sent = frame(MAC_B, MAC_A, b"while stopped")
        await da.send(sent)
        for index in (0, 1, da.control_index):
            await da.kick(index)
        memory = bytes(a.ram.view(a.ram.iova, a.ram.size))
        await db.send(frame(MAC_A, MAC_B, b"to nobody"))
        a.member.set_link(False)
        await db.flush()
        a.member.set_link(True)
        await a.pci.write(Register.QUEUE_SELECT, 2)
        assert await a.pci.read(Register.QUEUE_SELECT) == 2
        await trio.testing.wait_all_tasks_blocked()
        assert bytes(a.ram.view(a.ram.iova, a.ram.size)) == memory
        assert a.member.function.interrupts.statistics() == signalled
        assert [da.interrupt(index).count for index in (0, 1, da.control_index)] == counts
        a.member.mode.resume()
        assert (await receive(db)).data == sent
        await ping_pong(da, db)


@pytest.mark.parametrize("remote", [False, True])
async def test_frames_wait_for_a_stopped_member(remote: bool) -> None:
    async with guests(*configs(MAC_A, MAC_B), remote=remote) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        assert await a.member.mode.stop()
        sent = frame(MAC_A, MAC_B, b"while stopped")
        await db.send(sent)
        await trio.testing.wait_all_tasks_blocked()
        a.member.mode.resume()
        assert (await receive(da)).data == sent
        assert await a.member.mode.stop()
        await db.send(sent)
        await db.flush()
        a.member.mode.resume()
        await ping_pong(da, db)


@pytest.mark.parametrize("msix", [True, False])
async def test_resume_interrupts_for_everything(msix: bool) -> None:
    async with guests(*configs(MAC_A)) as (a,):
        driver = a.driver(msix=msix)
        await driver.start()
        await a.member.mode.stop()
        await settle(driver)
        indices = (0, 1, driver.control_index)
        seen = [driver.interrupt(index).count for index in indices]
        a.member.mode.resume()
        with trio.fail_after(LONG):
            for index, count in zip(indices, seen, strict=True):
                await driver.interrupt(index).wait(count)
        if msix:
            with trio.fail_after(LONG):
                await driver.config_changed(0)


async def test_no_interrupt_before_the_driver_is_ready() -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        await a.member.mode.stop()
        a.member.mode.resume()
        statistics = a.member.function.interrupts.statistics()
        assert (statistics.signalled, statistics.pended) == (0, 0)
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        await ping_pong(da, db)


async def test_interrupts_wait_for_bus_mastering() -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        await a.member.mode.stop()
        await a.pci.config_write(4, 2, 2)
        a.member.mode.resume()
        await settle(da)
        seen = da.interrupt(0).count
        await a.pci.set_up()
        with trio.fail_after(LONG):
            await da.interrupt(0).wait(seen)
        await ping_pong(da, db)


@pytest.mark.parametrize("kind", ["flr", "client", "d3"])
async def test_a_reset_of_the_function_leaves_stopped_mode(kind: str) -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        await a.member.mode.stop()
        a.member.mode.set_parts_untrusted([vlan_part((9,))])
        if kind == "flr":
            await a.pci.function_level_reset()
        elif kind == "client":
            await a.client.reset()
        else:
            await a.pci.set_power_state(3)
            await a.pci.set_power_state(0)
        assert not a.member.mode.stopped
        assert vlan_part(()) in a.member.mode.parts()
        await da.start()
        await ping_pong(da, db)


async def test_a_reset_of_the_device_does_not() -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver()
        await db.start()
        await da.start()
        await a.member.mode.stop()
        a.member.mode.set_parts_untrusted([vlan_part((9,))])
        await a.pci.reset()
        assert a.member.mode.stopped
        assert vlan_part(()) in a.member.mode.parts(), "parts are at their defaults"
        await da.start()
        await da.send(frame(MAC_B, MAC_A))
        assert await nothing_comes(db)
        a.member.mode.resume()
        await receive(db)
        await ping_pong(da, db)


async def test_a_queue_reset_while_stopped_starts_anew() -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        await ping_pong(da, db)
        await a.member.mode.stop()
        for index in (0, 1):
            await da.reset_queue(index)
        a.member.mode.resume()
        await ping_pong(da, db)


async def numbered(sender: NetDriver, to: bytes, of: bytes, count: int) -> None:
    for number in range(count):
        await sender.send(frame(to, of, number.to_bytes(4, "big")))


def number_of(data: bytes) -> int:
    return int.from_bytes(data[14:18], "big")


async def stop_and_go(guest: Guest, times: int) -> None:
    for _ in range(times):
        assert await guest.member.mode.stop()
        await trio.lowlevel.checkpoint()
        guest.member.mode.resume()
        for _ in range(3):
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("remote", [False, True])
async def test_nothing_sent_is_lost_doubled_or_reordered(remote: bool) -> None:
    count = 200 if remote else 2000
    async with guests(*configs(MAC_A, MAC_B), remote=remote) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(numbered, da, MAC_B, MAC_A, count)
            nursery.start_soon(stop_and_go, a, 50)
            for number in range(count):
                assert number_of((await receive(db)).data) == number
        assert await nothing_comes(db)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("buffers", [2, 64])
async def test_what_the_device_took_for_the_driver_comes_once_and_in_order(
    remote: bool, buffers: int
) -> None:
    count = 200 if remote else 2000
    async with guests(*configs(MAC_A, MAC_B), remote=remote) as (a, b):
        da, db = a.driver(rx_buffers=buffers), b.driver()
        await da.start()
        await db.start()
        got: list[int] = []

        async def take() -> None:
            while True:
                got.append(number_of((await da.receive()).data))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            async with trio.open_nursery() as traffic:
                traffic.start_soon(numbered, db, MAC_A, MAC_B, count)
                traffic.start_soon(stop_and_go, a, 50)
            await db.flush()
            out = a.member._switch.statistics(a.member).frames_out
            await until(lambda: len(got) == out)
            nursery.cancel_scope.cancel()
        assert got == sorted(set(got))
        assert a.member.statistics().missed == 0


async def test_control_commands_while_stopped_wait() -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da = a.driver()
        await da.start()
        await a.member.mode.stop()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(da.control.add_vlan, 5)
            await trio.testing.wait_all_tasks_blocked()
            assert a.member.state.filter.vlans == set()
            a.member.mode.resume()
        assert a.member.state.filter.vlans == {5}
        assert not b.member.mode.stopped


async def test_a_lost_client_while_stopped() -> None:
    async with guests(*configs(MAC_A)) as (a,):
        await a.driver().start()
        await a.member.mode.stop()
    assert a.member.mode.stopped
    parts = a.member.mode.parts()
    a.member.mode.resume()
    assert a.member.mode.parts() == parts
    assert not a.member.running


# --- frames that the device holds -----------------------------------------------------------------


def hold(guest: Guest, data: bytes) -> None:
    """Have the member take a frame as an uplink gives it, in whatever room there is."""
    room = guest.member.reserve()
    assert room is not None
    whole = bytes(12) + data
    rest = whole
    for view in room:
        view[: len(rest)] = rest[: len(view)]
        rest = rest[len(view) :]
    guest.member.commit(len(whole))
    guest.member.flush()


async def test_a_held_frame_outlives_a_stop() -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(rx_buffers=1, rx_buffer_size=2048), b.driver()
        await da.start()
        await db.start()
        held = frame(MAC_A, MAC_B, b"held", size=3000)
        hold(a, held)
        await a.member.mode.stop()
        a.member.mode.resume()
        assert await nothing_comes(da)
        await da.post(buffers=2)
        await da.kick(0)
        await db.send(frame(MAC_A, MAC_B, b"after"))
        assert (await receive(da)).data == held
        assert (await receive(da)).data == frame(MAC_A, MAC_B, b"after")


async def test_a_held_frame_is_delivered_before_a_stop_if_there_is_room() -> None:
    async with guests(*configs(MAC_A)) as (a,):
        driver = a.driver(rx_buffers=1, rx_buffer_size=2048)
        await driver.start()
        held = frame(MAC_A, MAC_B, b"held", size=3000)
        hold(a, held)
        await driver.post(buffers=2)
        assert await a.member.mode.stop()
        assert (await receive(driver)).data == held


async def test_a_held_frame_that_a_reset_drops_is_counted() -> None:
    async with guests(*configs(MAC_A)) as (a,):
        driver = a.driver(rx_buffers=1, rx_buffer_size=2048)
        await driver.start()
        hold(a, frame(MAC_A, MAC_B, size=3000))
        await a.member.mode.stop()
        await a.client.reset()
        assert a.member.statistics().missed == 1


async def test_a_backlog_of_the_slow_service_outlives_a_stop() -> None:
    async with guests(*configs(MAC_A, MAC_B), remote=True) as (a, b):
        da, db = a.driver(rx_buffers=0), b.driver()
        await da.start()
        await db.start()
        await numbered(db, MAC_A, MAC_B, 5)
        await db.flush()
        for _ in range(2):
            assert await a.member.mode.stop()
            a.member.mode.resume()
        await da.post(buffers=8)
        for number in range(5):
            assert number_of((await receive(da)).data) == number


# --- a client that does not answer ----------------------------------------------------------------


class StalledAccess:
    """Guest memory whose accesses wait for `gate`."""

    def __init__(self, guest: Guest) -> None:
        access = guest.member._queues.access
        assert access is not None
        self._access = access
        self.gate = trio.Event()
        self.waiting = False

    async def read(self, iova: int, size: int) -> bytes:
        self.waiting = True
        await self.gate.wait()
        return await self._access.read(iova, size)

    async def write(self, iova: int, data: bytes) -> None:
        self.waiting = True
        await self.gate.wait()
        await self._access.write(iova, data)


async def test_stop_waits_for_an_access_that_is_under_way() -> None:
    async with guests(*configs(MAC_A, MAC_B), remote=True) as (a, b):
        da, db = a.driver(), b.driver()
        stalled = StalledAccess(a)
        a.member._queues.access = stalled  # type: ignore[assignment]  # has what is used of it
        await db.start()
        await da.start()
        await until(lambda: stalled.waiting)
        done: list[bool] = []

        async def stop() -> None:
            done.append(await a.member.mode.stop())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop)
            await trio.testing.wait_all_tasks_blocked()
            assert a.member.mode.stopping
            assert not a.member.up
            assert await a.member.mode.stop() is False, "one is under way"
            assert not done
            stalled.gate.set()
        assert done == [True]
        a.member.mode.resume()
        await ping_pong(da, db)


async def test_a_stop_that_is_cancelled() -> None:
    async with guests(*configs(MAC_A, MAC_B), remote=True) as (a, b):
        da, db = a.driver(), b.driver()
        stalled = StalledAccess(a)
        a.member._queues.access = stalled  # type: ignore[assignment]  # has what is used of it
        await db.start()
        await da.start()
        await until(lambda: stalled.waiting)
        with trio.move_on_after(0.01) as scope:
            await a.member.mode.stop()
        assert scope.cancelled_caught
        assert a.member.up
        stalled.gate.set()
        await ping_pong(da, db)


# --- what parts lack ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("private", "message"),
    [
        (PrivateState(guest_offloads=1), "not offered"),
        (PrivateState(mac=b"12345"), "not 6"),
        (PrivateState(config_generation=256), "0 to 255"),
        (PrivateState(isr=4), "0 to 3"),
    ],
)
async def test_private_state_that_does_not_fit(private: PrivateState, message: str) -> None:
    async with guests(*configs(MAC_A)) as (a,):
        with pytest.raises(PartsError, match="stop it first"):
            a.member.mode.set_private_state_untrusted(PrivateState())
        with pytest.raises(PartsError, match="stop it first"):
            a.member.mode.set_parts_untrusted([])
        await a.member.mode.stop()
        before = a.member.mode.private_state()
        with pytest.raises(PartsError, match=message):
            a.member.mode.set_private_state_untrusted(private)
        assert a.member.mode.private_state() == before


async def test_private_state_takes_effect_at_resume() -> None:
    async with guests(*configs(MAC_A)) as (a,):
        driver = a.driver()
        await driver.start()
        await a.member.mode.stop()
        before = a.member.mode.private_state()
        assert before.status == NetStatus.LINK_UP
        wanted = PrivateState(
            Feature.GUEST_CSUM.mask, MAC_B, NetStatus.LINK_UP | NetStatus.ANNOUNCE, 77, 1
        )
        a.member.mode.set_private_state_untrusted(wanted)
        assert a.member.mode.private_state() == wanted
        assert a.member.state.filter.mac == MAC_A
        a.member.mode.resume()
        assert a.member.state.guest_offloads == Feature.GUEST_CSUM.mask
        assert await a.pci.read(Register.CONFIG_GENERATION) == 77
        config = await driver.config()
        assert (config.mac, config.status) == (MAC_B, wanted.status)
        assert await a.pci.isr() & 1
        await driver.control.acknowledge_announcement()
        assert (await driver.config()).status == NetStatus.LINK_UP
        await a.member.mode.stop()
        a.member.mode.set_private_state_untrusted(PrivateState())
        a.member.mode.resume()
        assert a.member.state.filter.mac == MAC_B

"""Dirty tracking of a member: its reports against what has become of the guest's memory."""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.backends.dirty_rig import PAGE, Watch, bits, pages_of, watch_guests
from tests.backends.member_rig import (
    BROADCAST,
    LONG,
    MAC_A,
    MAC_B,
    configs,
    frame,
    guests,
    ping_pong,
    receive,
    receive_on_any,
    until,
    without,
)
from tests.backends.test_member_uplink_side import come_in, wired
from vfio_user_virtio.device import LoggingReport, LoggingStart
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.memory.dirty_log import DirtyLog
from vfio_user_virtio.virtio.features import Feature

if TYPE_CHECKING:
    from tests.backends.member_rig import Guest
    from vfio_user_virtio.testing.net_driver import NetDriver

RAM = 2 << 20
STRANGER = bytes.fromhex("0200000000ff")
EVERYTHING = LoggingReport(0, 32 << 30, 1 << 20)


@pytest.fixture(autouse=True)
def _watched(monkeypatch: pytest.MonkeyPatch) -> None:
    watch_guests(monkeypatch)


async def filtered_frame(driver: NetDriver, sender: NetDriver) -> None:
    """A frame that is flooded to `driver`, which has not asked for it."""
    await driver.control.set_rx_mode("promisc", False)
    await sender.send(frame(STRANGER, MAC_B))
    await sender.flush()


@pytest.mark.parametrize(
    ("remote", "step"),
    [(False, None), (True, None), (False, PAGE)],
    ids=["mapped", "by messages", "page by page"],
)
@pytest.mark.parametrize(
    "lacks",
    [
        (),
        (Feature.MRG_RXBUF,),
        (Feature.EVENT_IDX,),
        (Feature.INDIRECT_DESC,),
        (Feature.MRG_RXBUF, Feature.EVENT_IDX, Feature.INDIRECT_DESC),
        (Feature.EVENT_IDX, Feature.INDIRECT_DESC),
    ],
    ids=lambda lacks: " ".join(f.name for f in lacks) or "all features",
)
async def test_reports_hold_what_was_written(
    lacks: tuple[Feature, ...], *, remote: bool, step: int | None
) -> None:
    members = configs(MAC_A, MAC_B)
    async with guests(*members, remote=remote, step=step, ram_size=RAM) as (a, b):
        here = a.driver(features=without(*lacks), rx_buffers=4)
        there = b.driver(features=without(*lacks), rx_buffers=4, segment=1000)
        await here.start()
        await there.start()
        watches = [Watch(a), Watch(b)]
        for watch in watches:
            assert watch.report() == set(), "nothing has happened yet"
        for size in (60, 1514, 60):
            await ping_pong(here, there, size=size)
            for watch in watches:
                assert watch.look()
                assert watch.report()
                assert watch.report() == set()
        await here.control.set_mac(MAC_A)
        assert watches[0].look(), "the answer, and the used ring"
        await here.control.add_vlan(5)
        assert watches[0].report()
        assert watches[1].report() == set()
        await filtered_frame(here, there)
        for watch in watches:
            watch.report()
        assert [watch.report() for watch in watches] == [set(), set()]


async def test_frames_spread_over_buffers_and_pages() -> None:
    """9000 bytes in buffers of 2 KiB that each have a page: five pages and a ring."""
    async with guests(*configs(MAC_A, MAC_B, mtu=9000), ram_size=RAM) as (a, b):
        here, there = a.driver(segment=700), b.driver(segment=700)
        await here.start()
        await there.start()
        watch = Watch(a)
        for number in range(20):
            await there.send(frame(MAC_A, MAC_B, bytes([1 + number]) * 8986))
            got = await receive(here)
            assert got.buffers == 5
            assert len(watch.look()) >= 6
            assert watch.report()


async def test_all_queue_pairs() -> None:
    async with guests(*configs(MAC_A, MAC_B, queue_pairs=4), ram_size=RAM) as (a, b):
        here, there = a.driver(max_pairs=4), b.driver(max_pairs=4)
        await here.start()
        await there.start()
        watches = [Watch(a), Watch(b)]
        for number in range(40):
            await here.send(frame(MAC_B, MAC_A, bytes([number])), pair=number % 4)
            await receive_on_any(there)
            await there.send(frame(MAC_A, MAC_B, bytes([number])), pair=(number + 1) % 4)
            await receive_on_any(here)
            if number % 3 == 0:
                assert all(watch.look() for watch in watches)
                for watch in watches:
                    watch.report()
        await here.control.set_pairs(2)
        assert watches[0].look()
        watches[0].report()


async def test_a_report_under_load_misses_nothing() -> None:
    """Reports between any two steps of the traffic; what is left over is in the last."""
    async with guests(*configs(MAC_A, MAC_B), ram_size=RAM) as (a, b):
        here, there = a.driver(rx_buffers=8), b.driver()
        await here.start()
        await there.start()
        watch = Watch(a)
        done = False

        async def look() -> None:
            while not done:
                watch.report()
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            for number in range(80):
                await there.send(frame(MAC_A, MAC_B, bytes([number]), size=60 + 50 * number))
                assert (await receive(here)).data[14] == number
            done = True
        watch.report()
        assert watch.report() == set()


# --- what an uplink reads straight into the driver's buffers --------------------------------------


@pytest.mark.parametrize("mergeable", [True, False])
async def test_what_comes_in_directly(mergeable: bool) -> None:
    async with guests(*configs(MAC_A), ram_size=RAM) as (a,):
        wired(a)
        driver = a.driver(
            features=without() if mergeable else without(Feature.MRG_RXBUF), rx_buffers=4
        )
        await driver.start()
        await driver.control.set_rx_mode("promisc", False)
        assert come_in(a.member, frame(MAC_A, MAC_B, b"kept buffers before logging starts"))
        watch = Watch(a)
        for number in range(100):
            to, payload = (MAC_A, STRANGER)[number % 2], bytes([1 + number])
            assert come_in(a.member, frame(to, MAC_B, payload, size=60 + 50 * number))
            assert watch.look(), "a frame that is filtered has been written all the same"
            if number % 3:
                watch.report()
            if number % 2 == 0:
                await receive(driver)
        assert a.member.statistics().filtered == 50
        watch.report()
        assert watch.report() == set()


async def test_a_frame_for_another_pair_was_written_to_the_first() -> None:
    async with guests(*configs(MAC_A, queue_pairs=2), ram_size=RAM) as (a,):
        wired(a)
        driver = a.driver(max_pairs=2)
        await driver.start()
        watch = Watch(a)
        for number in range(30):
            udp = (
                bytes.fromhex("45000030000000004011") + b"\0\0" + bytes((10, 0, 0, 2, 10, 0, 0, 1))
            )
            ports = bytes((7, number, 0, 7, 0, 28, 0, 0))
            assert come_in(
                a.member, MAC_A + MAC_B + b"\x08\x00" + udp + ports + bytes([number] * 20)
            )
            await receive_on_any(driver)
            assert watch.look()
            watch.report()


async def test_a_ring_that_is_full_of_nothing_new() -> None:
    """Frames that find no buffer are not written, but that we want a kick is."""
    async with guests(*configs(MAC_A), ram_size=RAM) as (a,):
        wired(a)
        driver = a.driver(features=without(Feature.EVENT_IDX), rx_buffers=0)
        await driver.start()
        watch = Watch(a)
        await driver.post(buffers=1)
        data = frame(MAC_A, MAC_B)
        assert come_in(a.member, data)
        assert watch.look()
        watch.report()
        come_in(a.member, data)
        watch.report()
        assert watch.report() == set()


# --- rings ----------------------------------------------------------------------------------------


async def test_flags_that_were_set_and_cleared_count() -> None:
    """A client that copied the page in between would have told the driver never to kick."""
    async with guests(*configs(MAC_A), ram_size=RAM) as (a,):
        driver = a.driver(features=without(Feature.EVENT_IDX))
        await driver.start()
        await ping(driver)
        watch = Watch(a)
        await driver.kick(1)
        await a.client.device_info()
        assert watch.look() == set()
        assert watch.report() == set(pages_of(driver.queue(1).ring.device, 8))


async def ping(driver: NetDriver) -> None:
    await driver.send(frame(BROADCAST, MAC_A))
    await driver.flush()


async def test_an_index_that_has_come_all_the_way_round() -> None:
    """65,536 entries between two reports leave every index where it was."""
    async with guests(*configs(MAC_A), ram_size=RAM) as (a,):
        driver = a.driver()
        await driver.start()
        queue = driver.queue(1)
        buffer = a.ram.allocate(72)
        watch = Watch(a)
        buffer.memory[:] = bytes(12) + frame(BROADCAST, MAC_A)
        for _ in range(0x1_0000 // queue.size):
            for _ in range(queue.size):
                queue.add(buffer, readable=[(buffer.iova, buffer.size)])
            queue.publish()
            a.member.kick(1)
            a.member.work()
            queue.collect()
        assert queue.ring.used_idx == 0
        assert watch.report() == set(pages_of(queue.ring.device, 6 + 8 * queue.size))


class Hands:
    """All that can happen to a member between two reports, each with something of its own."""

    def __init__(self, guest: Guest, driver: NetDriver) -> None:
        self._guest = guest
        self._driver = driver
        self._number = 0

    async def send(self) -> None:
        await self._driver.send(frame(BROADCAST, MAC_A, self._content()))

    async def kick(self) -> None:
        await self._driver.kick(self._number % 2)
        await self._guest.client.device_info()

    async def take(self) -> None:
        come_in(self._guest.member, frame(MAC_A, MAC_B, self._content() * 100))

    async def take_long(self) -> None:
        come_in(self._guest.member, frame(MAC_A, MAC_B, self._content() * 5000))

    async def filter(self) -> None:
        come_in(self._guest.member, frame(STRANGER, MAC_B, self._content() * 3000))

    async def collect(self) -> None:
        while self._driver.received():
            await receive(self._driver)

    async def command(self) -> None:
        await self._driver.control.set_rx_mode("nobcast", False)

    async def remap(self) -> None:
        await self._guest.ram.unmap(self._guest.client)
        await self._guest.ram.map(self._guest.client)

    async def move(self) -> None:
        assert await self._guest.member.mode.stop()
        self._guest.member.mode.resume()

    async def reset_queue(self) -> None:
        await self._driver.reset_queue(self._number % 2)

    def _content(self) -> bytes:
        self._number += 1
        return bytes([1 + self._number % 255])


STEPS = [name for name in vars(Hands) if not name.startswith("_")]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    steps=st.lists(st.sampled_from([*STEPS, "report", "report"]), min_size=5, max_size=20),
    lacks=st.sets(st.sampled_from([Feature.MRG_RXBUF, Feature.EVENT_IDX, Feature.INDIRECT_DESC])),
    remote=st.booleans(),
)
async def test_whatever_happens(steps: list[str], lacks: set[Feature], *, remote: bool) -> None:
    async with guests(*configs(MAC_A), remote=remote, ram_size=RAM) as (a,):
        wired(a)
        driver = a.driver(features=without(*lacks), rx_buffers=4)
        await driver.start()
        await driver.control.set_rx_mode("promisc", False)
        hands = Hands(a, driver)
        watch = Watch(a)
        for step in steps:
            if step == "report":
                watch.report(in_flight=remote)
            elif not (remote and step == "remap"):  # the slow service takes that for a broken rule
                with trio.fail_after(LONG):
                    await getattr(hands, step)()
            watch.look()
        assert await a.member.mode.stop()
        watch.report()
        assert watch.report() == set()


# --- around the log's life ------------------------------------------------------------------------


@pytest.mark.parametrize("remote", [False, True])
async def test_after_stop_the_report_is_the_last(remote: bool) -> None:
    async with guests(*configs(MAC_A, MAC_B), remote=remote, ram_size=RAM) as (a, b):
        here, there = a.driver(), b.driver()
        await here.start()
        await there.start()
        watch = Watch(a)

        async def flood() -> None:
            for number in range(256):
                await there.send(frame(MAC_A, MAC_B, bytes([number]), size=600))
                await here.send(frame(MAC_B, MAC_A, bytes([number])))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            await until(lambda: len(watch.look()) > 0)
            with trio.fail_after(LONG):
                assert await a.member.mode.stop()
            assert watch.owed
            watch.report()
            for _ in range(20):
                await trio.sleep(0.001)
                assert watch.look() == set()
            assert watch.report() == set()
            nursery.cancel_scope.cancel()
        a.member.mode.resume()
        await until(lambda: len(watch.look()) > 0)
        watch.report(in_flight=remote)


async def test_what_is_unmapped_is_still_told() -> None:
    async with guests(*configs(MAC_A, MAC_B), ram_size=RAM) as (a, b):
        here, there = a.driver(), b.driver()
        await here.start()
        await there.start()
        watch = Watch(a)
        await ping_pong(here, there)
        await a.ram.unmap(a.client)
        assert watch.look()
        watch.report()
        await a.ram.map(a.client)
        await ping_pong(here, there)
        assert watch.look()
        watch.report()


async def test_a_guest_that_reboots_is_still_logged() -> None:
    async with guests(*configs(MAC_A, MAC_B), ram_size=RAM) as (a, b):
        here, there = a.driver(), b.driver()
        await here.start()
        await there.start()
        watch = Watch(a)
        await ping_pong(here, there)
        watch.look()
        await here.pci.reset()
        watch.report()
        await here.start()
        await ping_pong(here, there)
        assert watch.look()
        await a.client.reset()
        assert a.member.logging.active
        watch.report()
        assert watch.report() == set()


async def test_only_ranges_that_were_asked_for() -> None:
    async with guests(*configs(MAC_A, MAC_B), ram_size=RAM) as (a, b):
        here, there = a.driver(), b.driver()
        await here.start()
        await there.start()
        used = here.queue(0).ring.device
        a.member.logging.start_logging(LoggingStart(PAGE, ((used + 8, 8),)))
        await ping_pong(here, there)
        ram = a.ram
        bitmap = a.member.logging.report_logging(LoggingReport(ram.iova, ram.size, PAGE))
        assert bits(bitmap) == {(used - ram.iova) // PAGE}


async def test_the_log_ends_with_the_session() -> None:
    async with guests(*configs(MAC_A), ram_size=RAM) as (a,):
        member = a.member
        member.logging.start_logging(LoggingStart(PAGE))
        assert member.logging.active
    assert not member.logging.active


async def test_start_and_stop() -> None:
    async with guests(*configs(MAC_A, MAC_B), ram_size=RAM) as (a, b):
        here, there = a.driver(), b.driver()
        await here.start()
        await there.start()
        log = a.member.logging
        log.stop_logging()
        with pytest.raises(ClientError, match="is off; start it") as refused:
            log.report_logging(EVERYTHING)
        assert refused.value.errno == errno.EINVAL
        await ping_pong(here, there)
        log.start_logging(LoggingStart(PAGE))
        assert not any(log.report_logging(EVERYTHING)), "before the start nothing is logged"
        with pytest.raises(ClientError, match="is on; stop it") as refused:
            log.start_logging(LoggingStart(PAGE))
        assert refused.value.errno == errno.EINVAL
        await ping_pong(here, there)
        log.stop_logging()
        log.start_logging(LoggingStart(PAGE))
        assert not any(log.report_logging(EVERYTHING)), "a new log is empty"
        await ping_pong(here, there)
        assert any(log.report_logging(EVERYTHING))
        log.stop_logging()
        await ping_pong(here, there)


async def test_a_log_that_gives_up_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    async with guests(*configs(MAC_A), ram_size=RAM) as (a,):
        log = a.member.logging
        log.start_logging(LoggingStart(PAGE))
        log._dirty = DirtyLog(max_chunks=1)
        log.wrote(0, 1)
        with caplog.at_level(logging.WARNING):
            log.report_logging(EVERYTHING)
            assert not caplog.records
            for place in (1 << 40, 1 << 41, 1 << 42):
                log.wrote(place, 1)
                assert any(log.report_logging(EVERYTHING)) == (place > 1 << 40)
        assert len(caplog.records) == 1
        assert "counts as written" in caplog.text

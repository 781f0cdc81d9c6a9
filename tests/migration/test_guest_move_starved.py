"""A guest that moves with rings that are empty, full or at their end."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.backends.member_rig import LONG, MAC_A, until, without
from tests.migration.guest_move_network import MAC_HOST, numbered
from tests.migration.guest_move_rig import Rig, rig
from vfio_user_virtio.testing.net_driver import GSO_FEATURES
from vfio_user_virtio.virtio.features import Feature

pytestmark = pytest.mark.usefixtures("engine")


async def heard_of(made: Rig) -> None:
    """Return when the host knows where the guest is."""
    here = made.here
    await made.host.news.until(lambda: made.host.is_behind(MAC_A, here), f"the guest behind {here}")


async def say_something(made: Rig) -> None:
    await made.traffic.send(0)
    await heard_of(made)


FEATURES = {
    "MRG_RXBUF": without(),
    "no MRG_RXBUF": without(Feature.MRG_RXBUF) & ~GSO_FEATURES,
    "no EVENT_IDX": without(Feature.EVENT_IDX),
}


@pytest.mark.parametrize("buffers", [0, 1, 3])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
async def test_fewer_buffers_than_frames(features: int, buffers: int) -> None:
    """Frames keep coming all the time; the guest looks at what it got, and posts more, after moves.

    What found no room was never given to the device: it waits on the wire, or is dropped there.
    """
    async with rig(features=features, rx_buffers=max(buffers, 1)) as made:
        driver, traffic = made.driver, made.traffic
        await driver.start(rx=buffers > 0)
        await say_something(made)

        async def frames_come() -> None:
            while True:
                await made.host.send_numbered(MAC_A, 0)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(frames_come)
            rx = driver.queue(0)
            for place in "bab":
                await until(lambda: rx.used_waiting == buffers)
                await made.move()
                await heard_of(made)
                assert made.here == place
                assert rx.used_waiting == buffers
            nursery.cancel_scope.cancel()
        await driver.post(0, 16)
        made.nursery.start_soon(traffic.receive, 0)
        await traffic.finish()
        traffic.check(made.given)
        assert len(traffic.seen) > buffers


async def test_buffers_that_are_posted_without_a_device() -> None:
    """The ring is empty while the guest leaves, and has been filled when the target begins."""
    async with rig() as made:
        driver = made.driver
        await driver.start(rx=False)
        await say_something(made)
        posted = trio.Event()

        async def post() -> None:
            await driver.post()
            posted.set()

        await made.move(while_stopped=lambda: made.nursery.start_soon(post))
        with trio.fail_after(LONG):
            await posted.wait()
        made.nursery.start_soon(made.traffic.receive, 0)
        await heard_of(made)
        await made.traffic.finish()
        made.traffic.check(made.given)


async def test_a_ring_that_is_full_of_frames_to_send() -> None:
    """The device may send little at a time: what the guest has put into its ring moves with it."""
    async with rig(queue_size=64, member={"max_tx_rate": 100_000}) as made:
        driver, traffic = made.driver, made.traffic
        await driver.start()
        await say_something(made)
        ring = driver.queue(1).ring
        sending = trio.CancelScope()

        async def send() -> None:
            with sending:
                while True:
                    await traffic.send(0)

        made.nursery.start_soon(send)
        waiting: list[int] = []
        for _ in range(3):
            await until(lambda: (ring.avail_idx - ring.used_idx) & 0xFFFF >= 60)
            await made.move(
                while_stopped=lambda: waiting.append((ring.avail_idx - ring.used_idx) & 0xFFFF)
            )
        assert min(waiting) > 0
        sending.cancel()
        made.nursery.start_soon(traffic.receive, 0)
        await heard_of(made)
        await traffic.finish()
        traffic.check(made.given)


@pytest.mark.parametrize("end", [0xFFFF, 0xFFF0, 0x7FFF])
async def test_indices_at_their_end(end: int) -> None:
    """Rings that have come round almost once are what the target begins with."""
    async with rig(rx_buffers=16) as made:
        driver, traffic = made.driver, made.traffic
        await driver.start(rx=False)
        await driver.send(numbered(MAC_HOST, MAC_A, 9, 0))
        await driver.flush()

        def turn() -> None:
            for index in (0, 1):
                queue = driver.queue(index)
                assert not queue.outstanding
                queue.ring.avail_idx = queue._avail = queue._published = queue._used = end
                queue.ring._used16[1] = end
                made.guest.ram.wrote(queue.ring.device, 4)

        await made.move(while_stopped=turn)
        await driver.post()
        made.traffic.start(made.nursery)
        await traffic.goes_on("b", frames=100)
        await made.move()
        await traffic.goes_on("a", frames=100)
        await traffic.finish()
        assert driver.queue(1).ring.used_idx == (end + traffic.sent[0]) & 0xFFFF
        assert driver.queue(0).ring.used_idx == (end + traffic.buffers[0]) & 0xFFFF
        assert traffic.host.got[0] == list(range(traffic.sent[0]))
        assert len(traffic.seen) == made.given

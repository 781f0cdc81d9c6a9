"""A guest under load that moves between two servers: whatever its driver has negotiated."""

from __future__ import annotations

from functools import partial

import pytest
import trio
import trio.testing

from tests.backends.member_rig import LONG, MAC_A, without
from tests.migration.guest_move_rig import rig
from tests.testbed.engines import LIBVFIO_USER
from vfio_user_virtio.migration.states import (
    EVERYTHING,
    STOP_AND_COPY,
    VFIO_USER,
    WITHOUT_PRE_COPY,
)
from vfio_user_virtio.protocol.migration import MigrationFlags
from vfio_user_virtio.testing.net_driver import GSO_FEATURES, KNOWN_FEATURES
from vfio_user_virtio.virtio.features import Feature, mask_of
from vfio_user_virtio.virtio.net_control import GUEST_OFFLOADS

pytestmark = pytest.mark.usefixtures("engine")

PLAIN = mask_of((Feature.VERSION_1, Feature.ACCESS_PLATFORM))
OFFLOADS = GUEST_OFFLOADS | mask_of(
    (
        Feature.CSUM,
        Feature.HOST_TSO4,
        Feature.HOST_TSO6,
        Feature.HOST_ECN,
        Feature.HOST_USO,
    )
)


async def test_once() -> None:
    async with rig() as made:
        await made.start()
        migration = await made.move()
        assert made.here == "b"
        await made.traffic.goes_on("b")
        await made.finish()
        assert made.host.announced == ["b"]
    names = [phase.name for phase in migration.phases]
    assert names == ["prepare", "pre-copy", "stop", "copy", "resume", "finish"]


@pytest.mark.parametrize("msix", [True, False], ids=["msix", "intx"])
@pytest.mark.parametrize("remote", [False, True], ids=["mapped", "messages"])
async def test_there_and_back(msix: bool, remote: bool) -> None:
    """By messages too: a twin socket brings their answers while the client waits for its own."""
    async with rig(msix=msix, remote=remote, twin=True) as made:
        await made.start()
        for place in "ba":
            await made.move()
            await made.traffic.goes_on(place)
        await made.finish()
        assert made.host.announced == ["b", "a"]


@pytest.mark.parametrize("msix", [True, False], ids=["msix", "intx"])
async def test_interrupts_of_an_idle_guest(msix: bool) -> None:
    """It sleeps through the move, is woken once in case it missed something, then by each frame."""
    async with rig(msix=msix) as made:
        driver, host = made.driver, made.host
        await driver.start()
        made.nursery.start_soon(made.traffic.receive, 0)
        rx, config = driver.interrupt(0), driver._config_interrupt
        assert config is not None
        for place in "ba":
            seen, config_seen = rx.count, config.count
            await made.move()
            with trio.fail_after(LONG):
                await rx.wait(seen)
                if msix:
                    await config.wait(config_seen)
            await host.news.until(partial(host.is_behind, MAC_A, place), place)
            for _ in range(3):
                await trio.testing.wait_all_tasks_blocked()
                assert not rx.poll()
                seen = rx.count
                number = await host.send_numbered(MAC_A, 0)
                await made.traffic.news.until(
                    partial(made.traffic.guest_is_at, 0, number), f"frame {number}"
                )
                assert rx.count == seen + 1
        assert not made.traffic.sent


@pytest.mark.parametrize("precopy", [True, False], ids=["precopy", "stop-copy"])
async def test_ping_pong(precopy: bool) -> None:
    """Rings of eight descriptors go round many times on the way."""
    async with rig(queue_size=8, rx_buffers=6, ram_size=1 << 20) as made:
        await made.start()
        for number in range(100):
            migration = await made.move(precopy=precopy, rounds=number % 3)
            assert migration.precopy == precopy
            await made.traffic.goes_on("ba"[number % 2], frames=2)
        await made.finish()
        assert len(made.host.announced) == 100


FEATURES = {
    "plain": PLAIN,
    "everything": KNOWN_FEATURES,
    "no MRG_RXBUF": without(Feature.MRG_RXBUF),
    "small buffers": without(Feature.MRG_RXBUF) & ~GSO_FEATURES,
    "no EVENT_IDX": without(Feature.EVENT_IDX),
    "no INDIRECT_DESC": without(Feature.INDIRECT_DESC),
    "only EVENT_IDX": PLAIN | Feature.EVENT_IDX.mask,
    "only INDIRECT_DESC": PLAIN | Feature.INDIRECT_DESC.mask,
    "only MRG_RXBUF": PLAIN | Feature.MRG_RXBUF.mask,
    "no offloads": KNOWN_FEATURES & ~OFFLOADS,
    "no CTRL_VQ": without(Feature.CTRL_VQ),
    "no CTRL_RX": without(Feature.CTRL_RX),
    "no CTRL_VLAN": without(Feature.CTRL_VLAN),
    "no CTRL_MAC_ADDR": without(Feature.CTRL_MAC_ADDR),
    "no STATUS": without(Feature.STATUS, Feature.GUEST_ANNOUNCE),
    "no RING_RESET": without(Feature.RING_RESET),
    "no MAC": without(Feature.MAC),
}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
async def test_features(features: int) -> None:
    """Frames in many descriptors, so that INDIRECT_DESC has something to do."""
    async with rig(features=features, rx_buffers=16, segment=700, size=1500) as made:
        await made.start()
        assert made.driver.features & ~features == 0
        for precopy, place in ((True, "b"), (False, "a")):
            await made.move(precopy=precopy)
            await made.traffic.goes_on(place)
        await made.finish()


@pytest.mark.parametrize("event_idx", [True, False], ids=["EVENT_IDX", "flags"])
async def test_notification_data(event_idx: bool) -> None:
    member: dict[str, object] = {"features_on": Feature.NOTIFICATION_DATA.mask}
    features = KNOWN_FEATURES if event_idx else without(Feature.EVENT_IDX)
    async with rig(features=features, member=member) as made:
        await made.start()
        assert made.driver.has(Feature.NOTIFICATION_DATA)
        for place in "ba":
            await made.move()
            await made.traffic.goes_on(place)
        await made.finish()


async def test_frames_over_many_buffers() -> None:
    async with rig(size=9000, rx_buffers=32, member={"mtu": 9000}) as made:
        await made.start()
        for place in "ba":
            await made.move()
            await made.traffic.goes_on(place)
        await made.finish()
        assert made.traffic.buffers[0] == 5 * len(made.traffic.seen)


@pytest.mark.parametrize("step", [1 << 16, 1 << 20])
async def test_memory_in_pieces(step: int) -> None:
    async with rig(ram_size=4 << 20, step=step) as made:
        await made.start()
        for place in "ba":
            await made.move()
            await made.traffic.goes_on(place)
        await made.finish()


@pytest.mark.parametrize("target", [STOP_AND_COPY, VFIO_USER, WITHOUT_PRE_COPY, EVERYTHING])
@pytest.mark.parametrize("source", [STOP_AND_COPY, VFIO_USER, WITHOUT_PRE_COPY, EVERYTHING])
async def test_states_that_servers_have(
    source: MigrationFlags, target: MigrationFlags, engine: str
) -> None:
    """libvfio-user says that any device has PRE_COPY; one that has not then gives no data in it."""
    precopy = MigrationFlags.PRE_COPY in source & target or engine == LIBVFIO_USER
    async with rig(options=(source, target), ram_size=2 << 20) as made:
        await made.start()
        for place in "ba":
            migration = await made.move()
            assert migration.precopy == precopy
            await made.traffic.goes_on(place)
        await made.finish()


# --- queue pairs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("msix", [True, False], ids=["msix", "intx"])
async def test_eight_queue_pairs(msix: bool) -> None:
    async with rig(member={"queue_pairs": 8}, max_pairs=8, msix=msix, rx_buffers=16) as made:
        await made.start()
        for place in "bab":
            await made.move()
            await made.traffic.goes_on(place)
            assert made.members[place].steering.pairs == 8
        await made.finish()


@pytest.mark.parametrize("enabled", [1, 3, 4])
async def test_queue_pairs_partly_enabled(enabled: int) -> None:
    """The driver sets up some of the pairs; it uses fewer, and then more, at the new places."""
    async with rig(member={"queue_pairs": 8}, max_pairs=enabled, rx_buffers=16) as made:
        await made.start()
        for pairs, place in ((1, "b"), (enabled, "a"), (1, "b")):
            await made.driver.control.set_pairs(pairs)
            await made.move()
            assert made.members[place].steering.pairs == pairs
            await made.traffic.goes_on(place)
        await made.finish()


async def test_mq_is_not_negotiated() -> None:
    async with rig(member={"queue_pairs": 4}, features=without(Feature.MQ)) as made:
        await made.start()
        assert made.driver.control_index == 2
        for place in "ba":
            await made.move()
            await made.traffic.goes_on(place)
            await made.driver.control.add_vlan(7)
        await made.finish()


@pytest.mark.parametrize("index", [2, 3])
async def test_a_queue_that_was_reset(index: int) -> None:
    """RING_RESET: one queue of the second pair is not there while the guest moves, and then is."""
    async with rig(member={"queue_pairs": 2}, max_pairs=2, rx_buffers=16) as made:
        await made.driver.start()
        await made.driver.control.set_pairs(1)
        made.driver.pairs = 1  # the traffic's
        made.traffic.start(made.nursery)
        await made.driver.pci.reset_queue(index)
        for place in "ba":
            await made.move()
            states = made.members[place].function.common.state.queues
            assert [queue.enabled for queue in states[:4]] == [n != index for n in range(4)]
            await made.traffic.goes_on(place)
        await made.driver.reset_queue(index)
        await made.move()
        await made.traffic.goes_on("b")
        await made.finish()


# --- guest memory by messages, as QEMU has them ---------------------------------------------------


async def test_messages_that_are_not_answered_while_the_device_stops() -> None:
    """Without a twin socket no answer comes while the server stops the device.

    What was under way then is given up.  The ring stays right; in the worst case the frame that was
    being sent is sent again, and the one that was being received is lost, once for each move.
    """
    async with rig(remote=True, ram_size=2 << 20) as made:
        await made.start()
        moves = "baba"
        for place in moves:
            await made.move()
            await made.traffic.goes_on(place)
        traffic = made.traffic
        await traffic.finish()
        came = made.host.got[0]
        again = [n for n, number in enumerate(came) if n and came[n - 1] == number]
        assert len(again) <= len(moves)
        made.host.got[0] = [number for n, number in enumerate(came) if n not in again]
        assert made.given - len(moves) <= len(traffic.seen) <= made.given
        traffic.check()

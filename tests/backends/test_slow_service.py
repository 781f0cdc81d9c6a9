"""The slow service by itself: turns for everybody, and memory that is out of reach for a while.

The rings are in plain memory, so an access takes no time unless a test makes it fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest
import trio
import trio.testing

from tests.virtio.rings import BUFFERS, DESC, WRITE, Descriptor, RingDriver, RingMemory, SlowRing
from vfio_user_virtio.backends.software.slow_service import (
    SlowReceiver,
    SlowService,
    SlowTransmitter,
)
from vfio_user_virtio.backends.software.transmitter import Headers
from vfio_user_virtio.errors import ConnectionLost, DriverError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfio_user_virtio.backends.software.ports import Buffer

SIZE: Final = 8
RX, TX = 0, 1
FRAME: Final = bytes(12) + b"\xff" * 6 + b"\x02\0\0\0\0\x01" + b"\x88\xb5" + bytes(range(46))
LONG: Final = 30


class Flaky(RingMemory):
    """Memory whose access number `fails`, counted from 0, finds the client out of reach."""

    def __init__(self, fails: int) -> None:
        super().__init__()
        self.accesses = 0
        self._fails = fails

    def _count(self) -> None:
        self.accesses += 1
        if self.accesses - 1 == self._fails:
            raise ConnectionLost("no reply within 10 s")

    async def read(self, iova: int, size: int) -> bytes:
        self._count()
        return await super().read(iova, size)

    async def write(self, iova: int, data: bytes) -> None:
        self._count()
        await super().write(iova, data)


class Rig:
    """A ring whose descriptors are one buffer each, and what comes of it."""

    def __init__(self, memory: RingMemory | None = None) -> None:
        self.ring = SlowRing(SIZE)
        if memory is not None:
            self.ring.memory = memory
            self.ring.queue._memory = memory
        self.driver = RingDriver(SIZE, self.ring.memory)

    def table(self, length: int, flags: int = 0) -> None:
        self.driver.write_table(
            DESC, [Descriptor(BUFFERS + 256 * i, length, flags) for i in range(SIZE)]
        )


async def serving(service: SlowService, done: Callable[[], bool]) -> None:
    """Run `service` until `done`."""
    with trio.fail_after(LONG):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.run)
            while not done():  # noqa: ASYNC110 - there is no event for it
                await trio.sleep(0.001)
            nursery.cancel_scope.cancel()


def service_of(failed: list[DriverError], interrupts: list[int] | None = None) -> SlowService:
    heard = [] if interrupts is None else interrupts
    return SlowService(heard.append, lambda: None, failed.append, lambda: 0)


async def test_a_driver_that_sends_without_end_lets_others_have_their_turn() -> None:
    rig = Rig()
    rig.table(len(FRAME))
    rig.driver.poke(BUFFERS, FRAME)
    turns = sent = 0

    def send(frame: Sequence[Buffer], size: int) -> bool:
        nonlocal sent
        sent += 1
        assert sent < 10 * (turns + 1), "nobody else had a turn"
        rig.driver.offer(0)
        return True

    failed: list[DriverError] = []
    service = service_of(failed)
    rig.driver.offer(0)
    service.add(TX, SlowTransmitter(rig.ring.queue, Headers(0), send))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.run)
        while sent < 1000:
            await trio.lowlevel.checkpoint()
            turns += 1
        nursery.cancel_scope.cancel()
    assert failed == []


async def test_frames_that_come_in_without_end_do_not_keep_the_driver_from_sending() -> None:
    rx, tx = Rig(), Rig()
    rx.table(256, WRITE)
    tx.table(len(FRAME))
    tx.driver.poke(BUFFERS, FRAME)
    sent: list[int] = []
    received = 0

    def more() -> None:
        nonlocal received
        received += 1
        assert received < 1000, "nothing was sent"
        rx.driver.offer(0)
        receiver.deliver((FRAME,), len(FRAME))

    def send(frame: Sequence[Buffer], size: int) -> bool:
        sent.append(size)
        return True

    failed: list[DriverError] = []
    service = service_of(failed)
    receiver = SlowReceiver(rx.ring.queue, mergeable=True, wake=lambda: service.kick(RX), room=more)
    service.add(RX, receiver)
    service.add(TX, SlowTransmitter(tx.ring.queue, Headers(0), send))
    rx.driver.offer(0)
    receiver.deliver((FRAME,), len(FRAME))
    tx.driver.offer(0)
    await serving(service, lambda: bool(sent))
    assert (sent, failed) == ([len(FRAME)], [])


@pytest.mark.parametrize("fails", range(11))
async def test_what_is_out_of_reach_for_a_while_is_sent_afterwards(
    fails: int, autojump_clock: trio.testing.MockClock
) -> None:
    """No kick comes: the driver has notified, and waits."""
    memory = Flaky(fails)
    rig = Rig(memory)
    rig.table(len(FRAME))
    rig.driver.poke(BUFFERS, FRAME)
    sent: list[bytes] = []

    def send(frame: Sequence[Buffer], size: int) -> bool:
        sent.append(b"".join(frame))
        return True

    failed: list[DriverError] = []
    interrupts: list[int] = []
    service = service_of(failed, interrupts)
    rig.driver.offer(0)
    service.add(TX, SlowTransmitter(rig.ring.queue, Headers(0), send))
    await serving(service, lambda: bool(interrupts) and memory.accesses > fails)
    assert rig.driver.used_index == 1
    assert set(sent) == {FRAME}
    assert len(sent) <= 2
    assert rig.driver.used(0) == (0, 0)
    assert rig.ring.position == (1, 1)
    assert failed == []


@pytest.mark.parametrize("fails", range(12))
async def test_what_is_out_of_reach_for_a_while_is_received_afterwards(
    fails: int, autojump_clock: trio.testing.MockClock
) -> None:
    memory = Flaky(fails)
    rig = Rig(memory)
    rig.table(40, WRITE)
    failed: list[DriverError] = []
    interrupts: list[int] = []
    service = service_of(failed, interrupts)
    receiver = SlowReceiver(
        rig.ring.queue, mergeable=True, wake=lambda: service.kick(RX), room=lambda: None
    )
    service.add(RX, receiver)
    rig.driver.offer(3, 5)
    receiver.deliver((FRAME,), len(FRAME))
    await serving(service, lambda: bool(interrupts) and memory.accesses > fails)
    assert rig.driver.used_index == 2
    assert [rig.driver.used(index) for index in range(2)] == [(3, 40), (5, len(FRAME) - 40)]
    got = rig.driver.peek(BUFFERS + 256 * 3, 40) + rig.driver.peek(BUFFERS + 256 * 5, 32)
    assert got == FRAME[:10] + b"\x02\0" + FRAME[12:]
    assert rig.ring.position == (2, 2)
    assert failed == []

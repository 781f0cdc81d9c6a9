"""That a split queue notes each write to its used ring, for dirty tracking."""

from __future__ import annotations

import pytest

from tests.virtio.rings import BUFFERS, DESC, USED, WRITE, Descriptor, FastRing, RingDriver
from vfio_user_virtio.virtio.split_queue import ring_layout

SIZE = 8


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_ring_knows_that_it_was_written(event_idx: bool) -> None:
    ring = FastRing(SIZE, event_idx=event_idx)
    queue = ring.queue
    used = ring.memory.view(USED, ring_layout(SIZE).used)
    driver = RingDriver(SIZE, ring.memory)
    driver.write_table(DESC, [Descriptor(BUFFERS, 8, WRITE)])

    def return_one() -> None:
        ring.put(0, 8)
        ring.publish()

    changed = 0
    for step in (
        ring.disable_kicks,
        ring.enable_kicks,
        ring.take,
        ring.enable_kicks,
        return_one,
        ring.take,
        ring.give_back,
        ring.should_interrupt,
        ring.enable_kicks,
        ring.disable_kicks,
        ring.take,
        return_one,
    ):
        driver.offer(0)
        before, queue.used_written = bytes(used), False
        step()
        assert queue.used_written >= (bytes(used) != before)
        changed += bytes(used) != before
    assert changed >= 3


def test_looking_at_a_ring_is_no_write() -> None:
    ring = FastRing(SIZE)
    driver = RingDriver(SIZE, ring.memory)
    driver.write_table(DESC, [Descriptor(BUFFERS, 8, WRITE)])
    driver.offer(0)
    assert ring.take() is not None
    assert ring.take() is None
    assert not ring.should_interrupt()
    assert not ring.queue.used_written

"""Queues of one member that share a wire which takes little: each has its turn."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.backends.member_rig import MAC_A, MAC_B, configs, frame, guests, until
from vfio_user_virtio.backends.software.ports import Offload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_user_virtio.backends.software.ports import Buffer


class NarrowWire:
    """An uplink that takes `room` frames."""

    name = "wire"
    up = True
    offloads = Offload(0)

    def __init__(self) -> None:
        self.room = 0
        self.took: Counter[int] = Counter()
        """Frames by the queue pair that is written in them."""

    def deliver(self, frame: Sequence[Buffer], size: int) -> bool:
        if not self.room:
            return False
        self.room -= 1
        self.took[b"".join(frame)[12 + 14]] += 1
        return True

    def has_taken(self, count: int) -> bool:
        return self.took.total() == count

    def flush(self) -> None: ...

    def resume(self) -> None: ...

    def poll(self) -> None: ...

    def receivers_take(self, offloads: Offload) -> None: ...


@pytest.mark.parametrize("pairs", [2, 3, 8])
async def test_queues_take_turns_on_a_wire_that_is_always_full(pairs: int) -> None:
    async with guests(*configs(MAC_A, queue_pairs=pairs)) as (guest,):
        wire = NarrowWire()
        switch = guest.member._switch
        switch.plug_uplink(wire)
        driver = guest.driver(max_pairs=pairs)
        await driver.start()
        for pair in range(pairs):
            for _ in range(20):
                await driver.send(frame(MAC_B, MAC_A, bytes((pair,))), pair=pair)
        for number in range(1, 2 * pairs + 1):
            wire.room = 4
            switch.writable(wire)
            await until(partial(wire.has_taken, 4 * number))
        assert wire.took == dict.fromkeys(range(pairs), 8)

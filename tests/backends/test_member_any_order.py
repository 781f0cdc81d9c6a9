"""Whatever driver, client and uplink do, and in whatever order: a member goes on, or goes on after
a reset.

Every step is something that a real one does at some time; what is not real is the order.  In the
end a driver starts anew, and frames go both ways.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backends.member_rig import LONG, MAC_A, MAC_B, configs, frame, guests, without
from tests.backends.test_member_uplink_side import Wire, come_in, udp_of_odd_flow, wired
from vfio_user_virtio.testing.virtio_pci import Register
from vfio_user_virtio.virtio.features import Feature

if TYPE_CHECKING:
    from tests.backends.member_rig import Guest
    from vfio_user_virtio.testing.net_driver import NetDriver

PAIRS: Final = 2
QUEUES: Final = 2 * PAIRS + 1
FEATURES: Final = (
    without(),
    without(Feature.MQ),
    without(Feature.MRG_RXBUF, Feature.EVENT_IDX),
    without(Feature.CTRL_VQ),
)
ODD: Final = udp_of_odd_flow()
BROADCAST: Final = frame(b"\xff" * 6, MAC_B, b"to all", size=3000)


@attrs.define
class World:
    """A guest whose member is alone with an uplink, and the driver that it has just now."""

    guest: Guest
    wire: Wire
    driver: NetDriver | None = None
    mapped: bool = True

    async def start(self, value: int) -> None:
        pairs = 1 + value // len(FEATURES) % PAIRS
        features = FEATURES[value % len(FEATURES)]
        self.driver = None
        await self.map(0)
        await self.guest.pci.set_up()
        driver = self.guest.driver(
            features=features,
            max_pairs=pairs,
            queue_size=16,
            rx_buffers=value % 12,
            rx_buffer_size=4096,
        )
        with trio.move_on_after(0.2):  # the wire may be full, so that commands are not reached
            await driver.start()
        self.driver = driver

    async def sends(self, value: int) -> None:
        """A frame, if there is room for it."""
        driver = self.driver
        if driver is not None:
            pair = value % driver.pairs
            with trio.move_on_after(0.001):
                await driver.send(
                    frame(MAC_B, MAC_A, bytes([value]), size=60 + 40 * value), pair=pair
                )

    async def comes_in(self, value: int) -> None:
        for _ in range(1 + value % 4):
            come_in(self.guest.member, ODD if value & 4 else BROADCAST)

    async def is_full(self, value: int) -> None:
        self.wire.full = bool(value & 1)
        if not self.wire.full:
            self.guest.member._switch.writable(self.wire)

    async def kick(self, value: int) -> None:
        await self.guest.client.region_write(4, 0x3000 + 4 * (value % (QUEUES + 1)), bytes(2))

    async def reset_queue(self, value: int) -> None:
        await self.guest.pci.write(Register.QUEUE_SELECT, value % QUEUES)
        await self.guest.pci.write(Register.QUEUE_RESET, 1)

    async def enable_queue(self, value: int) -> None:
        await self.guest.pci.write(Register.QUEUE_SELECT, value % QUEUES)
        await self.guest.pci.write(Register.QUEUE_ENABLE, 1)

    async def unmap(self, value: int) -> None:
        del value
        if self.mapped:
            self.mapped = False
            await self.guest.ram.unmap(self.guest.client)

    async def map(self, value: int) -> None:
        if not self.mapped:
            self.mapped = True
            await self.guest.ram.map(self.guest.client, remote=value % 4 == 1)

    async def master(self, value: int) -> None:
        await self.guest.client.region_write(7, 4, bytes((4 * (value & 1) | 2, 0)))

    async def reset(self, value: int) -> None:
        if value & 1:
            await self.guest.client.reset()
        else:
            await self.guest.pci.write(Register.DEVICE_STATUS, 0)

    async def link(self, value: int) -> None:
        self.guest.member.set_link(bool(value & 1))

    async def rest(self, value: int) -> None:
        del value
        await trio.testing.wait_all_tasks_blocked()


STEPS: Final = [name for name in vars(World) if not name.startswith("_")]
STEPS[:] = [name for name in STEPS if callable(getattr(World, name))]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 31)), max_size=40))
def test_any_order(steps: list[tuple[str, int]]) -> None:
    async def main() -> None:
        async with guests(*configs(MAC_A, queue_pairs=PAIRS), ram_size=1 << 24) as (guest,):
            world = World(guest, wired(guest))
            await world.start(0)
            for name, value in steps:
                await getattr(world, name)(value)
            await world.map(0)
            await world.is_full(0)
            await world.link(1)
            driver = guest.driver(max_pairs=PAIRS)
            with trio.fail_after(LONG):
                await driver.start()
                world.wire.frames.clear()
                sent = frame(MAC_B, MAC_A, b"the end")
                await driver.send(sent)
                await driver.flush()
                while sent not in world.wire.frames:
                    await trio.lowlevel.checkpoint()
                while not come_in(guest.member, BROADCAST):
                    await trio.lowlevel.checkpoint()
                while (await driver.receive()).data != BROADCAST:
                    pass

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

"""Many members of one owner that migrate at once, to another owner: all of them arrive, nothing is
left over, and the traffic of others loses nothing meanwhile."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import attrs
import trio

from tests.backends.member_rig import frame, until
from tests.migration.served_rig import holdings, served_rig
from vfio_user_virtio.testing.loopback import served
from vfio_user_virtio.transport.device_migration import Migration
from vfio_user_virtio.virtio.common_config import Status

if TYPE_CHECKING:
    from tests.migration.served_rig import Place, ServedRig

MEMBERS: Final = 255


def mark(rig: ServedRig, number: int) -> None:
    """Give a member a state that no other has."""
    rig.members[number].function.common.state.queue_select = 1000 + number


def marks(rig: ServedRig) -> list[int]:
    return [member.function.common.state.queue_select for member in rig.members]


async def test_all_members_that_an_owner_can_have() -> None:
    """Each needs an object, and there are as many: not one is lost."""
    async with served_rig(MEMBERS) as here, served_rig(MEMBERS) as there:
        async with here.guest(0):
            pass
        before = holdings()
        migrations: list[Migration] = []
        most = [0, 0]

        def note(_: Migration) -> None:
            for side, rig in enumerate((here, there)):
                most[side] = max(most[side], rig.objects[1])

        async def move(number: int) -> None:
            async with (
                served(here.devices[number]) as source,
                served(there.devices[number]) as target,
            ):
                migration = Migration(source, target, on_progress=note)
                migrations.append(migration)
                await migration.run()

        for number in range(MEMBERS):
            mark(here, number)
        async with trio.open_nursery() as nursery:
            for number in range(MEMBERS):
                nursery.start_soon(move, number)
        assert marks(there) == [1000 + number for number in range(MEMBERS)]
        assert all(migration.target_runs for migration in migrations)
        assert here.objects == there.objects == (0, 0)
        assert not any(member.mode.stopped for rig in (here, there) for member in rig.members)
        assert most[1] == MEMBERS, "they were all under way at once"
        assert holdings() == before


# --- beside traffic -------------------------------------------------------------------------------

MOVING: Final = 64
TALKING: Final = ((64, 65), (66, 67))
"""Guests by number: those that move, and pairs that talk."""
BURST: Final = 8
"""Frames that are sent at once."""


def mac(number: int) -> bytes:
    return bytes((2, 0, 0, 0, 0, number + 1))


@attrs.define
class Flow:
    """Numbered frames from one guest to another, sent until `over`."""

    sender: Place
    receiver: Place
    to: bytes
    of: bytes
    over: trio.Event
    sent: int = 0
    got: list[int] = attrs.field(factory=list)

    async def send(self) -> None:
        while not self.over.is_set():
            for _ in range(BURST):
                data = frame(self.to, self.of, self.sent.to_bytes(4, "big"))
                self.sent += 1
                await self.sender.driver.send(data)

    async def receive(self) -> None:
        while True:
            data = (await self.receiver.driver.receive()).data
            if data.startswith(
                self.to + self.of
            ):  # others' are flooded as long as they are unknown
                self.got.append(int.from_bytes(data[14:18], "big"))

    @property
    def arrived(self) -> bool:
        return len(self.got) == self.sent


async def test_others_lose_nothing() -> None:
    """Pairs of guests talk both ways, while 64 others with drivers of their own move and start."""
    async with (
        served_rig(MOVING + 4) as here,
        served_rig(MOVING) as there,
        contextlib.AsyncExitStack() as stack,
    ):
        guests = [await stack.enter_async_context(here.guest(n)) for n in range(MOVING + 4)]
        targets = [await stack.enter_async_context(served(there.devices[n])) for n in range(MOVING)]
        for guest in guests:
            await guest.driver.start()
        over = trio.Event()
        flows: list[Flow] = []
        for pair in TALKING:
            a, b = (guests[n] for n in pair)
            flows.append(Flow(a, b, mac(pair[1]), mac(pair[0]), over))
            flows.append(Flow(b, a, mac(pair[0]), mac(pair[1]), over))

        async def move(number: int) -> None:
            await Migration(guests[number].client, targets[number]).run()

        async with trio.open_nursery() as receivers:
            async with trio.open_nursery() as senders:
                for flow in flows:
                    receivers.start_soon(flow.receive)
                    senders.start_soon(flow.send)
                async with trio.open_nursery() as nursery:
                    for number in range(MOVING):
                        nursery.start_soon(move, number)
                over.set()
            await until(lambda: all(flow.arrived for flow in flows))
            receivers.cancel_scope.cancel()
        for flow in flows:
            assert flow.got == list(range(flow.sent))
            assert flow.sent > MOVING, "it went on while they moved"
        for number, member in enumerate(there.members):
            assert member.state.filter.mac == mac(number)
            assert member.function.common.state.status & Status.DRIVER_OK
        assert here.objects == there.objects == (0, 0)

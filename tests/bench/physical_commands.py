"""Administration commands through a real virtqueue, against the same owner model in process.

To be run inside an inner host that has a served PF: `physical.py` does so.  Ours is our owner on
kernel VFIO: ring and buffers in memory that the IOMMU maps, the doorbell a write to a BAR, the
answer an interrupt.  On the other side of the (emulated) PCI bus is a server outside.  The peer is
the owner model that this server has, without anything between, in this process.  What the bus
itself costs is told by a read of a register of the PF, which is one message there and one back.
"""

from __future__ import annotations

import functools
import sys
import time
from typing import TYPE_CHECKING, Final

import trio

from tests.bench.figures import NATIVE, Better, Figure
from tests.bench.inside import tell
from tests.bench.register_access import percentile
from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.admin_queue import SoftwareAdminQueue
from vfio_user_virtio.backends.software.administration import Administration
from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.backends.vfio.opening import Way
from vfio_user_virtio.backends.vfio.owner_opening import owned_function
from vfio_user_virtio.backends.vfio.owner_transport import Register
from vfio_user_virtio.backends.vfio.sysfs import PciAddress
from vfio_user_virtio.migration.admin_client import AdminClient
from vfio_user_virtio.migration.parts_owner import PartsOwner
from vfio_user_virtio.virtio import admin_commands as commands
from vfio_user_virtio.virtio.admin import STATUS_SIZE, GroupType, encode_command
from vfio_user_virtio.virtio.admin_commands import MetadataKind, ObjectKind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from tests.bench.figures import Publish
    from vfio_user_virtio.migration.admin_client import AdminQueue
    from vfio_user_virtio.virtio.admin import Command

IN_PROCESS: Final = "in process"
MEMBER: Final = 1
MAC: Final = bytes((2, 0, 0, 0, 0, MEMBER))
QUERY: Final = commands.list_query(GroupType.SR_IOV)
ENCODED_QUERY: Final = encode_command(QUERY)
QUERY_RESULT: Final = 8


def model() -> SoftwareAdminQueue:
    """The owner model in process, with one member that nobody serves."""
    owner = Owner("owner")
    owner.add_member(MemberConfig(member_id=MEMBER, mac=MAC), "vf")
    return SoftwareAdminQueue(Administration(owner))


class Contestant:
    """A queue, and what is needed to ask it for a member's image."""

    def __init__(self, queue: AdminQueue) -> None:
        self.queue = queue
        self.admin = AdminClient(queue)
        self.parts = PartsOwner(self.admin)
        self.image: Command = QUERY
        self.image_size = QUERY_RESULT

    async def prepare(self) -> None:
        assert (await self.parts.discover()).lack is None
        object_id = await self.parts.create(MEMBER, ObjectKind.GET)
        asked = commands.metadata_get(MEMBER, object_id, MetadataKind.SIZE)
        self.image_size = commands.decode_count_untrusted(
            await self.admin.execute(asked, commands.COUNT_SIZE)
        )
        self.image = commands.parts_get(MEMBER, object_id)

    async def query(self) -> None:
        await self.admin.execute(QUERY, QUERY_RESULT)

    async def get(self) -> None:
        await self.admin.execute(self.image, self.image_size)

    async def rate(self, count: int) -> float:
        """Commands a second, as many under way as the owner takes."""
        left = count

        async def keep_asking() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await self.queue.execute(ENCODED_QUERY, STATUS_SIZE + QUERY_RESULT)

        started = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for _ in range(limits.ADMIN_QUEUE_DEPTH):
                nursery.start_soon(keep_asking)
        return count / (time.perf_counter() - started)


async def compare(
    queues: Mapping[str, AdminQueue], blocks: int, count: int, where: str, publish: Publish
) -> None:
    """Commands one after the other, then many at once; the columns are those of `queues`, the last
    of which is the peer."""
    contestants = {name: Contestant(queue) for name, queue in queues.items()}
    peer = list(queues)[-1]
    for one in contestants.values():
        await one.prepare()
    for label, ask in (("LIST_QUERY", Contestant.query), ("DEV_PARTS_GET", Contestant.get)):
        times: dict[str, list[list[float]]] = {name: [] for name in queues}
        for block in range(-1, blocks):
            for name, one in contestants.items():
                taken = await timed(functools.partial(ask, one), count)
                if block >= 0:
                    times[name].append(taken)
        for quantile, per_cent in (("p50", 50), ("p99", 99)):
            columns = {
                name: [percentile(block, per_cent) for block in found]
                for name, found in times.items()
            }
            publish(Figure(f"{label}{where}, {quantile}", "µs", Better.LESS, columns, peer))
    rates: dict[str, list[float]] = {name: [] for name in queues}
    for block in range(-1, blocks):
        for name, one in contestants.items():
            rate = await one.rate(count)
            if block >= 0:
                rates[name].append(rate)
    label = f"LIST_QUERY{where}, {limits.ADMIN_QUEUE_DEPTH} at once"
    publish(Figure(label, "commands/s", Better.MORE, rates, peer))


async def timed(call: Callable[[], Awaitable[object]], count: int) -> list[float]:
    """Microseconds that each of `count` calls takes."""
    times = []
    for _ in range(count):
        started = time.perf_counter_ns()
        await call()
        times.append((time.perf_counter_ns() - started) / 1000)
    return times


async def main(pf: str, way: str, blocks: int, count: int) -> None:
    async with owned_function(PciAddress.parse(pf), way=Way[way.upper()]) as owner:
        queues: dict[str, AdminQueue] = {NATIVE: owner, IN_PROCESS: model()}
        await compare(queues, blocks, count, f" by {way}", tell)
        transport = owner._transport
        reads = [
            await timed(lambda: transport.read(Register.DEVICE_STATUS), count)
            for _ in range(blocks)
        ]
        medians = {NATIVE: [percentile(block, 50) for block in reads]}
        tell(Figure(f"register of the PF by {way}", "µs", Better.LESS, medians))


if __name__ == "__main__":
    trio.run(main, sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

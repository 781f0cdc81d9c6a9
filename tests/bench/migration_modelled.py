"""What PRE_COPY is worth with a device that is slow to take its state: a published result, as a
model.

The kernel series that brought PRE_COPY to vfio-virtio reports that the first DEV_PARTS_SET of a
device takes about 300 ms, and one that differs little from the one before 11 ms.  The software
owner of the target sleeps for as long (`DeviceTiming`); all else is real: two servers, their
sockets, the clock.  So **these figures are modelled**: they say that the images come to the target
in time to warm it, and what we add.

The peer is the same migration by STOP_COPY alone.  Members migrate at the same time.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

import trio

from tests.bench.figures import NATIVE, Better, Figure, at_most
from tests.bench.migration_sides import guest, model_side, two_folders

if TYPE_CHECKING:
    from tests.bench.effort import Effort
    from tests.bench.figures import Publish
    from tests.bench.migration_sides import Guest

STOP_COPY: Final = "STOP_COPY"
FIRST_SET: Final = 0.300
SIMILAR_SET: Final = 0.011
AIM_DOWNTIME: Final = at_most(0.30, of_ratio=True)
AIM_TOTAL: Final = at_most(1.1, of_ratio=True)
COUNTS: Final = (1, 2)


async def measure(effort: Effort, publish: Publish) -> None:
    async with AsyncExitStack() as stack:
        folders = stack.enter_context(two_folders())
        source, target = [
            stack.enter_context(
                model_side(folder, max(COUNTS), first_set=FIRST_SET, similar_set=SIMILAR_SET)
            )
            for folder in folders
        ]
        guests = [
            await stack.enter_async_context(guest(source, target, number))
            for number in range(max(COUNTS))
        ]
        for count in COUNTS:
            downtimes: dict[str, list[float]] = {NATIVE: [], STOP_COPY: []}
            totals: dict[str, list[float]] = {NATIVE: [], STOP_COPY: []}
            for _ in range(effort.modelled):
                for column in downtimes:
                    downtime, total = await migrate(guests[:count], precopy=column == NATIVE)
                    downtimes[column].append(downtime)
                    totals[column].append(total)
            what = f"modelled device, {count} at once"
            publish(
                Figure(f"downtime, {what}", "ms", Better.LESS, downtimes, STOP_COPY, AIM_DOWNTIME)
            )
            publish(Figure(f"migration, {what}", "ms", Better.LESS, totals, STOP_COPY, AIM_TOTAL))


async def migrate(guests: list[Guest], *, precopy: bool) -> tuple[float, float]:
    """Milliseconds of the longest downtime, and from the first request to the last answer."""
    downtimes: list[float] = []
    totals: list[float] = []

    async def one(moving: Guest) -> None:
        migration = await moving.migrate(precopy=precopy)
        downtimes.append(migration.downtime * 1000)
        totals.append((trio.current_time() - begin) * 1000)

    begin = trio.current_time()
    async with trio.open_nursery() as nursery:
        for moving in guests:
            nursery.start_soon(one, moving)
    return max(downtimes), max(totals)

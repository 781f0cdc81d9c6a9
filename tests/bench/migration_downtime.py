"""How long a device stands still: from the request that stops it to the answer that it runs.

A driver has set all queues up, and nothing is in them.  The device goes there and back between two
servers.  What a client does meanwhile beside it (the last of guest memory, interrupts) is not in
it.  The peer is as many requests one after the other, to the same two servers, for which nothing
is to be done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from tests.bench.figures import NATIVE, Better, Figure, at_most
from tests.bench.migration_sides import driven_guest, native_sides
from tests.bench.register_access import percentile
from vfio_user_virtio.device import FeatureOperation
from vfio_user_virtio.limits import MAX_QUEUE_PAIRS
from vfio_user_virtio.protocol.feature import Feature
from vfio_user_virtio.protocol.migration import DEVICE_STATE_SIZE

if TYPE_CHECKING:
    from tests.bench.effort import Effort
    from tests.bench.figures import Publish
    from tests.bench.migration_sides import Guest

REQUESTS: Final = 7
"""PRE_COPY_P2P, STOP_COPY, a read, a write, STOP, RUNNING_P2P, RUNNING."""
QUESTIONS: Final = f"{REQUESTS} questions"
AIM_MS: Final = at_most(5)


async def measure(effort: Effort, publish: Publish) -> None:
    for queue_pairs in (1, MAX_QUEUE_PAIRS):
        times: dict[str, list[float]] = {NATIVE: [], QUESTIONS: []}
        with native_sides(1, queue_pairs) as (source, target):
            async with driven_guest(source, target, queue_pairs=queue_pairs) as moving:
                for sample in range(-1, effort.moves):
                    migration = await moving.migrate()
                    asking = await ask(moving)
                    if sample >= 0:
                        times[NATIVE].append(migration.downtime * 1000)
                        times[QUESTIONS].append(asking)
        name = f"downtime, {queue_pairs} queue pair{'s' if queue_pairs > 1 else ''}"
        publish(Figure(f"{name}, p50", "ms", Better.LESS, times, QUESTIONS, AIM_MS))
        worst = {column: [percentile(samples, 99)] for column, samples in times.items()}
        publish(Figure(f"{name}, p99", "ms", Better.LESS, worst, QUESTIONS, AIM_MS))


async def ask(moving: Guest) -> float:
    """Milliseconds that it takes to ask for the state."""
    begin = trio.current_time()
    for number in range(REQUESTS):
        client = moving.there if number % 2 else moving.here
        await client.feature(Feature.MIG_DEVICE_STATE, FeatureOperation.GET, room=DEVICE_STATE_SIZE)
    return (trio.current_time() - begin) * 1000

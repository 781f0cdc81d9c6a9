"""Many members of one owner, of one server, that all migrate at once to another.

How long it takes until the last one runs, and how long the one that stands still the longest does.
One client, in this process, drives all of them as fast as it can, each on its own: nobody keeps the
others waiting so that few stand still at a time, as an orchestrator could.  A driver has set each
of them up.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

from tests.bench.figures import NATIVE, Better, Figure
from tests.bench.migration_modelled import migrate
from tests.bench.migration_sides import driven_guest, native_sides

if TYPE_CHECKING:
    from tests.bench.effort import Effort
    from tests.bench.figures import Publish

ROUNDS: Final = 4
"""There and back, twice."""


async def measure(effort: Effort, publish: Publish) -> None:
    members = max(effort.at_once)
    async with AsyncExitStack() as stack:
        source, target = stack.enter_context(native_sides(members, 1))
        guests = [
            await stack.enter_async_context(driven_guest(source, target, number))
            for number in range(members)
        ]
        for count in effort.at_once:
            downtimes, totals = [], []
            for _ in range(ROUNDS):
                downtime, total = await migrate(guests[:count], precopy=True)
                downtimes.append(downtime)
                totals.append(total)
            name = f"{count} member{'s' if count > 1 else ''} at once"
            publish(Figure(f"{name}, total", "ms", Better.LESS, {NATIVE: totals}))
            publish(Figure(f"{name}, worst downtime", "ms", Better.LESS, {NATIVE: downtimes}))

"""A guest's register access: REGION_READ of four bytes, there and back over a UNIX socket.

The peer is a bare trio echo: the same client, the same size of message, a server that does nothing.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.bench.contenders import (
    ECHO,
    REGISTER_READ,
    blocking,
    echo,
    engine,
    engines,
    session,
    time_round_trips,
)
from tests.bench.figures import Better, Figure, at_most

if TYPE_CHECKING:
    import socket

    from tests.bench.effort import Effort
    from tests.bench.figures import Publish

AIM: Final = at_most(1.2, of_ratio=True)


async def measure(effort: Effort, publish: Publish) -> None:
    names = engines()
    times: dict[str, list[list[float]]] = {column: [] for column in (*names, ECHO)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with contextlib.AsyncExitStack() as stack:
            connections: dict[str, socket.socket] = {}
            for column in names:
                ours = stack.enter_context(engine(folder, column))
                client = await stack.enter_async_context(session(ours))
                connections[column] = stack.enter_context(blocking(client))
            theirs = stack.enter_context(echo(folder))
            connections[ECHO] = stack.enter_context(await theirs.connect())
            for block in range(-1, effort.blocks):
                for column, connection in connections.items():
                    taken = time_round_trips(connection, REGISTER_READ, effort.round_trips)
                    if block >= 0:  # the first warms all up
                        times[column].append(taken)
    for label, per_cent in (("p50", 50), ("p99", 99)):
        columns = {
            column: [percentile(block, per_cent) for block in blocks]
            for column, blocks in times.items()
        }
        publish(Figure(f"register read, {label}", "µs", Better.LESS, columns, ECHO, AIM))


def percentile(times: list[float], per_cent: int) -> float:
    return statistics.quantiles(times, n=100, method="inclusive")[per_cent - 1]

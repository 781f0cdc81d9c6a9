"""A guest's register access: REGION_READ of four bytes, there and back over a UNIX socket.

The peer is a bare trio echo: the same client, the same size of message, a server that does nothing.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.bench.contenders import (
    ECHO,
    REGISTER_READ,
    blocking,
    echo,
    native,
    session,
    time_round_trips,
)
from tests.bench.figures import NATIVE, Better, Figure, at_most

if TYPE_CHECKING:
    from tests.bench.effort import Effort
    from tests.bench.figures import Publish

AIM: Final = at_most(1.2, of_ratio=True)


async def measure(effort: Effort, publish: Publish) -> None:
    times: dict[str, list[list[float]]] = {NATIVE: [], ECHO: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with native(folder) as ours, echo(folder) as theirs:
            sock = await theirs.connect()
            async with session(ours) as client:
                with sock, blocking(client) as registers:
                    for block in range(-1, effort.blocks):
                        for column, connection in ((NATIVE, registers), (ECHO, sock)):
                            taken = time_round_trips(connection, REGISTER_READ, effort.round_trips)
                            if block >= 0:  # the first warms both up
                                times[column].append(taken)
    for label, per_cent in (("p50", 50), ("p99", 99)):
        columns = {
            column: [percentile(block, per_cent) for block in blocks]
            for column, blocks in times.items()
        }
        publish(Figure(f"register read, {label}", "µs", Better.LESS, columns, ECHO, AIM))


def percentile(times: list[float], per_cent: int) -> float:
    return statistics.quantiles(times, n=100, method="inclusive")[per_cent - 1]

"""`python -m tests.bench`: measures ours against its peers, side by side, and says how it went.

    python -m tests.bench [--quick] [--pin] [--json FILE] [NAME …]

What each benchmark measures is told in README.md beside this.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import trio

from tests.bench import (
    admin_commands,
    dma_maps,
    guest_traffic,
    migration_downtime,
    migration_members,
    migration_modelled,
    migration_stream,
    packets,
    physical,
    process,
    register_access,
    vm_moves,
)
from tests.bench.effort import FULL, QUICK
from tests.bench.report import table, value, write_json

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from tests.bench.effort import Effort
    from tests.bench.figures import Figure, Publish

BENCHMARKS: Final[dict[str, Callable[[Effort, Publish], Awaitable[None]]]] = {
    "registers": register_access.measure,
    "packets": packets.measure,
    "guest": guest_traffic.measure,
    "start": process.measure_start,
    "idle": process.measure_idle,
    "members": process.measure_members,
    "dma-maps": dma_maps.measure_registers,
    "translation": dma_maps.measure_translation,
    "migration-modelled": migration_modelled.measure,
    "migration-downtime": migration_downtime.measure,
    "migration-stream": migration_stream.measure,
    "migration-members": migration_members.measure,
    "migrate-vm": vm_moves.measure,
    "admin-commands": admin_commands.measure,
    "physical-packets": physical.measure_packets,
    "physical-memory": physical.measure_memory,
    "physical-commands": physical.measure_commands,
}


async def measure(names: Sequence[str], effort: Effort) -> list[Figure]:
    """The figures of these benchmarks; each is shown when it is known."""
    figures: list[Figure] = []
    begin = time.monotonic()

    def publish(figure: Figure) -> None:
        figures.append(figure)
        line = f"{figure.name}: {', '.join(value(figure, e) for e in figure.engines)} {figure.unit}"
        print(f"[{time.monotonic() - begin:4.0f} s] {line}", file=sys.stderr, flush=True)

    for name in names:
        await BENCHMARKS[name](effort, publish)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="fewer samples, about two minutes")
    parser.add_argument(
        "--pin", action="store_true", help="give the vCPU and the server a processor each"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there, too")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    effort = attrs.evolve(QUICK if options.quick else FULL, pinned=options.pin)
    figures = trio.run(functools.partial(measure, options.names or list(BENCHMARKS), effort))
    print(table(figures))
    if options.json:
        write_json(options.json, figures, effort)
    return 0


if __name__ == "__main__":
    sys.exit(main())

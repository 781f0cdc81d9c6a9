"""What the server costs before and beside its work: start, sleep, memory.

The peer is the bare trio echo: what Python and trio cost anyway.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from tests.bench.contenders import (
    ECHO,
    REGISTER_READ,
    echo,
    engine,
    engines,
    native,
    native_members,
    session,
)
from tests.bench.figures import NATIVE, Better, Figure, at_most

if TYPE_CHECKING:
    from tests.bench.effort import Effort
    from tests.bench.figures import Publish

AIM_START_MS: Final = at_most(400)
AIM_WAKE_UPS: Final = at_most(0)
AIM_MIB: Final = at_most(45)
AIM_MEMBER_KIB: Final = at_most(200)
SETTLE_SECONDS: Final = 0.3


async def measure_start(effort: Effort, publish: Publish) -> None:
    """From exec until a client has connected and has its first answer; byte code is there."""
    names = engines()
    columns: dict[str, list[float]] = {column: [] for column in (*names, ECHO)}
    for start in range(-1, effort.starts):
        taken: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                begin = time.perf_counter()
                with engine(Path(folder), name) as ours:
                    async with session(ours):
                        taken[name] = (time.perf_counter() - begin) * 1000
            begin = time.perf_counter()
            with echo(Path(folder)) as theirs, await theirs.connect() as sock:
                sock.sendall(REGISTER_READ)
                sock.recv(4096)
                taken[ECHO] = (time.perf_counter() - begin) * 1000
        if start >= 0:  # the first start may have had to compile
            for column, milliseconds in taken.items():
                columns[column].append(milliseconds)
    publish(Figure("start to first answer", "ms", Better.LESS, columns, ECHO, AIM_START_MS))


async def measure_idle(effort: Effort, publish: Publish) -> None:
    """A connected client that says nothing; resident memory once it is there."""
    wake_ups: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with native(folder) as ours, echo(folder) as theirs:
            sock = await theirs.connect()
            async with session(ours):
                with sock:
                    await trio.sleep(SETTLE_SECONDS)
                    contenders = {NATIVE: ours, ECHO: theirs}
                    before = {c: (p.context_switches(), p.cpu_ms()) for c, p in contenders.items()}
                    await trio.sleep(effort.idle_seconds)
                    for column, process in contenders.items():
                        switches, busy = before[column]
                        wake_ups[column] = [process.context_switches() - switches]
                        cpu[column] = [process.cpu_ms() - busy]
                        memory[column] = [process.memory_kib("VmRSS") / 1024]
    span = f"in {effort.idle_seconds:g} s"
    publish(Figure(f"idle wake-ups {span}", "", Better.LESS, wake_ups, ECHO, AIM_WAKE_UPS))
    publish(Figure(f"idle CPU {span}", "ms", Better.LESS, cpu, ECHO, AIM_WAKE_UPS))
    publish(Figure("resident memory", "MiB", Better.LESS, memory, ECHO, AIM_MIB))


async def measure_members(effort: Effort, publish: Publish) -> None:
    """Resident memory that each further member costs that nobody uses, file pages left out."""
    sizes = []
    for count in (1, 1 + effort.members):
        with (
            tempfile.TemporaryDirectory() as name,
            native_members(Path(name), count) as (ours, _),
        ):
            (await ours.connect()).close()
            await trio.sleep(SETTLE_SECONDS)
            sizes.append(ours.memory_kib("RssAnon"))
    each = (sizes[1] - sizes[0]) / effort.members
    columns = {NATIVE: [each]}
    publish(Figure("memory per idle member", "KiB", Better.LESS, columns, aim=AIM_MEMBER_KIB))

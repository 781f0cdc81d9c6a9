"""Whether anything gets slower as a client maps more: 4 KiB slices of one sealed memfd.

That is what a guest's IOMMU makes of guest memory.  Register accesses go to servers whose clients
have mapped as many slices, in alternation.  Translations (`GuestMemory.view` of 1,500 bytes) are
made in this process, of a ring of 256 buffers that lie anywhere, round and round.  The peer is the
same with one mapping.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from tests.bench.contenders import (
    REGISTER_READ,
    blocking,
    native_members,
    session,
    time_round_trips,
)
from tests.bench.figures import NATIVE, Better, Figure, at_most
from vfio_user_virtio.limits import PAGE_SIZE
from vfio_user_virtio.memory.guest_memory import GuestMemory
from vfio_user_virtio.testing.guest_ram import GuestRam

if TYPE_CHECKING:
    import socket

    from tests.bench.effort import Effort
    from tests.bench.figures import Publish
    from vfio_user_virtio.transport.client import Client

ONE: Final = "1 map"
AIM: Final = at_most(1.1, of_ratio=True)
"""Flat, and a little for the caches of a processor that keeps the larger map."""

PACKET: Final = 1500
BUFFERS: Final = 256
ROUNDS: Final = 20


async def measure_registers(effort: Effort, publish: Publish) -> None:
    times: dict[int, list[float]] = {count: [] for count in effort.maps}
    mapping: dict[int, list[float]] = {}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server, paths = stack.enter_context(native_members(folder, len(effort.maps)))
        clients: dict[int, Client] = {}
        for count, path in zip(effort.maps, paths, strict=True):
            client = await stack.enter_async_context(session(server, path))
            ram = stack.enter_context(GuestRam(count * PAGE_SIZE))
            begin = time.perf_counter()
            await ram.map(client, step=PAGE_SIZE)
            mapping[count] = [(time.perf_counter() - begin) / count * 1e6]
            clients[count] = client
        with ExitStack() as sockets:
            connections: dict[int, socket.socket] = {
                count: sockets.enter_context(blocking(client)) for count, client in clients.items()
            }
            for block in range(-1, effort.blocks):
                for count, sock in connections.items():
                    taken = time_round_trips(sock, REGISTER_READ, effort.round_trips)
                    if block >= 0:
                        times[count].append(statistics.median(taken))
    for count in effort.maps[1:]:
        columns = {NATIVE: times[count], ONE: times[effort.maps[0]]}
        name = f"register read, {count:,} maps"
        publish(Figure(name, "µs", Better.LESS, columns, ONE, AIM))
    for count in effort.maps[1:]:
        name = f"DMA_MAP, each of {count:,}"
        publish(Figure(name, "µs", Better.LESS, {NATIVE: mapping[count]}))


async def measure_translation(effort: Effort, publish: Publish) -> None:
    times: dict[int, list[float]] = {count: [] for count in effort.maps}
    chance = random.Random(1)
    with ExitStack() as stack:
        memories: dict[int, tuple[GuestMemory, list[int]]] = {}
        for count in effort.maps:
            ram = stack.enter_context(GuestRam(count * PAGE_SIZE))
            memory = GuestMemory()
            stack.callback(memory.clear)
            for piece in ram.mappings(step=PAGE_SIZE):
                memory.map(attrs.evolve(piece, fd=os.dup(ram.fd)))
            ring = [ram.iova + chance.randrange(count) * PAGE_SIZE for _ in range(BUFFERS)]
            memories[count] = memory, ring * ROUNDS
        for _ in range(effort.blocks):
            for count, (memory, addresses) in memories.items():
                times[count].append(time_look_ups(memory, addresses))
    for count in effort.maps[1:]:
        columns = {NATIVE: times[count], ONE: times[effort.maps[0]]}
        name = f"translation, {count:,} maps"
        publish(Figure(name, "ns", Better.LESS, columns, ONE, AIM))


def time_look_ups(memory: GuestMemory, addresses: list[int]) -> float:
    """Nanoseconds that each look-up of a packet's buffer takes, its loop included."""
    view = memory.view
    begin = time.perf_counter_ns()
    for address in addresses:
        view(address, PACKET, True)
    return (time.perf_counter_ns() - begin) / len(addresses)

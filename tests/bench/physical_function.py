"""What our server costs on a physical function: the same driver behind it and without it.

To be run inside an inner host whose two VFs are cabled to each other:

    python -m tests.testbed.inner_host --memory 3072 --program -m tests.bench.physical_function

Three ways to the same VF, in turns: the driver's calls go to the kernel's VFIO as they are
(`direct`); they go through a session of ours, which maps the BARs into the driver's process
(`served`); or through one that maps nothing (`trapped`).  All of it is emulated, VF and processor,
so only the ratios mean anything.  Then how long guest memory takes to be mapped, new (nobody has
touched it) and old, and for how long at a time other sessions stand still meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from typing import TYPE_CHECKING, Final

import attrs
import trio

from vfio_user_virtio.backends.vfio.function import VfFunction
from vfio_user_virtio.backends.vfio.opening import OpenOptions, Way, open_function
from vfio_user_virtio.backends.vfio.sysfs import PciAddress
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.loopback import served
from vfio_user_virtio.testing.mapped_bars import MappedBars
from vfio_user_virtio.testing.net_driver import KNOWN_FEATURES, NetDriver
from vfio_user_virtio.testing.virtio_pci import VirtioPci
from vfio_user_virtio.virtio.features import Feature

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vfio_user_virtio.device import DmaMapping, IrqRequest, RegionInfo
    from vfio_user_virtio.transport.client import Client

VFS: Final = ("0000:01:00.1", "0000:01:00.2")
ROUNDS: Final = 3
FRAMES: Final = 200
BURSTS: Final = 40
BURST: Final = 16
PAYLOAD: Final = b"\x88\xb5" + bytes(60)
MEMORY: Final = 1 << 30
TICK: Final = 0.005


class Direct:
    """The client of nobody: what it is asked for, the kernel is asked at once."""

    def __init__(self, function: VfFunction) -> None:
        self._function = function

    async def region_info(self, index: int) -> RegionInfo:
        info = self._function.region_info(index)
        return attrs.evolve(info, fd=None if info.fd is None else os.dup(info.fd))

    async def region_read(self, index: int, offset: int, count: int) -> bytes:
        return await self._function.region_read(index, offset, count)

    async def region_write(
        self, index: int, offset: int, data: bytes, *, no_reply: bool = False
    ) -> None:
        del no_reply
        await self._function.region_write(index, offset, data)

    async def set_irqs(self, request: IrqRequest) -> None:
        if request.eventfds:
            request = attrs.evolve(request, eventfds=tuple(map(os.dup, request.eventfds)))
        await self._function.set_irqs(request)

    async def dma_map(self, mapping: DmaMapping) -> None:
        assert mapping.fd is not None
        await self._function.dma_map(attrs.evolve(mapping, fd=os.dup(mapping.fd)))

    async def dma_unmap(self, iova: int, size: int) -> None:
        await self._function.dma_unmap(iova, size)


@contextlib.asynccontextmanager
async def client_of(function: VfFunction, how: str) -> AsyncIterator[Client | Direct]:
    if how != "direct":
        async with served(function) as client:
            yield client
        return
    try:
        yield Direct(function)
    finally:
        await function.release()


@contextlib.asynccontextmanager
async def driver_of(function: VfFunction, how: str) -> AsyncIterator[tuple[NetDriver, bytes]]:
    """A driver that runs, and its address."""
    with GuestRam() as ram:
        async with client_of(function, how) as client:
            await ram.map(client)
            with contextlib.closing(MappedBars(client)) as bars:
                if how != "trapped":
                    await bars.map_all()
                features = KNOWN_FEATURES & ~Feature.MQ.mask
                driver = NetDriver(await VirtioPci.open(bars), ram, features=features)
                await driver.start()
                yield driver, (await driver.config()).mac
                await driver.stop()


async def packets(functions: list[VfFunction], how: str) -> tuple[float, float]:
    """Microseconds from one driver to the other, and frames a second in bursts."""
    async with (
        driver_of(functions[0], how) as (source, sender),
        driver_of(functions[1], how) as (target, receiver),
    ):
        frame = receiver + sender + PAYLOAD
        times = []
        for _ in range(FRAMES):
            started = time.perf_counter()
            await source.send(frame)
            await target.receive()
            times.append(time.perf_counter() - started)
        started = time.perf_counter()
        for _ in range(BURSTS):
            for _ in range(BURST):
                await source.send(frame)
            for _ in range(BURST):
                await target.receive()
        rate = BURSTS * BURST / (time.perf_counter() - started)
        return statistics.median(times) * 1e6, rate


async def mapping(function: VfFunction) -> None:
    """Map and unmap memory twice, with somebody else on the same event loop."""
    held_up = 0.0

    async def somebody_else() -> None:
        nonlocal held_up
        while True:
            started = time.perf_counter()
            await trio.sleep(TICK)
            held_up = max(held_up, time.perf_counter() - started - TICK)

    with GuestRam(MEMORY) as ram:
        async with served(function) as client, trio.open_nursery() as nursery:
            nursery.start_soon(somebody_else)
            for kind in ("new", "old"):
                held_up = 0.0
                started = time.perf_counter()
                await ram.map(client)
                mapped = time.perf_counter()
                await ram.unmap(client)
                unmapped = time.perf_counter()
                print(
                    f"{kind} memory, {MEMORY >> 20} MiB: mapped in {mapped - started:.2f} s, "
                    f"unmapped in {unmapped - mapped:.2f} s, "
                    f"others held up for {held_up * 1e3:.0f} ms at most"
                )
            nursery.cancel_scope.cancel()


async def main(way: Way) -> None:
    options = OpenOptions(way=way)
    functions = [
        VfFunction(await trio.to_thread.run_sync(open_function, PciAddress.parse(vf), options))
        for vf in VFS
    ]
    print(f"by {way.value}:")
    for _ in range(ROUNDS):
        for how in ("direct", "served", "trapped"):
            latency, rate = await packets(functions, how)
            print(f"{how:8} {latency:6.0f} us one way, {rate:5.0f} frames/s in bursts of {BURST}")
    await mapping(functions[0])
    for function in functions:
        function.close()


if __name__ == "__main__":
    for name in sys.argv[1:] or ("cdev", "group"):
        trio.run(main, Way[name.upper()])

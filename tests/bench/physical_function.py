"""What our server costs on a physical function: the same driver behind it and without it.

To be run inside an inner host with six VFs, cabled in pairs: `physical.py` does so.  On each pair a
driver runs at either end.  On the first the drivers' calls go to the kernel's VFIO as they are
(`direct`, the peer); on the second they go through sessions of ours, which map the BARs into the
drivers' process; on the third through sessions that map nothing.  All three are up at the same time
and take turns every few packets, as this is all emulated, VFs, cables and processor, and any of
that may be held up for milliseconds by something else.
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

from tests.bench.figures import NATIVE, Better, Figure, at_least, at_most
from tests.bench.inside import tell
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

DIRECT: Final = "kernel VFIO"
MAPPED: Final = "BARs mapped"
TRAPPED: Final = "nothing mapped"
PAIRS: Final = {
    DIRECT: ("0000:01:00.1", "0000:01:00.2"),
    MAPPED: ("0000:01:00.3", "0000:01:00.4"),
    TRAPPED: ("0000:01:00.5", "0000:01:00.6"),
}
BURST: Final = 16
PAYLOAD: Final = b"\x88\xb5" + bytes(60)
RAM: Final = 4 << 20
RX_BUFFERS: Final = 64
NOISE: Final = 0.05
"""The aim is 1.0; two columns that are the same differ by so much."""
SECONDS: Final = 30
"""For one block: a frame that was lost would be waited for for ever."""


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
    if how != DIRECT:
        async with served(function) as client:
            yield client
        return
    try:
        yield Direct(function)
    finally:
        await function.release()


async def opened(address: str, way: Way) -> VfFunction:
    options = OpenOptions(way=way)
    where = PciAddress.parse(address)
    return VfFunction(await trio.to_thread.run_sync(open_function, where, options))


@contextlib.asynccontextmanager
async def driver_of(address: str, how: str, way: Way) -> AsyncIterator[NetDriver]:
    """A driver that runs."""
    function = await opened(address, way)
    try:
        with GuestRam(RAM) as ram:
            async with client_of(function, how) as client:
                await ram.map(client)
                with contextlib.closing(MappedBars(client)) as bars:
                    if how != TRAPPED:
                        await bars.map_all()
                    features = KNOWN_FEATURES & ~Feature.MQ.mask
                    pci = await VirtioPci.open(bars)
                    driver = NetDriver(pci, ram, features=features, rx_buffers=RX_BUFFERS)
                    await driver.start()
                    yield driver
                    await driver.stop()
    finally:
        function.close()


@attrs.frozen
class Pair:
    """Two drivers on one cable, and what one sends to the other."""

    source: NetDriver
    target: NetDriver
    frame: bytes

    @classmethod
    async def of(cls, source: NetDriver, target: NetDriver) -> Pair:
        macs = (await target.config()).mac + (await source.config()).mac
        return cls(source, target, macs + PAYLOAD)

    async def latency(self, count: int) -> float:
        """Microseconds from one driver to the other."""
        times = []
        for _ in range(count):
            started = time.perf_counter()
            await self.source.send(self.frame)
            await self.target.receive()
            times.append(time.perf_counter() - started)
        return statistics.median(times) * 1e6

    async def rate(self, count: int) -> float:
        """Packets a second, in bursts, `count` of them in all."""
        bursts = max(1, count // BURST)
        started = time.perf_counter()
        for _ in range(bursts):
            for _ in range(BURST):
                await self.source.send(self.frame)
            for _ in range(BURST):
                await self.target.receive()
        return bursts * BURST / (time.perf_counter() - started)


async def main(way: str, blocks: int, count: int) -> None:
    async with contextlib.AsyncExitStack() as stack:
        pairs = {}
        for how, addresses in PAIRS.items():
            ends = [
                await stack.enter_async_context(driver_of(address, how, Way[way.upper()]))
                for address in addresses
            ]
            pairs[how] = await Pair.of(*ends)
        times: dict[str, list[float]] = {how: [] for how in PAIRS}
        rates: dict[str, list[float]] = {how: [] for how in PAIRS}
        for block in range(-1, blocks):
            for found, measured in ((times, Pair.latency), (rates, Pair.rate)):
                for how, pair in pairs.items():
                    with trio.fail_after(SECONDS):
                        value = await measured(pair, count)
                    if block >= 0:
                        found[how].append(value)
    for how, latency_aim, rate_aim in (
        (MAPPED, at_most(1 + NOISE, of_ratio=True), at_least(1 - NOISE, of_ratio=True)),
        (TRAPPED, None, None),
    ):
        columns = {NATIVE: times[how], DIRECT: times[DIRECT]}
        name = f"VF's packet, {how}, {way}"
        tell(Figure(name, "µs", Better.LESS, columns, DIRECT, latency_aim))
        columns = {NATIVE: rates[how], DIRECT: rates[DIRECT]}
        name = f"bursts of {BURST}, {how}, {way}"
        tell(Figure(name, "packets/s", Better.MORE, columns, DIRECT, rate_aim))


if __name__ == "__main__":
    trio.run(main, sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

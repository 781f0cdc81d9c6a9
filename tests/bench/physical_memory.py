"""How long a VF takes to be opened and a guest's memory to be mapped, and who waits meanwhile.

To be run inside an inner host: `physical.py` does so.  Mapping pins every page.  Pages that nobody
has touched have to be found and cleared first (`new`); those of a VM that has run for a while are
there, as are those of one that was given them beforehand (`there`).  The peer is the same file and
the same ioctl, without a session and without a thread.  While the session maps, a task beside it on
the same event loop wants to run every few milliseconds, as another session would; the peer of how
long it had to wait is how long it had to while nothing was done.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import trio

from tests.bench.figures import NATIVE, Better, Figure
from tests.bench.inside import tell
from tests.bench.physical_function import DIRECT, PAIRS, Direct, opened
from vfio_user_virtio.backends.vfio.opening import OpenOptions, Way, open_function
from vfio_user_virtio.backends.vfio.sysfs import PciAddress
from vfio_user_virtio.device import DmaAccess, DmaMapping
from vfio_user_virtio.testing.loopback import served

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_user_virtio.testing.guest_ram import DmaClient

VF: Final = PAIRS[DIRECT][0]
IOVA: Final = 1 << 32
"""Above the window of interrupts, which nothing may be mapped over."""
MIB: Final = 1 << 20
HUGE_MIB: Final = 2
TICK: Final = 0.005
REPEATS: Final = 3
IDLE_SECONDS: Final = 2
IDLE: Final = "nothing done"


class Memory:
    """A file of `mib` MiB that nobody has touched."""

    def __init__(self, mib: int, *, huge: bool) -> None:
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB if huge else 0)
        self._fd = os.memfd_create("guest", flags)
        os.ftruncate(self._fd, mib * MIB)
        self._mapping = DmaMapping(IOVA, mib * MIB, DmaAccess.READ | DmaAccess.WRITE, self._fd, 0)

    async def map_and_unmap(self, client: DmaClient) -> tuple[float, float]:
        """Seconds of either."""
        started = time.perf_counter()
        await client.dma_map(self._mapping)
        mapped = time.perf_counter()
        await client.dma_unmap(self._mapping.iova, self._mapping.size)
        return mapped - started, time.perf_counter() - mapped

    def close(self) -> None:
        os.close(self._fd)


@attrs.define
class Bystander:
    """Somebody else on the same event loop; `worst`: seconds that it was late at most."""

    worst: float = 0.0

    async def run(self) -> None:
        while True:
            started = time.perf_counter()
            await trio.sleep(TICK)
            self.worst = max(self.worst, time.perf_counter() - started - TICK)

    def start_again(self) -> None:
        self.worst = 0.0


async def measure(way: Way, mib: int, *, huge: bool, with_peer: bool) -> None:
    """Tells: mapping of new pages, of pages that are there, unmapping, how long others waited."""
    function = await opened(VF, way)
    bystander = Bystander()
    late: dict[str, dict[str, list[float]]] = {"new": {}, "there": {}}
    taken: dict[str, dict[str, list[float]]] = {
        what: {NATIVE: []} for what in ("new", "there", "unmapped")
    }
    contenders: list[tuple[str, Memory]] = [(NATIVE, Memory(mib, huge=huge))]
    if with_peer:
        for column in taken.values():
            column[DIRECT] = []
        contenders.append((DIRECT, Memory(mib, huge=huge)))
    async with served(function) as session, trio.open_nursery() as nursery:
        nursery.start_soon(bystander.run)
        clients: dict[str, DmaClient] = {NATIVE: session, DIRECT: Direct(function)}
        await trio.sleep(IDLE_SECONDS)
        idle = bystander.worst
        for repeat in range(1 + REPEATS):
            kind = "there" if repeat else "new"
            for name, memory in contenders:
                bystander.start_again()
                mapped, unmapped = await memory.map_and_unmap(clients[name])
                taken[kind][name].append(mapped)
                if repeat:
                    taken["unmapped"][name].append(unmapped)
                if name == NATIVE:
                    late[kind].setdefault(NATIVE, []).append(bystander.worst * 1e3)
                    late[kind].setdefault(IDLE, []).append(idle * 1e3)
        nursery.cancel_scope.cancel()
    function.close()
    for _, memory in contenders:
        memory.close()
    where = f"{mib} MiB of {'2 MiB' if huge else '4 KiB'} pages, {way.name.lower()}"
    peer = DIRECT if with_peer else None
    for what, columns in taken.items():
        name = f"{where}: {what}" if what == "unmapped" else f"{where}: mapped, {what}"
        tell(Figure(name, "s", Better.LESS, columns, peer))
    for kind, columns in late.items():
        tell(Figure(f"{where}: others late, {kind}", "ms", Better.LESS, columns, IDLE))


async def measure_opening(way: Way) -> None:
    """The kernel's open, which resets the VF, against open and session."""
    times: dict[str, list[float]] = {NATIVE: [], DIRECT: []}
    options = OpenOptions(way=way)
    for _ in range(REPEATS):
        started = time.perf_counter()
        function = await opened(VF, way)
        async with served(function) as client:
            await client.region_info(0)
            times[NATIVE].append((time.perf_counter() - started) * 1e3)
        function.close()
        started = time.perf_counter()
        plain = await trio.to_thread.run_sync(open_function, PciAddress.parse(VF), options)
        times[DIRECT].append((time.perf_counter() - started) * 1e3)
        plain.close()
    tell(Figure(f"VF opened, {way.name.lower()}", "ms", Better.LESS, times, DIRECT))


def have_huge_pages(mib: int) -> bool:
    """Whether there are so many now."""
    path = Path("/proc/sys/vm/nr_hugepages")
    wanted = -(-mib // HUGE_MIB)
    path.write_text(str(wanted))
    return int(path.read_text()) >= wanted


async def main(way_name: str, sizes: Sequence[int]) -> None:
    """`sizes`: in MiB; with a peer only the first, as the largest takes minutes."""
    way = Way[way_name.upper()]
    await measure_opening(way)
    for number, size in enumerate(sizes):
        with_peer = not number
        await measure(way, size, huge=False, with_peer=with_peer)
        if have_huge_pages(size * (1 + with_peer)):
            await measure(way, size, huge=True, with_peer=with_peer)
        else:
            print(f"no {size} MiB of huge pages to be had")
        have_huge_pages(0)


if __name__ == "__main__":
    trio.run(main, sys.argv[1], [int(size) for size in sys.argv[2:]])

"""VFs of QEMU's SR-IOV device, served by our session to our guest driver, over real kernel VFIO.

VF 1 and VF 2 are cabled outside (`InnerHost.vfs_cabled`): a frame that one sends goes through the
IOMMU, out of QEMU's network backend, back in, and into the memory of the other's guest.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from vfio_user_virtio.backends.vfio import sysfs
from vfio_user_virtio.backends.vfio.function import VfFunction
from vfio_user_virtio.backends.vfio.opening import OpenOptions, Way, open_function
from vfio_user_virtio.backends.vfio.sysfs import PciAddress
from vfio_user_virtio.device import U64_END, DmaAccess, DmaMapping, IrqAction, IrqRequest, VfioIrq
from vfio_user_virtio.errors import RemoteError
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.loopback import served
from vfio_user_virtio.testing.mapped_bars import MappedBars
from vfio_user_virtio.testing.net_driver import KNOWN_FEATURES, NetDriver
from vfio_user_virtio.testing.virtio_pci import VirtioPci
from vfio_user_virtio.transport import session as sessions
from vfio_user_virtio.virtio.features import Feature

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.inner.conftest import InnerFacts
    from vfio_user_virtio.transport.client import Client

WAYS = {"group": Way.GROUP, "cdev": Way.CDEV}
PATIENCE = 20.0
READ_WRITE = DmaAccess.READ | DmaAccess.WRITE
FEATURES = KNOWN_FEATURES & ~Feature.MQ.mask
ETHERTYPE = b"\x88\xb5"


@contextlib.contextmanager
def opened(address: str, way: str, *, map_bars: bool = True) -> Iterator[VfFunction]:
    options = OpenOptions(way=WAYS[way])
    function = VfFunction(open_function(PciAddress.parse(address), options), map_bars=map_bars)
    try:
        yield function
    finally:
        function.close()


@attrs.frozen
class Guest:
    """A guest of one VF: its driver, its client, and the BARs that it has mapped."""

    driver: NetDriver
    client: Client
    bars: MappedBars
    ram: GuestRam
    mac: bytes


@contextlib.asynccontextmanager
async def guest_of(function: VfFunction) -> AsyncIterator[Guest]:
    with GuestRam() as ram:
        async with served(function, name=function.name) as client:
            await ram.map(client)
            with contextlib.closing(MappedBars(client)) as bars:
                await bars.map_all()
                driver = NetDriver(await VirtioPci.open(bars), ram, features=FEATURES)
                await driver.start()
                yield Guest(driver, client, bars, ram, (await driver.config()).mac)
                await driver.stop()


@contextlib.asynccontextmanager
async def two_guests(
    inner: InnerFacts, way: str, *, map_bars: bool = True
) -> AsyncIterator[tuple[Guest, Guest]]:
    first, second = inner.vfs[:2]
    with (
        opened(first, way, map_bars=map_bars) as one,
        opened(second, way, map_bars=map_bars) as other,
    ):
        async with guest_of(one) as left, guest_of(other) as right:
            yield left, right


async def exchange(left: Guest, right: Guest, count: int, *, late: bytes | None = None) -> None:
    """`count` frames each way, one after the other, all bytes checked; `late` ones do not count."""
    for number in range(count):
        payload = bytes((number & 0xFF,)) * (46 + 50 * (number % 20))
        for source, target in ((left, right), (right, left)):
            frame = target.mac + source.mac + ETHERTYPE + payload
            await source.driver.send(frame)
            with trio.fail_after(PATIENCE):
                while (received := (await target.driver.receive()).data) == late:
                    pass
            assert received == frame


# --- packets ------------------------------------------------------------------------------------


async def test_packets_out_and_in(inner: InnerFacts, way: str) -> None:
    async with two_guests(inner, way) as (left, right):
        await exchange(left, right, 20)


async def test_packets_when_nothing_may_be_mapped(inner: InnerFacts, way: str) -> None:
    async with two_guests(inner, way, map_bars=False) as (left, right):
        await exchange(left, right, 5)
        assert left.bars.stores == right.bars.stores == 0


async def test_a_packet_does_not_wake_the_server(
    inner: InnerFacts, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No message, no call of the device, no task of the server that runs."""
    calls: list[str] = []
    for name in ("region_read", "region_write", "set_irqs", "dma_map", "dma_unmap", "work"):
        original = getattr(VfFunction, name)

        def counted(
            self: VfFunction, *args: object, original: object = original, name: str = name
        ) -> object:
            calls.append(name)
            return original(self, *args)  # type: ignore[operator]

        monkeypatch.setattr(VfFunction, name, counted)

    for map_bars in (True, False):
        async with two_guests(inner, way, map_bars=map_bars) as (left, right):
            await exchange(left, right, 2)
            received = left.client.endpoint.bytes_received + right.client.endpoint.bytes_received
            calls.clear()
            schedule = Schedule()
            trio.lowlevel.add_instrument(schedule)
            await exchange(left, right, 25)
            trio.lowlevel.remove_instrument(schedule)
            after = left.client.endpoint.bytes_received + right.client.endpoint.bytes_received
            woken = {name for name in schedule.ran if sessions.__name__ in name}
            if map_bars:
                assert (calls, after - received, woken) == ([], 0, set())
            else:  # what is counted does count: every doorbell is a message here
                assert calls.count("region_write") >= 50
                assert woken


class Schedule(trio.abc.Instrument):
    """Which tasks run."""

    def __init__(self) -> None:
        self.ran: set[str] = set()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.ran.add(task.name)


async def test_a_session_after_another(inner: InnerFacts, way: str) -> None:
    """Nothing is left of the first, and the second works."""
    first, second = inner.vfs[:2]
    with opened(first, way) as one, opened(second, way) as other:
        async with guest_of(other) as peer:
            for _ in range(2):
                before = len(os.listdir("/proc/self/fd"))
                async with guest_of(one) as guest:
                    await exchange(guest, peer, 2)
                assert len(os.listdir("/proc/self/fd")) == before
                assert one.memory.pinned_bytes == 0
                command = await one.region_read(7, 4, 2)
                assert not command[0] & 4, "the device may still master the bus"
                assert (await one.region_read(4, 20, 1)) == b"\0", "it was not reset"


async def test_a_client_that_vanishes(inner: InnerFacts, way: str) -> None:
    """Killed in mid-traffic, with memory mapped and interrupts armed: the device is quiet."""
    first, second = inner.vfs[:2]
    with opened(first, way) as one, opened(second, way) as other:
        async with guest_of(other) as peer:
            with GuestRam() as ram:
                async with served(one) as client:
                    await ram.map(client)
                    bars = MappedBars(client)
                    await bars.map_all()
                    driver = NetDriver(await VirtioPci.open(bars), ram, features=FEATURES)
                    await driver.start()
                    mac = (await driver.config()).mac
                    bars.close()
                assert one.memory.pinned_bytes == 0
                late = mac + peer.mac + ETHERTYPE + b"late" * 20
                for _ in range(5):
                    await peer.driver.send(late)
                await peer.driver.flush()
                assert not driver.received()
            async with guest_of(one) as guest:  # for which QEMU's network has kept them
                await exchange(guest, peer, 2, late=late)


# --- resets -------------------------------------------------------------------------------------


async def test_resets(inner: InnerFacts, way: str) -> None:
    """By the client, by the guest (FLR), and by the driver; each time it works again."""
    async with two_guests(inner, way) as (left, right):
        pci = left.driver.pci
        for reset in (left.client.reset, pci.function_level_reset, pci.reset):
            await exchange(left, right, 1)
            await reset()
            assert await pci.status() == 0
            await left.driver.start()
            await exchange(left, right, 1)


# --- interrupts ---------------------------------------------------------------------------------


async def test_vectors_one_by_one_and_disarmed(inner: InnerFacts, way: str) -> None:
    with opened(inner.vfs[0], way) as function:
        async with served(function) as client:
            count = (await client.irq_info(VfioIrq.MSIX)).count
            assert count >= 2
            assert (await client.irq_info(VfioIrq.INTX)).count == 0
            trigger = IrqAction.TRIGGER
            await client.set_irqs(IrqRequest(VfioIrq.MSIX, 0, 0, trigger))
            await client.set_irqs(IrqRequest(VfioIrq.MSIX, 0, 1, trigger, eventfds=()))
            eventfds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]
            for vector, eventfd in enumerate(eventfds):
                await client.set_irqs(
                    IrqRequest(VfioIrq.MSIX, vector, 1, trigger, eventfds=(eventfd,))
                )
            await client.set_irqs(IrqRequest(VfioIrq.MSIX, 1, 1, trigger))  # the kernel's loopback
            assert os.eventfd_read(eventfds[1]) == 1
            with pytest.raises(BlockingIOError):
                os.eventfd_read(eventfds[0])
            await client.set_irqs(IrqRequest(VfioIrq.MSIX, 0, 0, trigger))
            await client.set_irqs(IrqRequest(VfioIrq.MSIX, 0, 0, trigger))
            with pytest.raises(RemoteError) as caught:
                await client.set_irqs(IrqRequest(VfioIrq.MSIX, 0, 1, IrqAction.MASK))
            assert caught.value.errno in (errno.ENOTTY, errno.EINVAL)
            for eventfd in eventfds:
                os.close(eventfd)


# --- memory -------------------------------------------------------------------------------------


async def test_maps_and_unmaps(inner: InnerFacts, way: str) -> None:
    with opened(inner.vfs[0], way) as function, GuestRam(1 << 20) as ram:
        async with served(function) as client:
            await ram.map(client, step=4096)  # page by page, as behind a vIOMMU
            assert function.memory.pinned_bytes == 1 << 20
            for shift in range(32, 64):
                await client.dma_unmap(1 << shift, 1 << shift)
            assert function.memory.pinned_bytes == 1 << 20
            await client.dma_unmap(ram.iova + 4096, 3 * 4096)
            await client.dma_unmap(ram.iova, 1 << 20)  # with a gap in it
            assert function.memory.pinned_bytes == 0
            await ram.map(client)
            await client.dma_unmap(0, U64_END)
            await ram.map(client)
            for wrong in (
                DmaMapping(ram.iova, 4096, READ_WRITE, ram.fd),
                DmaMapping(0xFEE0_0000, 4096, READ_WRITE, ram.fd),
            ):
                with pytest.raises(RemoteError) as caught:
                    await client.dma_map(wrong)
                assert caught.value.errno in (errno.EEXIST, errno.EINVAL)


async def test_memory_limit(inner: InnerFacts, way: str, caplog: pytest.LogCaptureFixture) -> None:
    """Without CAP_IPC_LOCK, which root has: the kernel's own refusal, and our remedy."""
    limits = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    with opened(inner.vfs[0], way) as function, GuestRam(4 << 20) as ram:
        async with served(function) as client:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, limits[1]))
            try:
                with without_ipc_lock(), pytest.raises(RemoteError) as caught:
                    await ram.map(client)
            finally:
                resource.setrlimit(resource.RLIMIT_MEMLOCK, limits)
            assert caught.value.errno == errno.ENOMEM
            assert "LimitMEMLOCK" in caplog.text
            await ram.map(client)


@contextlib.contextmanager
def without_ipc_lock() -> Iterator[None]:
    """Give the effective capability up for the block: capset(2) by way of the effective user."""
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# --- the kernel wants it back -------------------------------------------------------------------


async def test_unbound_under_a_running_guest(
    inner: InnerFacts, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The session ends, the device is given back, and it can be bound and opened again."""
    address = inner.vfs[0]
    driver = "/sys/bus/pci/drivers/vfio-pci"
    with opened(address, way) as function, GuestRam() as ram:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(function.watch)
            async with served(function) as client:
                await ram.map(client)
                nursery.start_soon(trio.to_thread.run_sync, write_text, f"{driver}/unbind", address)
                with trio.fail_after(PATIENCE):
                    await client.lost.wait()
    assert "the kernel wants the device back" in caplog.text
    assert sysfs.driver(PciAddress.parse(address)) is None
    await trio.to_thread.run_sync(write_text, "/sys/bus/pci/drivers_probe", address)
    with opened(address, way):
        pass


def write_text(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)

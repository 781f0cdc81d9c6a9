"""The bindings, each with the real library and a real client; the server has no event loop."""

from __future__ import annotations

import contextlib
import errno
import os
import select
from typing import TYPE_CHECKING, Final

import attrs
import pytest
import trio

from vfio_user_virtio.device import (
    DmaAccess,
    DmaMapping,
    FeatureOperation,
    IrqAction,
    IrqRequest,
    LoggingReport,
    LoggingStart,
    RegionFlags,
    SparseArea,
    VfioIrq,
    VfioRegion,
)
from vfio_user_virtio.errors import RemoteError
from vfio_user_virtio.libvfio_user import (
    CapabilityFlag,
    Context,
    DmaRegion,
    Irq,
    LogLevel,
    MigrationState,
    PciType,
    Protection,
    Region,
    RegionFlag,
    ResetKind,
)
from vfio_user_virtio.protocol import migration as wire
from vfio_user_virtio.protocol.dma_logging import (
    LOGGING_REPORT_SIZE,
    encode_logging_report_request,
    encode_logging_start,
)
from vfio_user_virtio.protocol.feature import Feature
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.transport.client import connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from vfio_user_virtio.libvfio_user import Library
    from vfio_user_virtio.transport.client import Client

PAGE: Final = 4096
MSI: Final = bytes.fromhex("05 00 80 00").ljust(24, b"\0")
VENDOR_SPECIFIC: Final = bytes.fromhex("09 00 08 aa bb cc dd ee")
SERIAL_NUMBER: Final = bytes.fromhex("03 00 01 00 11 22 33 44 55 66 77 88")


@pytest.fixture
def context(library: Library, tmp_path: Path) -> Iterator[Context]:
    with Context(library, tmp_path / "s") as made:
        yield made
    assert not (tmp_path / "s").exists()


@contextlib.asynccontextmanager
async def client_of(context: Context, path: Path) -> AsyncIterator[Client]:
    """A client of `context`, which is served in a thread until the client goes."""
    context.realize()

    def serve() -> None:
        poll = select.poll()
        poll.register(context.poll_fd, select.POLLIN)
        poll.poll()
        assert context.attach()
        with contextlib.suppress(OSError):
            while True:
                poll = select.poll()
                poll.register(context.poll_fd, select.POLLIN)
                poll.poll()
                context.run()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, serve)
        async with connect(path) as client:
            yield client


def test_what_the_library_refuses_is_an_os_error(library: Library, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="vfu_create_ctx at"):
        Context(library, tmp_path / "nowhere/s")
    with Context(library, tmp_path / "s") as context:
        with pytest.raises(OSError, match="vfu_run_ctx") as caught:
            context.run()
        assert caught.value.errno == errno.EINVAL, "not realized"
        with pytest.raises(OSError, match="vfu_setup_region"):
            context.setup_region(Region.BAR0, 12288)
        context.realize()
        assert not context.attach(), "nobody is there"
    with pytest.raises(ValueError, match="closed"):
        context.realize()
    context.close()


def test_what_would_end_the_process_is_a_value_error(context: Context) -> None:
    with pytest.raises(ValueError, match="pci_init"):
        context.pci_set_id(1, 2)
    with pytest.raises(ValueError, match="setup_dma"):
        context.scatter(0, 1)
    context.setup_dma()
    with pytest.raises(ValueError, match="already"):
        context.setup_dma()


def test_configuration_space_and_capabilities(context: Context) -> None:
    context.pci_init(PciType.EXPRESS)
    context.pci_set_id(0x1234, 0x5678, 0x9ABC, 0xDEF0)
    context.pci_set_class(0x02, 0x00)
    msi = context.pci_add_capability(MSI)
    first = context.pci_add_capability(VENDOR_SPECIFIC, flags=CapabilityFlag.READ_ONLY)
    second = context.pci_add_capability(VENDOR_SPECIFIC, position=0x80)
    serial = context.pci_add_capability(SERIAL_NUMBER, flags=CapabilityFlag.EXTENDED)
    assert (second, serial) == (0x80, 0x100)
    config = context.config_space()
    assert len(config) == 4096
    assert config[:4] == bytes.fromhex("34127856")
    assert config[0x2C:0x30] == bytes.fromhex("bc9af0de")
    assert config[11] == 2
    assert config[first + 2 : first + 8] == VENDOR_SPECIFIC[2:]
    assert config[0x104:0x10C] == SERIAL_NUMBER[4:]
    assert context.pci_find_capability(5) == msi
    assert context.pci_find_capability(9) == first
    assert context.pci_find_capability(9, after=first) == second
    assert context.pci_find_capability(9, after=second) is None
    assert context.pci_find_capability(3, extended=True) == serial
    assert context.pci_find_capability(17) is None


def test_the_log_is_told_and_filtered(context: Context) -> None:
    told: list[tuple[LogLevel, str]] = []
    context.setup_log(lambda level, text: told.append((level, text)), LogLevel.INFO)
    context.log(LogLevel.INFO, "100 % of %s")
    context.log(LogLevel.DEBUG, "too much")
    assert told == [(LogLevel.INFO, "100 % of %s")]


async def test_regions_with_callbacks_and_files(context: Context, tmp_path: Path) -> None:
    written: list[tuple[int, bytes]] = []
    fd = os.memfd_create("region")
    os.ftruncate(fd, 5 * PAGE)
    context.setup_region(
        Region.BAR0,
        PAGE,
        read=lambda offset, count: bytes(range(offset, offset + count)),
        write=lambda offset, data: written.append((offset, bytes(data))),
    )
    context.setup_region(
        Region.BAR2,
        4 * PAGE,
        flags=RegionFlag.READ | RegionFlag.MEM,
        areas=[(PAGE, PAGE), (3 * PAGE, PAGE)],
        fd=fd,
        offset=PAGE,
    )
    async with client_of(context, tmp_path / "s") as client:
        assert await client.region_read(VfioRegion.BAR0, 16, 4) == bytes(range(16, 20))
        await client.region_write(VfioRegion.BAR0, 8, b"eight")
        assert written == [(8, b"eight")]
        info = await client.region_info(VfioRegion.BAR2)
        assert info.fd is not None
        os.pwrite(info.fd, b"shared", PAGE)
        os.close(info.fd)
        assert (info.size, info.fd_offset) == (4 * PAGE, PAGE)
        assert info.flags == RegionFlags.READ | RegionFlags.MMAP
        assert info.areas == (SparseArea(PAGE, PAGE), SparseArea(3 * PAGE, PAGE))
    assert os.pread(fd, 6, PAGE) == b"shared"
    os.close(fd)


async def test_callbacks_refuse_with_an_errno_and_fail_with_what_they_raise(
    context: Context, tmp_path: Path
) -> None:
    def read(offset: int, count: int) -> bytes:
        if offset:
            raise OSError(errno.ENOSPC, "no")
        return bytes(count + 1)

    context.setup_region(Region.BAR0, PAGE, read=read)
    context.realize()
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            await trio.lowlevel.wait_readable(context.poll_fd)
            assert await trio.to_thread.run_sync(context.attach)  # which waits for VERSION
            await trio.to_thread.run_sync(run)

        def run() -> None:
            poll = select.poll()
            poll.register(context.poll_fd, select.POLLIN)
            poll.poll()
            assert context.run() == 1, "a refusal is an answer"
            poll.poll()
            with pytest.raises(ValueError, match="memoryview"):
                context.run()

        nursery.start_soon(serve)
        async with connect(tmp_path / "s") as client:
            with pytest.raises(RemoteError) as caught:
                await client.region_read(VfioRegion.BAR0, 4, 4)
            assert caught.value.errno == errno.ENOSPC
            with pytest.raises(RemoteError) as caught:
                await client.region_read(VfioRegion.BAR0, 0, 4)
            assert caught.value.errno == errno.EIO


async def test_interrupts_and_resets(context: Context, tmp_path: Path) -> None:
    masked: list[tuple[int, int, bool]] = []
    resets: list[ResetKind] = []
    context.setup_irqs(Irq.MSIX, 4)
    context.setup_irqs(Irq.INTX, 1)
    context.setup_irq_state(Irq.INTX, lambda *change: masked.append(change))
    context.setup_reset(resets.append)
    eventfd = os.eventfd(0)
    async with client_of(context, tmp_path / "s") as client:
        assert (await client.irq_info(VfioIrq.MSIX)).count == 4
        with pytest.raises(FileNotFoundError):
            context.irq_trigger(3)
        await client.set_irqs(IrqRequest(VfioIrq.MSIX, 3, 1, IrqAction.TRIGGER, (eventfd,)))
        context.irq_trigger(3)
        assert os.eventfd_read(eventfd) == 1
        await client.set_irqs(IrqRequest(VfioIrq.INTX, 0, 1, IrqAction.MASK))
        await client.set_irqs(IrqRequest(VfioIrq.INTX, 0, 1, IrqAction.UNMASK))
        assert masked == [(0, 1, True), (0, 1, False)]
        await client.reset()
    os.close(eventfd)
    assert resets == [ResetKind.DEVICE, ResetKind.LOST_CONNECTION]


async def test_guest_memory(context: Context, tmp_path: Path) -> None:
    registered: list[DmaRegion] = []
    unregistered: list[int] = []
    context.setup_dma(
        register=registered.append, unregister=lambda region: unregistered.append(region.iova)
    )
    with GuestRam(4 * PAGE) as ram:
        async with client_of(context, tmp_path / "s") as client:
            both = DmaAccess.READ | DmaAccess.WRITE
            await client.dma_map(DmaMapping(ram.iova, PAGE, DmaAccess.READ, ram.fd, 0))
            rest = DmaMapping(ram.iova + PAGE, 3 * PAGE, both, ram.fd, PAGE)
            await client.dma_map(rest)
            first, second = registered
            assert (first.iova, first.size, first.protection) == (ram.iova, PAGE, Protection.READ)
            assert second.memory is not None
            second.memory[:4] = b"here"
            assert bytes(ram.view(ram.iova + PAGE, 4)) == b"here"

            across = context.scatter(ram.iova + PAGE - 2, 6)
            assert (across.pieces, across.is_mappable) == (2, True)
            with across.map() as pieces:
                assert b"".join(pieces) == b"\0\0here"
                assert all(piece.readonly for piece in pieces)
            with pytest.raises(PermissionError):
                context.scatter(ram.iova, 4, Protection.WRITE)
            with pytest.raises(FileNotFoundError):
                context.scatter(ram.iova + 4 * PAGE, 1)
            there = context.scatter(ram.iova + PAGE, 4, Protection.READ | Protection.WRITE)
            assert there.read() == b"here"
            there.write(b"gone")
            assert bytes(ram.view(ram.iova + PAGE, 4)) == b"gone"
            with pytest.raises(ValueError, match="3 bytes are not the 4"):
                there.write(b"now")
            await client.dma_unmap(ram.iova, PAGE)
            assert unregistered == [ram.iova]
    assert unregistered == [ram.iova, ram.iova + PAGE]


@attrs.define
class Recorder:
    """A device that migrates, and writes down how."""

    states: list[MigrationState] = attrs.field(factory=list)
    data: bytes = b"state of the device"
    loaded: bytes = b""

    def transition(self, state: MigrationState) -> None:
        if state is MigrationState.PRE_COPY:
            raise OSError(errno.EBUSY, "not now")
        self.states.append(state)

    def read_data(self, count: int) -> bytes:
        data, self.data = self.data[:count], self.data[count:]
        return data

    def write_data(self, data: memoryview) -> None:
        self.loaded += data


async def set_state(client: Client, state: wire.MigrationState) -> None:
    data = wire.encode_device_state(state)
    await client.feature(Feature.MIG_DEVICE_STATE, FeatureOperation.SET, data)


async def test_migration_and_quiesce(context: Context, tmp_path: Path) -> None:
    recorder = Recorder()
    rests: list[int] = []
    context.setup_migration(recorder)
    context.setup_quiesce(lambda: rests.append(len(recorder.states)))
    async with client_of(context, tmp_path / "s") as client:
        with pytest.raises(RemoteError) as caught:
            await set_state(client, wire.MigrationState.PRE_COPY)
        assert caught.value.errno == errno.EBUSY
        await set_state(client, wire.MigrationState.STOP_COPY)
        assert recorder.states == [MigrationState.STOP, MigrationState.STOP_AND_COPY]
        assert await client.migration_read(8) == b"state of"
        assert await client.migration_read(100) == b" the device"
        assert await client.migration_read(100) == b""
        await set_state(client, wire.MigrationState.RESUMING)
        await client.migration_write(b"another")
        assert recorder.loaded == b"another"
        await set_state(client, wire.MigrationState.RUNNING)
    assert recorder.states[-3:] == [
        MigrationState.RESUME,
        MigrationState.STOP,
        MigrationState.RUNNING,
    ]
    assert rests[:3] == [0, 0, 2]


async def test_a_device_that_quiesces_later(context: Context, tmp_path: Path) -> None:
    resets: list[ResetKind] = []

    def busy() -> None:
        raise OSError(errno.EBUSY, "in the middle of something")

    context.setup_reset(resets.append)
    context.setup_quiesce(busy)
    context.realize()

    async def serve() -> None:
        await trio.lowlevel.wait_readable(context.poll_fd)
        await trio.to_thread.run_sync(context.attach)
        await trio.lowlevel.wait_readable(context.poll_fd)
        for _ in range(2):
            with pytest.raises(OSError, match="vfu_run_ctx") as caught:
                context.run()
            assert caught.value.errno == errno.EBUSY
        assert resets == []
        context.quiesced()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        async with connect(tmp_path / "s") as client:
            await client.reset()
            assert resets == [ResetKind.DEVICE]


async def test_dirty_pages(context: Context, tmp_path: Path) -> None:
    context.setup_dma(unregister=lambda region: None)
    context.setup_migration(Recorder())
    with GuestRam(16 * PAGE) as ram:
        async with client_of(context, tmp_path / "s") as client:
            await ram.map(client)
            start = encode_logging_start(LoggingStart(PAGE))
            await client.feature(Feature.DMA_LOGGING_START, FeatureOperation.SET, start)
            with context.scatter(ram.iova + 3 * PAGE, 1, Protection.WRITE).map():
                pass
            context.scatter(ram.iova + 9 * PAGE, 2 * PAGE, Protection.WRITE).mark_dirty()
            report = encode_logging_report_request(LoggingReport(ram.iova, 16 * PAGE, PAGE))
            reply = await client.feature(
                Feature.DMA_LOGGING_REPORT,
                FeatureOperation.GET,
                report,
                room=LOGGING_REPORT_SIZE + 8,
            )
            assert reply[LOGGING_REPORT_SIZE:] == bytes([1 << 3, 0b110, 0, 0, 0, 0, 0, 0])

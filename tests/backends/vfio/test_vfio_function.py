"""A function served to a client by a real session, over the model kernel."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import struct
from typing import TYPE_CHECKING

import pytest
import trio

from tests.backends.vfio.model_kernel import NORESIZE
from vfio_user_virtio import limits
from vfio_user_virtio.backends.vfio.areas import Hole
from vfio_user_virtio.backends.vfio.function import VfFunction
from vfio_user_virtio.backends.vfio.opening import OpenOptions, Way
from vfio_user_virtio.backends.vfio.uapi import DeviceIoctl
from vfio_user_virtio.device import (
    U64_END,
    DmaAccess,
    DmaMapping,
    IrqAction,
    IrqFlags,
    IrqRequest,
    RegionFlags,
    SparseArea,
    VfioIrq,
    VfioRegion,
)
from vfio_user_virtio.errors import ConnectionLost, RemoteError
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.loopback import served
from vfio_user_virtio.testing.mapped_bars import MappedBars

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.backends.vfio.model_kernel import ModelKernel

WAYS = pytest.mark.parametrize("way", [Way.CDEV, Way.GROUP])
READ_WRITE = DmaAccess.READ | DmaAccess.WRITE
TRIGGER = IrqAction.TRIGGER


@contextlib.contextmanager
def function_of(
    model: ModelKernel,
    way: Way = Way.CDEV,
    *,
    map_bars: bool = True,
    trapped: tuple[Hole, ...] = (),
) -> Iterator[VfFunction]:
    """The function, opened; in the end nothing of it is left."""
    before = len(os.listdir("/proc/self/fd"))
    function = VfFunction(model.open(OpenOptions(way=way)), map_bars=map_bars, trapped=trapped)
    try:
        yield function
    finally:
        function.close()
    assert model.mappings == {}
    assert model.irqs.keys() <= {VfioIrq.REQ}
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
async def function(model: ModelKernel) -> AsyncIterator[VfFunction]:
    with function_of(model) as opened:
        yield opened


# --- what it is ---------------------------------------------------------------------------------


async def test_what_a_client_sees(function: VfFunction) -> None:
    async with served(function) as client:
        info = await client.device_info()
        assert (info.num_regions, info.num_irqs) == (9, 5)
        assert int(info.flags) == 3
        sizes = [(await client.region_info(index)).size for index in (0, 6, 7, 8)]
        assert sizes == [0, 0, 4096, 0]
        irqs = [await client.irq_info(index) for index in range(5)]
        assert [irq.count for irq in irqs] == [1, 0, 4, 0, 1]


async def test_the_msix_table_cannot_be_mapped(function: VfFunction) -> None:
    async with served(function) as client:
        bars = MappedBars(client)
        assert await bars.map_all() == [
            (1, SparseArea(0x1000, 0x2000)),
            (4, SparseArea(0, 0x4000)),
        ]
        bars.close()


async def test_what_is_trapped_cannot_be_mapped(model: ModelKernel) -> None:
    with function_of(model, trapped=(Hole(4, 0x1000, 1),)) as function:
        areas = function.region_info(4).areas
        assert areas == (SparseArea(0, 0x1000), SparseArea(0x2000, 0x2000))


async def test_mapping_can_be_turned_off(model: ModelKernel) -> None:
    with function_of(model, map_bars=False) as function:
        for index in range(9):
            region = function.region_info(index)
            assert region.fd is None
            assert not region.flags & RegionFlags.MMAP


async def test_a_mapped_register_is_the_devices(model: ModelKernel, function: VfFunction) -> None:
    async with served(function) as client:
        bars = MappedBars(client)
        await bars.map_all()
        await bars.region_write(4, 0x3004, b"\x01\x02")
        assert bars.stores == 1
        assert model.registers(4, 0x3004, 2) == b"\x01\x02"
        bars.close()


# --- registers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4, 8, 300])
async def test_registers(model: ModelKernel, function: VfFunction, count: int) -> None:
    data = bytes(range(1, 256)) * 2
    async with served(function) as client:
        await client.region_write(4, 0x100, data[:count])
        assert model.registers(4, 0x100, count) == data[:count]
        assert await client.region_read(4, 0x100, count) == data[:count]


@pytest.mark.parametrize("sizes", [(1,), (2,), (4,), (4, 4)])
async def test_accesses_are_as_wide_as_they_were_asked(
    function: VfFunction, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]
) -> None:
    seen: list[tuple[int, int]] = []
    pread, pwrite = os.pread, os.pwrite

    def read(fd: int, count: int, offset: int) -> bytes:
        seen.append((offset, count))
        return pread(fd, count, offset)

    def write(fd: int, data: bytes, offset: int) -> int:
        seen.append((offset, len(data)))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pread", read)
    monkeypatch.setattr(os, "pwrite", write)
    await function.region_read(4, 8, sum(sizes))
    await function.region_write(4, 8, memoryview(bytes(sum(sizes))))
    base = function._device.regions[4].offset
    once = [(base + 8 + sum(sizes[:index]), size) for index, size in enumerate(sizes)]
    assert seen == once * 2


async def test_a_register_that_fails_is_an_answer(function: VfFunction) -> None:
    os.ftruncate(function._device.fd, 0)  # reads come back short, as from a device that has gone
    async with served(function) as client:
        with pytest.raises(RemoteError) as caught:
            await client.region_read(4, 0, 4)
        assert caught.value.errno == errno.EIO


async def test_reset(model: ModelKernel, function: VfFunction) -> None:
    async with served(function) as client:
        await client.reset()
        assert model.resets == 1
        model.refuse[DeviceIoctl.RESET] = errno.EAGAIN
        with pytest.raises(RemoteError) as caught:
            await client.reset()
        assert caught.value.errno == errno.EAGAIN
        del model.refuse[DeviceIoctl.RESET]


# --- interrupts ---------------------------------------------------------------------------------


async def test_interrupts_go_from_the_kernel_to_the_client(
    model: ModelKernel, function: VfFunction
) -> None:
    async with served(function) as client:
        eventfds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
        await client.set_irqs(IrqRequest(VfioIrq.MSIX, 0, 3, TRIGGER, eventfds=tuple(eventfds)))
        model.fire(VfioIrq.MSIX, 1)
        assert os.eventfd_read(eventfds[1]) == 1
        await client.set_irqs(IrqRequest(VfioIrq.MSIX, 1, 1, TRIGGER, eventfds=()))
        assert model.irqs[VfioIrq.MSIX][1] == -1
        await client.set_irqs(IrqRequest(VfioIrq.MSIX, 0, 0, TRIGGER))
        assert VfioIrq.MSIX not in model.irqs
        await client.set_irqs(IrqRequest(VfioIrq.MSIX, 0, 0, TRIGGER))  # no error again
        for eventfd in eventfds:
            os.close(eventfd)


async def test_msix_without_a_vector_as_qemu_turns_it_on(
    model: ModelKernel, function: VfFunction
) -> None:
    async with served(function) as client:
        await client.set_irqs(IrqRequest(VfioIrq.INTX, 0, 0, TRIGGER))
        await client.set_irqs(IrqRequest(VfioIrq.MSIX, 0, 1, TRIGGER, eventfds=()))
        assert model.irqs == {VfioIrq.MSIX: [-1]}
        eventfd = os.eventfd(0)
        await client.set_irqs(IrqRequest(VfioIrq.MSIX, 3, 1, TRIGGER, eventfds=(eventfd,)))
        os.close(eventfd)
        assert len(model.irqs[VfioIrq.MSIX]) == 4


async def test_kernels_that_fix_the_number_of_vectors(model: ModelKernel) -> None:
    """The client is not told, and arms one by one."""
    model.irq_flags = int(IrqFlags.EVENTFD) | NORESIZE
    with function_of(model) as function:
        async with served(function) as client:
            assert (await client.irq_info(VfioIrq.MSIX)).flags == IrqFlags.EVENTFD
            eventfd = os.eventfd(0, os.EFD_NONBLOCK)
            for vector in range(4):
                await client.set_irqs(
                    IrqRequest(VfioIrq.MSIX, vector, 1, TRIGGER, eventfds=(eventfd,))
                )
            model.fire(VfioIrq.MSIX, 3)
            assert os.eventfd_read(eventfd) == 1
            os.close(eventfd)


async def test_masking_and_injecting_are_the_kernels(
    model: ModelKernel, function: VfFunction
) -> None:
    async with served(function) as client:
        await client.set_irqs(IrqRequest(VfioIrq.INTX, 0, 1, IrqAction.MASK))
        await client.set_irqs(IrqRequest(VfioIrq.INTX, 0, 1, IrqAction.UNMASK, bools=(True,)))
        await client.set_irqs(IrqRequest(VfioIrq.MSIX, 2, 1, TRIGGER))
    assert model.acts == [(0x09, 0, 0, 1), (0x12, 0, 0, 1), (0x21, 2, 2, 1)]


async def test_an_interrupt_that_the_kernel_refuses(
    model: ModelKernel, function: VfFunction
) -> None:
    model.refuse[DeviceIoctl.SET_IRQS] = errno.EINVAL
    async with served(function) as client:
        eventfd = os.eventfd(0)
        with pytest.raises(RemoteError) as caught:
            await client.set_irqs(IrqRequest(VfioIrq.MSIX, 0, 1, TRIGGER, eventfds=(eventfd,)))
        assert caught.value.errno == errno.EINVAL
        os.close(eventfd)


# --- memory -------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("maps_files", [True, False])
async def test_the_device_reaches_the_clients_memory(
    model: ModelKernel, way: Way, maps_files: bool
) -> None:
    model.maps_files = maps_files
    with function_of(model, way) as function, GuestRam(1 << 20) as ram:
        async with served(function) as client:
            await ram.map(client, step=1 << 18)
            assert len(function.memory) == 4
            assert function.memory.pinned_bytes == 1 << 20
            model.dma_write(ram.iova + (1 << 18) + 8, b"hello")
            assert bytes(ram.view(ram.iova + (1 << 18) + 8, 5)) == b"hello"
            await ram.unmap(client)
            assert model.mappings == {}
            assert function.memory.pinned_bytes == 0


@WAYS
async def test_what_a_client_leaves_behind_is_undone(model: ModelKernel, way: Way) -> None:
    with function_of(model, way) as function, GuestRam(1 << 20) as ram:
        async with served(function) as client:
            await ram.map(client)
            await client.region_write(VfioRegion.CONFIG, 4, b"\x06\x00")
            eventfd = os.eventfd(0)
            await client.set_irqs(IrqRequest(VfioIrq.MSIX, 0, 1, TRIGGER, eventfds=(eventfd,)))
            await client.set_irqs(IrqRequest(VfioIrq.REQ, 0, 1, TRIGGER, eventfds=(eventfd,)))
            os.close(eventfd)
            model.calls.clear()
        unmap = "IOAS_UNMAP" if way is Way.CDEV else "IOMMU_UNMAP_DMA"
        assert model.calls == ["SET_IRQS", "RESET", unmap]
        assert model.registers(VfioRegion.CONFIG, 4, 2) == b"\x02\x00"
        assert model.mappings == {}
        async with served(function) as client:  # and the next client finds it well
            await ram.map(client)
            assert len(model.mappings) == 1


async def test_no_step_of_it_keeps_the_others_from_being_done(
    model: ModelKernel, function: VfFunction, caplog: pytest.LogCaptureFixture
) -> None:
    with GuestRam(1 << 20) as ram:
        async with served(function) as client:
            await ram.map(client)
            model.refuse[DeviceIoctl.RESET] = errno.EIO
        del model.refuse[DeviceIoctl.RESET]
    assert model.mappings == {}
    assert [r.levelno for r in caplog.records if "resetting it after" in r.message] == [
        logging.ERROR
    ]


async def test_a_container_that_cannot_unmap_all_at_once(model: ModelKernel) -> None:
    model.unmap_all_known = False
    with function_of(model, Way.GROUP) as function, GuestRam(1 << 20) as ram:
        async with served(function) as client:
            await ram.map(client)


async def test_unmap_ladders(model: ModelKernel, function: VfFunction) -> None:
    """QEMU's intel-iommu: powers of two up to 2^64, with nothing there."""
    with GuestRam(1 << 20) as ram:
        async with served(function) as client:
            await ram.map(client)
            for shift in range(30, 64):
                await client.dma_unmap(1 << shift, 1 << shift)
            assert len(model.mappings) == 0
            await ram.map(client)
            await client.dma_unmap(0, U64_END)
            assert model.mappings == {}


async def test_mappings_that_make_no_sense(function: VfFunction) -> None:
    with GuestRam(1 << 20) as ram:
        async with served(function) as client:
            await ram.map(client)
            cases = {
                DmaMapping(ram.iova + 0x1000, 0x1000, READ_WRITE, ram.fd): errno.EEXIST,
                DmaMapping(0x1000, 0x1000, READ_WRITE, ram.fd, 1 << 20): errno.EINVAL,
                DmaMapping(0x1000, 0x800, READ_WRITE, ram.fd): errno.EINVAL,
                DmaMapping(0x1000, 0x1000, READ_WRITE, ram.fd, 0x10): errno.EINVAL,
                DmaMapping(0x1000, 0x1000, DmaAccess(0), ram.fd): errno.EINVAL,
                DmaMapping(0xFEE0_0000, 0x1000, READ_WRITE, ram.fd): errno.EINVAL,
                DmaMapping(1 << 48, 0x1000, READ_WRITE, ram.fd): errno.EINVAL,
            }
            for mapping, expected in cases.items():
                with pytest.raises(RemoteError) as caught:
                    await client.dma_map(mapping)
                assert caught.value.errno == expected, mapping
            with pytest.raises(RemoteError) as caught:
                await client.dma_unmap(ram.iova, 0x1000)
            assert caught.value.errno == errno.EINVAL
            assert len(function.memory) == 1


async def test_files_that_are_no_memory(function: VfFunction) -> None:
    with GuestRam(1 << 20) as ram:
        text = os.open("/proc/self/status", os.O_RDONLY)
        read_only = os.open(f"/proc/self/fd/{ram.fd}", os.O_RDONLY)
        async with served(function) as client:
            with pytest.raises(RemoteError) as caught:
                await client.dma_map(DmaMapping(0, 0x1000, DmaAccess.READ, text))
            assert caught.value.errno == errno.EINVAL
            with pytest.raises(RemoteError) as caught:
                await client.dma_map(DmaMapping(0, 0x1000, READ_WRITE, read_only))
            assert caught.value.errno == errno.EACCES
            await client.dma_map(DmaMapping(0, 0x1000, DmaAccess.READ, read_only))
            sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
            os.ftruncate(sealed, 0x1000)
            fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
            with pytest.raises(RemoteError) as caught:
                await client.dma_map(DmaMapping(0x1000, 0x1000, READ_WRITE, sealed))
            assert caught.value.errno == errno.EPERM
            await client.dma_map(DmaMapping(0x1000, 0x1000, DmaAccess.READ, sealed))
        os.close(sealed)
        os.close(read_only)
        os.close(text)


async def test_memory_without_a_file_is_remembered_and_out_of_reach(
    model: ModelKernel, function: VfFunction
) -> None:
    async with served(function) as client:
        await client.dma_map(DmaMapping(0xFFFC_0000, 0x40000, DmaAccess.READ))
        await client.dma_map(DmaMapping(1 << 60, 0x1000, READ_WRITE))
        assert model.mappings == {}
        with pytest.raises(RemoteError) as caught:
            await client.dma_map(DmaMapping(0xFFFC_0000, 0x1000, DmaAccess.READ))
        assert caught.value.errno == errno.EEXIST
        await client.dma_unmap(0, U64_END)
        assert len(function.memory) == 0


@WAYS
async def test_more_than_may_be_locked(
    model: ModelKernel, way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    model.memlock = 1 << 20
    with function_of(model, way) as function, GuestRam(1 << 20) as ram:
        async with served(function) as client:
            await ram.map(client)
            with pytest.raises(RemoteError) as caught:
                await client.dma_map(DmaMapping(0, 0x1000, READ_WRITE, ram.fd))
            assert caught.value.errno == errno.ENOMEM
            assert len(function.memory) == 1
    assert "4096 bytes, beside 1048576 that are pinned" in caplog.text
    assert "LimitMEMLOCK=infinity" in caplog.text


async def test_large_memory_is_pinned_while_others_go_on(
    model: ModelKernel, function: VfFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    run_sync = trio.to_thread.run_sync

    async def noted(step: object, *args: object) -> object:
        threads.append("thread")
        return await run_sync(step, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(trio.to_thread, "run_sync", noted)
    with GuestRam(16 << 20) as ram:
        async with served(function) as client:
            await client.dma_map(DmaMapping(0, 1 << 20, READ_WRITE, ram.fd))
            assert threads == []
            await ram.map(client)
            assert threads == ["thread"]
            await client.dma_unmap(0, 1 << 20)
            assert threads == ["thread"]
            await ram.unmap(client)
            assert threads == ["thread", "thread"]


async def test_a_kernel_that_does_not_let_go_ends_the_session(
    model: ModelKernel, function: VfFunction, caplog: pytest.LogCaptureFixture
) -> None:
    unmap = model._ioas_unmap

    def refuse(data: bytearray) -> None:
        if struct.unpack_from("=Q", data, 16)[0] != U64_END - 1:
            raise OSError(errno.EIO, "no")
        unmap(data)

    model._ioas_unmap = refuse  # type: ignore[method-assign]
    with GuestRam(1 << 20) as ram:
        async with served(function) as client:
            await ram.map(client)
            with pytest.raises(ConnectionLost):
                await ram.unmap(client)
    assert "unmapping 0x100000 bytes at 0x40000000" in caplog.text


# --- the kernel wants it back -------------------------------------------------------------------


async def test_the_kernel_wants_the_device_back(
    model: ModelKernel, caplog: pytest.LogCaptureFixture
) -> None:
    with function_of(model) as function, GuestRam(1 << 20) as ram:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(function.watch)
            async with served(function) as client:
                await ram.map(client)
                eventfd = os.eventfd(0, os.EFD_NONBLOCK)
                await client.set_irqs(IrqRequest(VfioIrq.REQ, 0, 1, TRIGGER, eventfds=(eventfd,)))
                model.fire(VfioIrq.REQ)
                with trio.fail_after(5):
                    await client.lost.wait()
                assert os.eventfd_read(eventfd) == 1
                os.close(eventfd)
        assert function._device.closed
        assert function.region_info(4).fd is None
        async with served(function) as client:
            with pytest.raises((RemoteError, ConnectionLost)):
                await client.region_read(4, 0, 4)
        for eventfd in model.irqs.pop(VfioIrq.REQ):
            os.close(eventfd)
    assert "the kernel wants the device back" in caplog.text
    assert "Traceback" not in caplog.text


async def test_the_kernel_wants_the_device_back_between_sessions(model: ModelKernel) -> None:
    with function_of(model) as function:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(function.watch)
            await trio.testing.wait_all_tasks_blocked()
            model.fire(VfioIrq.REQ)
        assert function._device.closed
        for eventfd in model.irqs.pop(VfioIrq.REQ):
            os.close(eventfd)


async def test_memory_that_takes_long_is_told_once(
    function: VfFunction, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(limits, "SLOW_PIN_SECONDS", -1.0)
    with GuestRam(1 << 20) as ram:
        async with served(function) as client:
            await ram.map(client, step=1 << 19)
    told = [record.message for record in caplog.records if "x-msg-timeout=60000" in record.message]
    assert len(told) == 1

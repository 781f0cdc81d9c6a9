"""Malformed and malicious commands, one by one, on a session with a real socket.

Goes on from test_hostile_client.py, with its numbers.  What only a device can judge is judged by a
device with a real guest memory; migration states are a device's own business and tested there
(rows 38 to 43 have their envelope tested here).
"""

from __future__ import annotations

import errno
import os
import struct
from typing import Final

import pytest

from tests.transport.memory_device import BAR0_SIZE
from tests.transport.payloads import access, dma_map, dma_unmap, set_irqs
from tests.transport.served import (
    raw_client,
)
from vfio_user_virtio.device import VfioIrq, VfioRegion
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.limits import (
    MAX_DATA_XFER_SIZE,
)
from vfio_user_virtio.protocol.header import Command

pytestmark = pytest.mark.usefixtures("engine")

U32_MAX: Final = (1 << 32) - 1
U64_MAX: Final = (1 << 64) - 1


# --- device, region and interrupt information -----------------------------------------------------


@pytest.mark.parametrize("command", [4, 5, 6, 7])
@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"", id="no payload"),
        pytest.param(struct.pack("<I", 80), id="short payload"),
        pytest.param(struct.pack("<IIIIQQ", 15, 0, 0, 0, 0, 0), id="argsz 15"),
        pytest.param(struct.pack("<IIIIQQ", 0, 0, 0, 0, 0, 0), id="argsz 0"),
    ],
)
async def test_17_no_room_for_information(command: int, payload: bytes) -> None:
    async with raw_client() as client:
        assert await client.refused(command, payload) == errno.EINVAL
        await client.alive()


@pytest.mark.parametrize("index", [9, 100, U32_MAX])
@pytest.mark.parametrize("command", [5, 6])
async def test_18_region_that_is_not_there(command: int, index: int) -> None:
    async with raw_client() as client:
        payload = struct.pack("<IIIIQQ", 80, 0, index, 0, 0, 0)
        assert await client.refused(command, payload) == errno.EINVAL


@pytest.mark.parametrize("index", [5, U32_MAX])
async def test_18_interrupt_index_that_is_not_there(index: int) -> None:
    async with raw_client() as client:
        payload = struct.pack("<IIII", 16, 0, index, 0)
        assert await client.refused(Command.DEVICE_GET_IRQ_INFO, payload) == errno.EINVAL


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(dma_map(0, 0x1000)[:31], id="short"),
        pytest.param(b"", id="empty"),
        pytest.param(dma_map(0, 0x1000, argsz=31), id="argsz"),
        pytest.param(dma_map(0, 0x1000, flags=0), id="no access"),
        pytest.param(dma_map(0, 0x1000, flags=7), id="unknown flag"),
        pytest.param(dma_map(0, 0x1000, flags=1 << 31), id="unknown flags"),
    ],
)
async def test_19_map_is_malformed(payload: bytes, memory: int) -> None:
    async with raw_client() as client:
        assert await client.refused(Command.DMA_MAP, payload, [memory]) == errno.EINVAL
        assert client.one.device.guest.statistics().maps == 0


async def test_20_map_over_another(memory: int) -> None:
    async with raw_client() as client:
        assert not (await client.ask(Command.DMA_MAP, dma_map(0x1000, 0x2000), [memory])).is_error
        for iova, size in ((0x1000, 0x2000), (0, 0x2000), (0x2000, 0x1000)):
            request = dma_map(iova, size)
            assert await client.refused(Command.DMA_MAP, request, [memory]) == errno.EEXIST
            assert await client.refused(Command.DMA_MAP, request) == errno.EEXIST


@pytest.mark.parametrize(
    ("iova", "size"),
    [(0, 0), (U64_MAX, 0), (1 << 63, (1 << 63) + 1), (0x1000, U64_MAX), (U64_MAX, U64_MAX)],
)
async def test_21_map_is_empty_or_passes_the_end(iova: int, size: int, memory: int) -> None:
    async with raw_client() as client:
        for fds in ([], [memory]):
            assert await client.refused(Command.DMA_MAP, dma_map(iova, size), fds) == errno.EINVAL


async def test_21_map_and_unmap_up_to_the_very_end() -> None:
    async with raw_client() as client:
        last = (1 << 64) - 0x1000
        assert not (await client.ask(Command.DMA_MAP, dma_map(last, 0x1000))).is_error
        assert not (await client.ask(Command.DMA_UNMAP, dma_unmap(last, 0x1000))).is_error


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 0x3000), (0x2000, 0x1000), (0x800, 0x1000), (U64_MAX - 0xFFF, 0x1000), (1 << 63, 0x1000)],
)
async def test_22_map_is_outside_its_file(offset: int, size: int, memory: int) -> None:
    async with raw_client() as client:
        request = dma_map(0, size, offset=offset)
        assert await client.refused(Command.DMA_MAP, request, [memory]) == errno.EINVAL


async def test_23_map_of_what_is_no_memory(eventfd: int, memory: int) -> None:
    reader, writer = os.pipe()
    directory = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    read_only = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
    unsealed = os.memfd_create("unsealed")
    os.ftruncate(unsealed, 0x1000)
    fds = {eventfd: None, reader: None, directory: None, read_only: errno.EACCES, unsealed: None}
    async with raw_client() as client:
        for fd, expected in fds.items():
            code = await client.refused(Command.DMA_MAP, dma_map(0, 0x1000), [fd])
            assert expected in (None, code)
        assert client.one.device.guest.statistics().maps == 0
    for fd in (reader, writer, directory, read_only, unsealed):
        os.close(fd)


async def test_24_map_with_two_fds(memory: int) -> None:
    async with raw_client() as client:
        request = dma_map(0, 0x1000)
        assert await client.refused(Command.DMA_MAP, request, [memory, memory]) == errno.EINVAL


async def test_24_too_many_maps() -> None:
    async with raw_client() as client:
        full = ClientError(errno.ENOSPC, "the table is full")
        client.one.device.failure = full
        assert await client.refused(Command.DMA_MAP, dma_map(0, 0x1000)) == errno.ENOSPC


async def test_25_file_cannot_be_shrunk_under_a_map(memory: int) -> None:
    async with raw_client() as client:
        assert not (await client.ask(Command.DMA_MAP, dma_map(0, 0x2000), [memory])).is_error
        with pytest.raises(PermissionError):
            os.ftruncate(memory, 0)
        view = client.one.device.guest.view(0x1000, 0x1000, False)
        assert view is not None
        assert view[0] == 0
        del view


async def test_26_unmap_that_matches_nothing_or_splits(memory: int) -> None:
    async with raw_client() as client:
        assert not (await client.ask(Command.DMA_UNMAP, dma_unmap(0x5000, 0x1000))).is_error
        await client.ask(Command.DMA_MAP, dma_map(0x1000, 0x2000), [memory])
        split = await client.refused(Command.DMA_UNMAP, dma_unmap(0x1000, 0x1000))
        assert split == errno.EINVAL
        assert client.one.device.guest.statistics().maps == 1
        ladder = dma_unmap(0x1000, U64_MAX - 0xFFF)
        assert not (await client.ask(Command.DMA_UNMAP, ladder)).is_error
        assert client.one.device.guest.statistics().maps == 0


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        pytest.param(dma_unmap(0x1000, 0, flags=2), errno.EINVAL, id="all, iova"),
        pytest.param(dma_unmap(0, 0x1000, flags=2), errno.EINVAL, id="all, size"),
        pytest.param(dma_unmap(0, 0x1000, flags=4), errno.EINVAL, id="flags"),
        pytest.param(dma_unmap(0, 0), errno.EINVAL, id="empty"),
        pytest.param(dma_unmap(0x1000, U64_MAX), errno.EINVAL, id="past the end"),
        pytest.param(struct.pack("<I", 24), errno.EINVAL, id="4 bytes"),
        pytest.param(dma_unmap(0, 0x1000, argsz=23), errno.EINVAL, id="argsz"),
        pytest.param(
            dma_unmap(0, 0x1000, flags=1, argsz=48) + struct.pack("<QQ", 0x1000, 8),
            errno.EOPNOTSUPP,
            id="dirty bitmap",
        ),
        pytest.param(
            dma_unmap(0, 0x1000, flags=1, argsz=48) + struct.pack("<QQ", 0, 1 << 62),
            errno.EINVAL,
            id="absurd dirty bitmap",
        ),
    ],
)
async def test_27_unmap_is_malformed(payload: bytes, code: int) -> None:
    async with raw_client() as client:
        await client.ask(Command.DMA_MAP, dma_map(0, 0x1000))
        assert await client.refused(Command.DMA_UNMAP, payload) == code
        assert client.one.device.guest.statistics().maps == 1


# --- interrupts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, 1, 4, 0x20, 0x21 | 0x10, 0x24 | 1, 0x27, 0x64, U32_MAX])
async def test_28_set_irqs_without_one_action_and_one_kind_of_data(
    flags: int, eventfd: int
) -> None:
    async with raw_client() as client:
        request = set_irqs(flags, VfioIrq.MSIX, 0, 1)
        assert await client.refused(Command.DEVICE_SET_IRQS, request) == errno.EINVAL
        assert await client.refused(Command.DEVICE_SET_IRQS, request, [eventfd]) == errno.EINVAL
        assert client.one.device.irqs == []


async def test_28_set_irqs_of_an_index_that_is_not_there(eventfd: int) -> None:
    async with raw_client() as client:
        for index in (5, 1000, U32_MAX):
            request = set_irqs(0x24, index, 0, 1)
            assert await client.refused(Command.DEVICE_SET_IRQS, request, [eventfd]) == errno.EINVAL


@pytest.mark.parametrize(
    ("payload", "num_fds"),
    [
        pytest.param(set_irqs(0x24, 2, 20, 1), 1, id="start past the end"),
        pytest.param(set_irqs(0x24, 2, 19, 2), 2, id="range past the end"),
        pytest.param(set_irqs(0x21, 2, 1, U32_MAX), 0, id="sum of 2^32"),
        pytest.param(set_irqs(0x24, 2, U32_MAX, U32_MAX), 0, id="sum near 2^33"),
        pytest.param(set_irqs(0x24, 2, 0, 3), 2, id="fewer fds"),
        pytest.param(set_irqs(0x24, 2, 0, 2), 3, id="more fds"),
        pytest.param(set_irqs(0x24, 2, 0, 0), 1, id="an fd for nothing"),
        pytest.param(set_irqs(0x21, 2, 0, 1), 1, id="fds with none"),
        pytest.param(set_irqs(0x22, 2, 0, 1, b"\1"), 1, id="fds with bool"),
        pytest.param(set_irqs(0x0C, 2, 0, 1), 1, id="fds to mask"),
        pytest.param(set_irqs(0x22, 2, 0, 3, b"\1\1"), 0, id="fewer bools"),
        pytest.param(set_irqs(0x22, 2, 0, 1, b"\1\1"), 0, id="more bools"),
        pytest.param(set_irqs(0x22, 2, 0, U32_MAX), 0, id="4 Gi bools"),
        pytest.param(set_irqs(0x24, 2, 0, 1)[:19], 1, id="short"),
        pytest.param(set_irqs(0x24, 2, 0, 17), 17, id="beyond max_msg_fds"),
    ],
)
async def test_29_set_irqs_does_not_add_up(payload: bytes, num_fds: int, eventfd: int) -> None:
    async with raw_client() as client:
        fds = [eventfd] * num_fds
        assert await client.refused(Command.DEVICE_SET_IRQS, payload, fds) == errno.EINVAL
        assert client.one.device.irqs == []


async def test_30_interrupt_fd_is_no_eventfd(memory: int, eventfd: int) -> None:
    reader, writer = os.pipe()
    async with raw_client() as client:
        for fd in (memory, reader, writer, client.endpoint.fileno()):
            request = set_irqs(0x24, VfioIrq.MSIX, 0, 2)
            fds = [eventfd, fd]
            assert await client.refused(Command.DEVICE_SET_IRQS, request, fds) == errno.EINVAL
    os.close(reader)
    os.close(writer)


# --- registers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "region", "count"),
    [
        pytest.param(BAR0_SIZE, 0, 1, id="at the end"),
        pytest.param(BAR0_SIZE - 1, 0, 2, id="over the end"),
        pytest.param(U64_MAX, 0, 1, id="wraps"),
        pytest.param(U64_MAX - 3, 0, 4, id="wraps to 0"),
        pytest.param(0, VfioRegion.BAR1, 1, id="absent region"),
        pytest.param(0, 9, 1, id="unknown region"),
        pytest.param(0, U32_MAX, 1, id="absurd region"),
        pytest.param(0, 0, MAX_DATA_XFER_SIZE + 1, id="more than max_data_xfer_size"),
        pytest.param(0, 0, U32_MAX, id="4 GiB"),
    ],
)
async def test_31_access_outside_the_region(offset: int, region: int, count: int) -> None:
    async with raw_client() as client:
        request = access(offset, region, count)
        assert await client.refused(Command.REGION_READ, request) == errno.EINVAL
        data = bytes(min(count, MAX_DATA_XFER_SIZE + 1))
        assert await client.refused(Command.REGION_WRITE, request + data) == errno.EINVAL
        assert client.one.device.calls == []


async def test_31_write_to_a_region_that_is_read_only() -> None:
    async with raw_client() as client:
        request = access(0, VfioRegion.BAR4, 1, b"x")
        assert await client.refused(Command.REGION_WRITE, request) == errno.EINVAL


async def test_32_read_of_nothing_is_echoed() -> None:
    async with raw_client() as client:
        request = access(8, 0, 0)
        assert (await client.ask(Command.REGION_READ, request)).payload == request


@pytest.mark.parametrize("data", [b"", b"123", b"12345"])
async def test_33_write_does_not_bring_what_it_announces(data: bytes) -> None:
    async with raw_client() as client:
        request = access(0, 0, 4, data)
        assert await client.refused(Command.REGION_WRITE, request) == errno.EINVAL
        assert client.one.device.writes == []


@pytest.mark.parametrize(
    ("wr_cnt", "entries"),
    [
        pytest.param(2, [(0, 0, 4)], id="count beyond payload"),
        pytest.param(1, [(0, 0, 4), (8, 0, 4)], id="count short of payload"),
        pytest.param(1 << 63, [(0, 0, 4)], id="2^63"),
        pytest.param(U64_MAX, [], id="2^64-1"),
        pytest.param(2, [(0, 0, 4), (8, 0, 9)], id="9 bytes in the second"),
        pytest.param(2, [(0, 0, 4), (BAR0_SIZE - 3, 0, 4)], id="second past the end"),
        pytest.param(2, [(0, 0, 4), (0, 6, 4)], id="second to an absent region"),
        pytest.param(2, [(0, 0, 4), (U64_MAX, 0, 4)], id="second wraps"),
    ],
)
async def test_34_write_multi_is_wrong_somewhere(
    wr_cnt: int, entries: list[tuple[int, int, int]]
) -> None:
    async with raw_client() as client:
        body = b"".join(struct.pack("<QII8s", *entry, b"datadata") for entry in entries)
        request = struct.pack("<Q", wr_cnt) + body
        assert await client.refused(Command.REGION_WRITE_MULTI, request) == errno.EINVAL
        assert client.one.device.writes == []


@pytest.mark.parametrize(("flags", "count"), [(1, 0), (0, 1), (U32_MAX, U32_MAX)])
async def test_35_io_fds_with_flags_or_count(flags: int, count: int) -> None:
    async with raw_client() as client:
        request = struct.pack("<IIII", 16, flags, 0, count)
        assert await client.refused(Command.DEVICE_GET_REGION_IO_FDS, request) == errno.EINVAL


async def test_36_reset_with_a_payload() -> None:
    async with raw_client() as client:
        assert not (await client.ask(Command.DEVICE_RESET, bytes(1000))).is_error
        await client.alive()


# --- migration ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        pytest.param(struct.pack("<II", 8, 1), errno.EINVAL, id="no operation"),
        pytest.param(struct.pack("<II", 8, 1 | 3 << 16), errno.EINVAL, id="GET and SET"),
        pytest.param(struct.pack("<II", 8, 1 | 1 << 19), errno.EINVAL, id="unknown operation"),
        pytest.param(struct.pack("<II", 8, 77 | 1 << 16), errno.ENOTTY, id="unknown feature"),
        pytest.param(struct.pack("<II", 7, 1 | 1 << 16), errno.EINVAL, id="argsz"),
        pytest.param(struct.pack("<I", 8), errno.EINVAL, id="short"),
    ],
)
async def test_37_device_feature_is_malformed(payload: bytes, code: int) -> None:
    async with raw_client() as client:
        assert await client.refused(Command.DEVICE_FEATURE, payload) == code


async def test_38_device_that_refuses_a_state_is_heard() -> None:
    async with raw_client() as client:
        client.one.device.failure = ClientError(errno.EINVAL, "state 0 cannot be asked for")
        request = struct.pack("<IIII", 16, 2 | 1 << 17, 0, U32_MAX)
        assert await client.refused(Command.DEVICE_FEATURE, request) == errno.EINVAL
        assert client.one.device.feature_data == b""


@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (Command.MIG_DATA_READ, struct.pack("<II", 11, 4)),
        (Command.MIG_DATA_READ, struct.pack("<II", U32_MAX, MAX_DATA_XFER_SIZE + 1)),
        (Command.MIG_DATA_READ, struct.pack("<II", 7, U32_MAX)),
        (Command.MIG_DATA_READ, b"1234"),
        (Command.MIG_DATA_WRITE, struct.pack("<II", 11, 4) + b"data"),
        (Command.MIG_DATA_WRITE, struct.pack("<II", 12, 4) + b"dat"),
        (Command.MIG_DATA_WRITE, struct.pack("<II", 12, 4) + b"data!"),
        (Command.MIG_DATA_WRITE, struct.pack("<II", U32_MAX, U32_MAX) + b"data"),
        (Command.MIG_DATA_WRITE, b""),
    ],
)
async def test_40_migration_data_does_not_add_up(command: int, payload: bytes) -> None:
    async with raw_client() as client:
        assert await client.refused(command, payload) == errno.EINVAL
        assert client.one.device.calls == []

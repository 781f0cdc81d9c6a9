"""A test's guest memory, as the device's own code sees it."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from vfio_user_virtio.device import DmaAccess, DmaMapping
from vfio_user_virtio.limits import PAGE_SIZE
from vfio_user_virtio.memory.guest_memory import GuestMemory
from vfio_user_virtio.testing.guest_ram import GuestRam

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    with GuestRam(64 * PAGE_SIZE, iova=0x10_0000) as ram:
        yield ram


class Client:
    """The other end: the device's memory, straight from the mapping."""

    def __init__(self) -> None:
        self.memory = GuestMemory()

    async def dma_map(self, mapping: DmaMapping) -> None:
        fd = None if mapping.fd is None else os.dup(mapping.fd)
        self.memory.map(DmaMapping(mapping.iova, mapping.size, mapping.access, fd, mapping.offset))

    async def dma_unmap(self, iova: int, size: int) -> None:
        self.memory.unmap(iova, size)


async def test_the_device_sees_what_the_guest_writes(ram: GuestRam) -> None:
    client = Client()
    await ram.map(client)
    buffer = ram.allocate(100)
    buffer.memory[:] = bytes(range(100))
    assert bytes(client.memory.view(buffer.iova, 100, False) or b"") == bytes(range(100))
    seen = client.memory.view(buffer.iova, 2, True)
    assert seen is not None
    seen[:] = b"OK"
    assert bytes(buffer.memory[:2]) == b"OK"
    assert bytes(ram.view(buffer.iova, 2)) == b"OK"
    del seen
    await ram.unmap(client)
    assert client.memory.statistics().maps == 0


async def test_page_by_page_and_without_an_fd(ram: GuestRam) -> None:
    client = Client()
    await ram.map(client, step=PAGE_SIZE)
    assert client.memory.statistics().maps == 64
    assert client.memory.statistics().mapped_bytes == ram.size
    await ram.unmap(client)
    await ram.map(client, remote=True, step=5 * PAGE_SIZE, access=DmaAccess.READ)
    assert client.memory.statistics().maps == 13
    assert client.memory.statistics().remote_bytes == ram.size
    client.memory.clear()


def test_serving_messages(ram: GuestRam) -> None:
    buffer = ram.allocate(8)
    ram.write(buffer.iova, b"12345678")
    assert bytes(buffer.memory) == b"12345678"
    assert ram.read(buffer.iova + 2, 3) == b"345"
    for iova, count in ((ram.iova - 1, 1), (ram.iova + ram.size - 1, 2), (1 << 63, 8)):
        with pytest.raises(OSError, match="not in guest memory") as caught:
            ram.read(iova, count)
        assert caught.value.errno == errno.ENODEV
        with pytest.raises(OSError, match="not in guest memory"):
            ram.write(iova, bytes(count))


def test_allocations_are_zeroed_aligned_and_apart(ram: GuestRam) -> None:
    sizes = [1, 63, 64, 65, 4096, 5000, 0, 7]
    buffers = [ram.allocate(size) for size in sizes]
    for number, buffer in enumerate(buffers):
        assert buffer.iova % 64 == 0
        assert len(buffer.memory) == buffer.size == sizes[number]
        assert not any(buffer.memory)
        buffer.memory[:] = bytes([number]) * buffer.size
    for number, buffer in enumerate(buffers):
        assert bytes(buffer.memory) == bytes([number]) * buffer.size
    assert ram.allocate(10, align=PAGE_SIZE).iova % PAGE_SIZE == 0


def test_what_is_freed_is_used_again_and_only_once(ram: GuestRam) -> None:
    first = ram.allocate(1000)
    first.memory[:] = b"x" * 1000
    ram.free(first)
    with pytest.raises(ValueError, match="not allocated"):
        ram.free(first)
    second = ram.allocate(1024)
    assert second.iova == first.iova
    assert not any(second.memory)


def test_a_full_memory_says_so(ram: GuestRam) -> None:
    with pytest.raises(MemoryError, match="make it larger"):
        ram.allocate(ram.size + 1)
    ram.allocate(ram.size)
    with pytest.raises(MemoryError):
        ram.allocate(1)


def test_closing_twice_is_closing(ram: GuestRam) -> None:
    kept = ram.allocate(16)
    ram.close()
    ram.close()
    kept.memory[0] = 1

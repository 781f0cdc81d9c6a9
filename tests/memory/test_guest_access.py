"""Reading and writing across mapped and remote memory, with a client played in the test."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import trio

from tests.memory.memory_files import PAGE, memfd
from vfio_user_virtio.device import DmaAccess, DmaMapping
from vfio_user_virtio.errors import DriverError, RemoteError
from vfio_user_virtio.memory.access import GuestAccess
from vfio_user_virtio.memory.guest_memory import GuestMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

READ = DmaAccess.READ
BOTH = DmaAccess.READ | DmaAccess.WRITE


class Client:
    """The client's own memory, reached by messages."""

    def __init__(self) -> None:
        self.data = bytearray(8 * PAGE)
        self.log: list[tuple[str, int, int]] = []
        self.meanwhile: Callable[[], None] = lambda: None

    async def dma_read(self, iova: int, count: int) -> bytes:
        self.log.append(("read", iova, count))
        await trio.lowlevel.checkpoint()
        self.meanwhile()
        return bytes(self.data[iova : iova + count])

    async def dma_write(self, iova: int, data: bytes) -> None:
        self.log.append(("write", iova, len(data)))
        await trio.lowlevel.checkpoint()
        self.meanwhile()
        self.data[iova : iova + len(data)] = data


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """Pages 0 and 1 remote, 2 and 3 a memfd, 4 remote, 5 a memfd for reading only, 6 nothing."""
    memory = GuestMemory()
    memory.map(DmaMapping(0, PAGE, BOTH))
    memory.map(DmaMapping(PAGE, PAGE, BOTH))
    memory.map(DmaMapping(2 * PAGE, 2 * PAGE, BOTH, memfd(2, stamp=True)))
    memory.map(DmaMapping(4 * PAGE, PAGE, BOTH))
    memory.map(DmaMapping(5 * PAGE, PAGE, READ, memfd(1)))
    yield memory
    memory.clear()


async def test_each_byte_comes_from_where_it_is(memory: GuestMemory) -> None:
    client = Client()
    access = GuestAccess(memory, client)
    data = os.urandom(5 * PAGE - 100)
    await access.write(50, data)
    assert client.log == [("write", 50, 2 * PAGE - 50), ("write", 4 * PAGE, PAGE - 50)]
    assert bytes(client.data[50 : 2 * PAGE]) == data[: 2 * PAGE - 50]
    assert bytes(client.data[2 * PAGE : 4 * PAGE]) == bytes(2 * PAGE)
    assert bytes(memory.view(2 * PAGE, 2 * PAGE, False) or b"") == data[2 * PAGE - 50 :][: 2 * PAGE]
    client.log.clear()
    assert await access.read(50, len(data)) == data
    assert client.log == [("read", 50, 2 * PAGE - 50), ("read", 4 * PAGE, PAGE - 50)]


async def test_mapped_memory_takes_no_message(memory: GuestMemory) -> None:
    client = Client()
    access = GuestAccess(memory, client)
    await access.write(2 * PAGE, memoryview(b"\1\2\3\4").cast("H"))
    assert await access.read(2 * PAGE, 4) == b"\1\2\3\4"
    assert client.log == []


async def test_no_bytes_are_no_access(memory: GuestMemory) -> None:
    client = Client()
    access = GuestAccess(memory, client)
    assert await access.read(1 << 60, 0) == b""
    await access.write(1 << 60, b"")
    assert client.log == []


async def test_nothing_is_written_if_not_all_can_be(memory: GuestMemory) -> None:
    client = Client()
    access = GuestAccess(memory, client)
    with pytest.raises(DriverError, match="may not be accessed at 0x5000"):
        await access.write(0, b"x" * 6 * PAGE)
    with pytest.raises(DriverError, match="not mapped at 0x6000"):
        await access.read(5 * PAGE, 2 * PAGE)
    with pytest.raises(DriverError):
        await access.read((1 << 64) - 1, 2)
    assert client.log == []
    assert bytes(memory.view(3 * PAGE, 1, False) or b"") == b"\1"


async def test_what_is_unmapped_meanwhile_is_not_touched(memory: GuestMemory) -> None:
    client = Client()
    access = GuestAccess(memory, client)
    client.meanwhile = memory.clear
    with pytest.raises(DriverError, match="not mapped at 0x2000"):
        await access.read(0, 3 * PAGE)
    assert client.log == [("read", 0, 2 * PAGE)]


async def test_a_refusal_of_the_client_comes_through(memory: GuestMemory) -> None:
    class Refusing(Client):
        async def dma_read(self, iova: int, count: int) -> bytes:
            raise RemoteError(19, f"DMA_READ {iova:#x}")

    with pytest.raises(RemoteError, match="No such device"):
        await GuestAccess(memory, Refusing()).read(0, 8)


async def test_who_wants_to_know_is_told_of_what_has_been_written(memory: GuestMemory) -> None:
    client = Client()
    told: list[tuple[int, int]] = []
    access = GuestAccess(memory, client, lambda iova, size: told.append((iova, size)))
    client.meanwhile = lambda: told.append((-1, 0))
    await access.write(PAGE, bytes(3 * PAGE + 50))
    assert told == [(-1, 0), (PAGE, PAGE), (2 * PAGE, 2 * PAGE), (-1, 0), (4 * PAGE, 50)]
    told.clear()
    await access.read(0, 5 * PAGE)
    await access.write(0, b"")
    with pytest.raises(DriverError):
        await access.write(5 * PAGE, b"x")
    assert all(size == 0 for _, size in told)


async def test_a_write_that_failed_may_have_happened(memory: GuestMemory) -> None:
    class Refusing(Client):
        async def dma_write(self, iova: int, data: bytes) -> None:
            raise RemoteError(5, f"DMA_WRITE {iova:#x}")

    told: list[tuple[int, int]] = []
    access = GuestAccess(memory, Refusing(), lambda iova, size: told.append((iova, size)))
    with pytest.raises(RemoteError):
        await access.write(PAGE - 8, bytes(16))
    assert told == [(PAGE - 8, 16)]

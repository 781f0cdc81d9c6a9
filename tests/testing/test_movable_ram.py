"""Guest memory whose pages are exchanged: what is copied, and what a driver's views see."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from vfio_user_virtio.device import IrqAction, IrqRequest
from vfio_user_virtio.limits import PAGE_SIZE
from vfio_user_virtio.testing.guest_move import GuestClient
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.movable_ram import MovableRam

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGES = 16
SIZE = PAGES * PAGE_SIZE


@pytest.fixture
def ram() -> Iterator[MovableRam]:
    with MovableRam(SIZE) as made:
        yield made


@pytest.fixture
def other() -> Iterator[GuestRam]:
    with GuestRam(SIZE) as made:
        yield made


def content(ram: GuestRam) -> bytes:
    return bytes(ram.view(ram.iova, ram.size))


def test_views_move_with_the_memory(ram: MovableRam, other: GuestRam) -> None:
    buffer = ram.allocate(100)
    words = buffer.memory[:8].cast("H")
    words[0] = 0x1234
    with GuestRam(SIZE) as first:
        ram.move_into(first)
        assert words[0] == 0
        words[1] = 0x5678
        assert bytes(first.view(buffer.iova, 4)) == b"\0\0\x78\x56"
        ram.move_into(other)
        words[2] = 0x9ABC
        assert bytes(first.view(buffer.iova, 6)) == b"\0\0\x78\x56\0\0"
        assert bytes(other.view(buffer.iova, 6)) == b"\0\0\0\0\xbc\x9a"
    other.view(buffer.iova, 1)[0] = 7
    assert words[0] == 7
    assert bytes(ram.view(buffer.iova, 1)) == b"\7"


def test_a_place_of_another_form(ram: MovableRam) -> None:
    with GuestRam(2 * SIZE) as larger, pytest.raises(ValueError, match="cannot take the place"):
        ram.move_into(larger)
    with GuestRam(SIZE, iova=SIZE) as elsewhere, pytest.raises(ValueError, match="0x10000 cannot"):
        ram.move_into(elsewhere)


def test_memory_that_cannot_be_mapped(ram: MovableRam, other: GuestRam) -> None:
    view = ram.allocate(1).memory
    view[0] = 3
    other.close()
    with pytest.raises(OSError, match="cannot be mapped again"):
        ram.move_into(other)
    assert view[0] == 3


def test_what_is_copied(ram: MovableRam, other: GuestRam) -> None:
    own = ram.allocate(3 * PAGE_SIZE)  # four pages, by the rounding
    device = ram.allocate_for_device(PAGE_SIZE + 1)
    assert device.iova % PAGE_SIZE == 0
    assert ram.allocate(64).iova >= device.iova + 2 * PAGE_SIZE, "in no page of the device"
    own.memory[:4] = b"mine"
    assert ram.copy_to(other) == PAGES, "what was allocated just now is the guest's writing"
    assert ram.difference(other) == []

    page = (device.iova - ram.iova) // PAGE_SIZE
    device.memory[0] = device.memory[PAGE_SIZE] = 1  # as the device would
    own.memory[:4] = b"more"
    assert ram.copy_to(other) == PAGES - 2
    assert ram.difference(other) == [page, page + 1]
    assert ram.copy_to(other, [page + 1]) == PAGES - 1
    assert ram.difference(other) == [page]
    assert ram.copy_to(other, range(PAGES)) == PAGES
    assert content(ram) == content(other)

    ram.wrote(device.iova + PAGE_SIZE, 1)
    assert ram.copy_to(other) == PAGES - 1
    assert ram.copy_to(other) == PAGES - 2


def test_pages_that_change_hands(ram: MovableRam, other: GuestRam) -> None:
    device = ram.allocate_for_device(PAGE_SIZE)
    ram.copy_to(other)
    assert ram.copy_to(other) == PAGES - 1
    ram.free(device)
    own = ram.allocate(PAGE_SIZE)
    assert own.iova == device.iova
    assert ram.copy_to(other) == PAGES
    ram.free(own)
    assert ram.allocate_for_device(PAGE_SIZE).iova == own.iova
    assert [ram.copy_to(other), ram.copy_to(other)] == [PAGES, PAGES - 1]


# --- a client that a guest has, while it runs -----------------------------------------------------


class SlowClient:
    """Notes what it is asked, and answers when told."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer = trio.Event()

    async def region_read(self, index: int, offset: int, count: int) -> bytes:
        self.asked.append(f"read {index} {offset}")
        await self.answer.wait()
        return bytes(count)

    async def region_write(
        self, index: int, offset: int, data: bytes, *, no_reply: bool = False
    ) -> None:
        self.asked.append(f"write {index} {offset} {data.hex()} {no_reply}")
        await self.answer.wait()

    async def set_irqs(self, request: IrqRequest) -> None:
        self.asked.append(f"set_irqs {request.index}")
        await self.answer.wait()


async def test_a_pause_waits_for_accesses_and_holds_others(
    autojump_clock: trio.testing.MockClock,
) -> None:
    first, second = SlowClient(), SlowClient()
    client = GuestClient(first)
    second.answer.set()
    paused = trio.Event()

    async def pause() -> None:
        await client.pause()
        paused.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.region_read, 0, 1, 2)
        nursery.start_soon(client.set_irqs, IrqRequest(2, 0, 0, IrqAction.TRIGGER))
        await trio.sleep(1)
        assert sorted(first.asked) == ["read 0 1", "set_irqs 2"]
        nursery.start_soon(pause)
        await trio.sleep(1)
        nursery.start_soon(client.region_write, 4, 8, b"\x01")
        await trio.sleep(1)
        assert not paused.is_set()
        first.answer.set()
        await trio.sleep(1)
        assert paused.is_set()
        await client.pause()  # once more makes no difference
        assert len(first.asked) == 2
        assert second.asked == []
        client.go_on(second)
        await trio.sleep(1)
        assert second.asked == ["write 4 8 01 False"]
        assert await client.region_read(1, 0, 4) == bytes(4)
    assert len(first.asked) == 2

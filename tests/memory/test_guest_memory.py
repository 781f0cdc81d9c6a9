"""Guest memory over real memfds: mapping, unmapping, views, and a model of it all."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from tests.memory.memory_files import PAGE, guest_mappings, memfd, open_fds, reopened
from vfio_user_virtio import limits
from vfio_user_virtio.device import U64_END, DmaAccess, DmaMapping
from vfio_user_virtio.errors import ClientError, DriverError
from vfio_user_virtio.memory import guest_memory
from vfio_user_virtio.memory.guest_memory import GuestMemory, RemoteOnly

if TYPE_CHECKING:
    from collections.abc import Iterator

READ, WRITE = DmaAccess.READ, DmaAccess.WRITE
BOTH = READ | WRITE


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    before = open_fds(), guest_mappings()
    yield
    assert (open_fds(), guest_mappings()) == before


@pytest.fixture
def ram() -> Iterator[int]:
    """A memfd of 16 pages, each of which begins with its number."""
    fd = memfd(16, stamp=True)
    yield fd
    os.close(fd)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory()
    yield memory
    memory.clear()


def stamp(view: memoryview | None) -> int:
    assert view is not None
    return int.from_bytes(view[:8], "little")


def mapping(
    iova: int, size: int, fd: int | None, offset: int = 0, access: DmaAccess = BOTH
) -> DmaMapping:
    return DmaMapping(iova, size, access, None if fd is None else os.dup(fd), offset)


def test_view_is_the_memory(memory: GuestMemory, ram: int) -> None:
    memory.map(mapping(0x10000, 4 * PAGE, ram, 2 * PAGE))
    view = memory.view(0x10000 + PAGE, 8, True)
    assert stamp(view) == 3
    assert view is not None
    view[0] = 99
    assert os.pread(ram, 1, 3 * PAGE) == b"\x63"
    read_only = memory.view(0x10000 + PAGE, 8, False)
    assert read_only is not None
    assert read_only.readonly
    assert read_only[0] == 99


def test_view_knows_the_edges(memory: GuestMemory, ram: int) -> None:
    memory.map(mapping(0x10000, PAGE, ram))
    memory.map(mapping(U64_END - PAGE, PAGE, ram, PAGE))
    inside = memory.view(0x10FFF, 1, True)
    assert inside is not None
    assert len(inside) == 1
    assert memory.view(0x10FFF, 2, True) is None
    assert memory.view(0xFFFF, 2, True) is None
    assert memory.view(0xFFFF, 1, True) is None
    assert memory.view(0x11000, 1, True) is None
    assert stamp(memory.view(U64_END - PAGE, PAGE, True)) == 1
    assert memory.view(U64_END - PAGE, PAGE + 1, True) is None
    assert memory.view(U64_END - 1, 1 << 32, True) is None
    assert memory.view(U64_END, 1, True) is None


@pytest.mark.parametrize("iova", [0, 0xFFFF, 0x10000, 0x10800, 0x11000, 0x20000, U64_END - 1])
def test_no_bytes_are_an_empty_view_anywhere(iova: int, memory: GuestMemory, ram: int) -> None:
    for _ in range(2):
        for write in (False, True):
            view = memory.view(iova, 0, write)
            assert view is not None
            assert len(view) == 0
            assert view.readonly is not write
            assert memory.views(iova, 0, write) == []
        if not memory.statistics().maps:
            memory.map(mapping(0x10000, PAGE, ram))


def test_access(memory: GuestMemory, ram: int) -> None:
    memory.map(mapping(0, PAGE, ram, 0, READ))
    memory.map(mapping(PAGE, PAGE, ram, PAGE, WRITE))
    assert stamp(memory.view(0, 8, False)) == 0
    assert memory.view(0, 8, True) is None
    assert memory.view(PAGE, 8, False) is None
    assert stamp(memory.view(PAGE, 8, True)) == 1
    assert memory.view(PAGE - 4, 8, True) is None
    assert memory.view(PAGE - 4, 8, False) is None
    for iova, write in ((0, True), (PAGE, False), (PAGE - 4, True), (PAGE - 4, False)):
        with pytest.raises(DriverError, match="may not be accessed"):
            memory.views(iova, 8, write)


def test_a_read_only_fd_serves_reads(memory: GuestMemory, ram: int) -> None:
    memory.map(DmaMapping(0, PAGE, READ, reopened(ram, os.O_RDONLY), 5 * PAGE))
    assert stamp(memory.view(0, 8, False)) == 5
    with pytest.raises(ClientError) as caught:
        memory.map(DmaMapping(PAGE, PAGE, BOTH, reopened(ram, os.O_RDONLY), 0))
    assert caught.value.errno == errno.EACCES


def test_views_merge_what_is_contiguous_in_the_file(memory: GuestMemory, ram: int) -> None:
    # Pages 0 1 2 | 7 8 | 3: three pieces though six mappings.
    for iova_page, file_page in enumerate((0, 1, 2, 7, 8, 3)):
        memory.map(mapping(iova_page * PAGE, PAGE, ram, file_page * PAGE))
    assert memory.statistics().files == 1
    pieces = memory.views(16, 6 * PAGE - 32, True)
    assert [len(piece) for piece in pieces] == [3 * PAGE - 16, 2 * PAGE, PAGE - 16]
    assert stamp(pieces[1]) == 7
    assert stamp(pieces[2]) == 3
    whole = memory.view(0, 3 * PAGE, True)
    assert whole is not None
    assert [stamp(whole[page * PAGE :]) for page in range(3)] == [0, 1, 2]
    assert len(memory.view(3 * PAGE + 1, 2 * PAGE - 1, False) or b"") == 2 * PAGE - 1
    assert memory.view(2 * PAGE, 2 * PAGE, True) is None
    assert memory.view(0, 6 * PAGE, True) is None


def test_views_of_two_files_are_not_merged(memory: GuestMemory, ram: int) -> None:
    other = memfd(4, stamp=True)
    memory.map(mapping(0, PAGE, ram))
    memory.map(mapping(PAGE, PAGE, other, PAGE))
    os.close(other)
    assert memory.view(0, 2 * PAGE, True) is None
    assert [stamp(piece) for piece in memory.views(0, 2 * PAGE, True)] == [0, 1]
    assert memory.statistics().files == 2


def test_views_say_where_the_hole_is(memory: GuestMemory, ram: int) -> None:
    with pytest.raises(DriverError, match="not mapped at 0x0"):
        memory.views(0, 1, False)
    memory.map(mapping(0x10000, PAGE, ram))
    memory.map(mapping(0x12000, PAGE, ram))
    for iova, size, hole in (
        (0x10000, PAGE + 1, "0x11000"),
        (0x10000, 3 * PAGE, "0x11000"),
        (0xFFFF, 2, "0xffff"),
        (0x12000, U64_END, "0x13000"),
        (0x11000, 1, "0x11000"),
    ):
        with pytest.raises(DriverError, match=f"not mapped at {hole}"):
            memory.views(iova, size, False)


def test_remote_mappings_have_no_views(memory: GuestMemory, ram: int) -> None:
    memory.map(mapping(0, PAGE, ram))
    memory.map(mapping(PAGE, PAGE, None))
    memory.map(mapping(2 * PAGE, PAGE, None, 0, READ))
    assert memory.view(PAGE, 8, True) is None
    assert memory.view(PAGE - 4, 8, True) is None
    for iova, size, write in ((PAGE, 8, True), (PAGE - 4, 8, False), (0, 3 * PAGE, False)):
        with pytest.raises(RemoteOnly):
            memory.views(iova, size, write)
    with pytest.raises(DriverError, match="may not be accessed"):
        memory.views(0, 3 * PAGE, True)
    with pytest.raises(DriverError, match="not mapped"):
        memory.views(0, 4 * PAGE, False)
    pieces = memory.pieces(PAGE - 8, 2 * PAGE, write=False)
    assert [(piece.iova, piece.size) for piece in pieces] == [
        (PAGE - 8, 8),
        (PAGE, 2 * PAGE - 8),
    ]
    assert pieces[1].memory is None
    statistics = memory.statistics()
    assert (statistics.maps, statistics.files) == (3, 1)
    assert (statistics.mapped_bytes, statistics.remote_bytes) == (PAGE, 2 * PAGE)


def test_unmap_takes_what_is_inside_and_splits_nothing(memory: GuestMemory, ram: int) -> None:
    memory.map(mapping(0x10000, 2 * PAGE, ram))
    memory.map(mapping(0x20000, 2 * PAGE, ram))
    generation = memory.generation
    memory.unmap(0, 0x10000)
    memory.unmap(0x8000_0000, U64_END - 0x8000_0000)
    assert memory.generation == generation
    for iova, size in ((0x10000, PAGE), (0x11000, U64_END - 0x11000), (0, 0x21000)):
        with pytest.raises(ClientError) as caught:
            memory.unmap(iova, size)
        assert caught.value.errno == errno.EINVAL
        assert memory.statistics().maps == 2
    memory.unmap(0xF000, 0x10000)
    assert memory.generation == generation + 1
    assert memory.view(0x10000, 1, False) is None
    assert memory.view(0x20000, 1, False) is not None
    memory.unmap(0, U64_END)
    assert memory.statistics().maps == memory.statistics().files == 0


@pytest.mark.parametrize(
    ("iova", "size"), [(0, 0), (PAGE, 0), (0, -1), (-1, 2), (1, U64_END), (U64_END, 1)]
)
def test_unmap_of_a_range_that_is_none_is_einval(iova: int, size: int, memory: GuestMemory) -> None:
    with pytest.raises(ClientError) as caught:
        memory.unmap(iova, size)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("iova", "size", "offset", "access"),
    [
        (0, 0, 0, BOTH),
        (0, -PAGE, 0, BOTH),
        (-PAGE, 2 * PAGE, 0, BOTH),
        (U64_END - PAGE, 2 * PAGE, 0, BOTH),
        (U64_END, PAGE, 0, BOTH),
        (1, PAGE, 0, BOTH),
        (0, PAGE + 1, 0, BOTH),
        (0, 100, 0, BOTH),
        (0, PAGE, 1, BOTH),
        (0, PAGE, 16 * PAGE, BOTH),
        (0, 17 * PAGE, 0, BOTH),
        (0, PAGE, 0, DmaAccess(0)),
    ],
)
def test_a_bad_mapping_is_einval_and_its_fd_is_closed(
    iova: int, size: int, offset: int, access: DmaAccess, memory: GuestMemory, ram: int
) -> None:
    before = open_fds()
    with pytest.raises(ClientError) as caught:
        memory.map(mapping(iova, size, ram, offset, access))
    assert caught.value.errno == errno.EINVAL
    assert open_fds() == before
    assert memory.generation == 0


def test_overlap_is_eexist_and_keeps_the_first(memory: GuestMemory, ram: int) -> None:
    memory.map(mapping(0x10000, 2 * PAGE, ram))
    before = open_fds()
    for iova, size in ((0x10000, 2 * PAGE), (0xF000, 2 * PAGE), (0x11000, PAGE), (0, 1 << 32)):
        for fd in (ram, None):
            with pytest.raises(ClientError) as caught:
                memory.map(mapping(iova, size, fd))
            assert caught.value.errno == errno.EEXIST
    assert open_fds() == before
    assert memory.generation == 1
    assert stamp(memory.view(0x11000, 8, False)) == 1


def test_a_map_may_cover_everything(memory: GuestMemory) -> None:
    memory.map(mapping(0, U64_END, None))
    assert memory.statistics().remote_bytes == U64_END
    with pytest.raises(RemoteOnly):
        memory.views(U64_END - 1, 1, True)
    memory.unmap(0, U64_END)


def test_subscribers_hear_of_it_before_the_memory_goes(memory: GuestMemory, ram: int) -> None:
    memory.map(mapping(0x10000, PAGE, ram))
    memory.map(mapping(0x12000, PAGE, ram))
    kept = [memory.view(0x10000, PAGE, True)]
    heard: list[tuple[int, int]] = []
    mappings = guest_mappings()

    def drop(start: int, end: int) -> None:
        heard.append((start, end))
        assert memory.view(0x10000, 1, True) is None
        assert guest_mappings() == mappings
        assert stamp(kept[0]) == 0
        kept.clear()

    unsubscribe = memory.subscribe(drop)
    memory.unmap(0x0, 0x8000)
    assert heard == []
    memory.unmap(0, U64_END)
    assert heard == [(0x10000, 0x13000)]
    assert guest_mappings() == mappings - 1
    memory.map(mapping(0x10000, PAGE, ram))
    unsubscribe()
    unsubscribe()
    memory.clear()
    memory.clear()
    assert len(heard) == 1


def test_a_view_in_a_local_does_not_hinder_the_unmap(memory: GuestMemory, ram: int) -> None:
    mappings = guest_mappings()
    memory.map(mapping(0, PAGE, ram))
    view = memory.view(0, 8, True)
    assert view is not None
    memory.unmap(0, PAGE)
    assert memory.view(0, 8, True) is None
    assert memory.statistics().files == 0
    view[0] = 1  # alive, and no fault
    memory.map(mapping(0, PAGE, ram))
    assert stamp(memory.view(0, 8, False)) == 1
    memory.clear()
    assert guest_mappings() == mappings + 1
    del view
    assert guest_mappings() == mappings


def test_the_last_hit_is_forgotten_with_its_mapping(memory: GuestMemory, ram: int) -> None:
    memory.map(mapping(0, PAGE, ram, 0))
    assert stamp(memory.view(0, 8, False)) == 0
    memory.unmap(0, PAGE)
    assert memory.view(0, 8, False) is None
    memory.map(mapping(0, PAGE, ram, 3 * PAGE))
    assert stamp(memory.view(0, 8, False)) == 3


def test_hits_of_many_pages_are_forgotten_with_their_mappings(
    memory: GuestMemory, ram: int
) -> None:
    def show() -> list[int | None]:
        views = [memory.view(page * PAGE, 8, False) for page in (2, 0, 1, 2, 3, 0)]
        return [None if view is None else stamp(view) for view in views]

    for page in range(3):
        memory.map(mapping(page * PAGE, PAGE, ram, (3 + 2 * page) * PAGE))
    assert show() == show() == [7, 3, 5, 7, None, 3]
    memory.unmap(PAGE, 2 * PAGE)
    assert show() == [None, 3, None, None, None, 3]
    memory.map(mapping(PAGE, 2 * PAGE, ram, 0))
    assert show() == show() == [1, 3, 0, 1, None, 3]


def test_more_pages_than_are_remembered(memory: GuestMemory) -> None:
    pages = 3 * guest_memory.CACHED_PAGES // 2
    fd = memfd(pages, stamp=True)
    for page in range(pages):
        memory.map(mapping((pages - 1 - page) * PAGE, PAGE, fd, page * PAGE))
    os.close(fd)
    for page in [*range(pages), *range(0, pages, 2)]:
        assert stamp(memory.view(page * PAGE, 8, True)) == pages - 1 - page


def test_the_number_of_mappings_is_bounded(ram: int) -> None:
    memory = GuestMemory(max_maps=2)
    for page in range(2):
        memory.map(mapping(page * PAGE, PAGE, ram))
    with pytest.raises(ClientError) as caught:
        memory.map(mapping(2 * PAGE, PAGE, ram))
    assert caught.value.errno == errno.ENOSPC
    assert "limit of 2" in str(caught.value)
    memory.unmap(0, PAGE)
    memory.map(mapping(2 * PAGE, PAGE, ram))
    memory.clear()


@pytest.mark.slow
def test_as_many_mappings_as_a_client_may_have() -> None:
    """Page by page, slices of one file, as behind a vIOMMU; then a ladder up to 2^64."""
    memory = GuestMemory()
    pages = limits.MAX_DMA_MAPS
    fd = memfd(pages + 1)
    fds, mappings = open_fds(), guest_mappings()
    for page in range(pages):  # backwards, and each page on its mirror, so that nothing merges
        memory.map(mapping((pages - 1 - page) * 2 * PAGE, PAGE, fd, page * PAGE))
    assert (open_fds(), guest_mappings()) == (fds + 1, mappings + 1)
    assert memory.statistics().maps == pages
    with pytest.raises(ClientError) as caught:
        memory.map(mapping(1 << 40, PAGE, fd))
    assert caught.value.errno == errno.ENOSPC
    os.pwrite(fd, b"here", (pages - 1) * PAGE)
    assert bytes(memory.view(0, 4, False) or b"") == b"here"
    memory.unmap(0, 2 * PAGE)
    start = 0
    for bit in range(13, 64):
        memory.unmap(start, (1 << bit) - start)
        start = 1 << bit
    assert memory.statistics().maps == 0
    memory.unmap(start, U64_END - start)
    assert (open_fds(), guest_mappings()) == (fds, mappings)
    os.close(fd)

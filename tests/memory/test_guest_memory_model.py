"""Guest memory against a model of it: a dict of pages."""

from __future__ import annotations

import errno
import os
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.memory.memory_files import PAGE, guest_mappings, memfd, open_fds
from vfio_user_virtio.device import DmaAccess, DmaMapping
from vfio_user_virtio.errors import ClientError, DriverError
from vfio_user_virtio.memory.guest_memory import GuestMemory, RemoteOnly

READ, WRITE = DmaAccess.READ, DmaAccess.WRITE
BOTH = READ | WRITE


def mapping(
    iova: int, size: int, fd: int | None, offset: int = 0, access: DmaAccess = BOTH
) -> DmaMapping:
    return DmaMapping(iova, size, access, None if fd is None else os.dup(fd), offset)


PAGES = 12
FILES = 2


class GuestMemoryModel(RuleBasedStateMachine):
    """The model: for each page of a small address space, which page of which file it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.before = open_fds(), guest_mappings()
        self.fds = [memfd(PAGES, stamp=True) for _ in range(FILES)]
        for index, fd in enumerate(self.fds):
            for page in range(PAGES):
                os.pwrite(fd, bytes([page, index]), page * PAGE)
        self.base = guest_mappings()
        self.memory = GuestMemory()
        self.shown: dict[int, tuple[int | None, int, DmaAccess]] = {}
        self.ranges: set[tuple[int, int]] = set()
        self.heard: list[tuple[int, int]] = []
        self.memory.subscribe(lambda start, end: self.heard.append((start, end)))

    @rule(
        page=st.integers(0, PAGES - 1),
        count=st.integers(1, 4),
        file=st.none() | st.integers(0, FILES - 1),
        file_page=st.integers(0, PAGES - 1),
        access=st.sampled_from([READ, WRITE, BOTH]),
    )
    def map(
        self, page: int, count: int, file: int | None, file_page: int, access: DmaAccess
    ) -> None:
        fd = None if file is None else self.fds[file]
        generation = self.memory.generation
        taken = any(page + i in self.shown for i in range(count))
        beyond = file is not None and file_page + count > PAGES
        request = mapping(page * PAGE, count * PAGE, fd, file_page * PAGE, access)
        if taken or beyond:
            with pytest.raises(ClientError) as caught:
                self.memory.map(request)
            assert caught.value.errno == (errno.EEXIST if taken else errno.EINVAL)
            assert self.memory.generation == generation
            return
        self.memory.map(request)
        assert self.memory.generation > generation
        self.ranges.add((page, page + count))
        for i in range(count):
            self.shown[page + i] = (file, file_page + i, access)

    @rule(page=st.integers(0, PAGES + 3), count=st.integers(1, PAGES + 4))
    def unmap(self, page: int, count: int) -> None:
        inside = {r for r in self.ranges if page <= r[0] and r[1] <= page + count}
        split = {r for r in self.ranges if r[0] < page + count and r[1] > page} - inside
        self.heard.clear()
        if split:
            with pytest.raises(ClientError) as caught:
                self.memory.unmap(page * PAGE, count * PAGE)
            assert caught.value.errno == errno.EINVAL
            assert not self.heard
            return
        self.memory.unmap(page * PAGE, count * PAGE)
        assert self.heard == (
            [(min(r[0] for r in inside) * PAGE, max(r[1] for r in inside) * PAGE)] if inside else []
        )
        self.ranges -= inside
        for first, last in inside:
            for gone in range(first, last):
                del self.shown[gone]

    @precondition(lambda self: self.shown)
    @rule()
    def clear(self) -> None:
        self.memory.clear()
        self.shown.clear()
        self.ranges.clear()

    @rule(
        start=st.integers(0, PAGES * PAGE),
        size=st.integers(0, 5 * PAGE),
        write=st.booleans(),
    )
    def look(self, start: int, size: int, write: bool) -> None:
        wanted = WRITE if write else READ
        pages = range(start // PAGE, (start + size - 1) // PAGE + 1) if size else range(0)
        shown = [self.shown.get(page) for page in pages]
        view = self.memory.view(start, size, write)
        if any(entry is None or not entry[2] & wanted for entry in shown):
            assert view is None
            with pytest.raises(DriverError):
                self.memory.views(start, size, write)
            return
        entries = [entry for entry in shown if entry is not None]
        if any(entry[0] is None for entry in entries):
            assert view is None
            with pytest.raises(RemoteOnly):
                self.memory.views(start, size, write)
            return
        expected = b"".join(
            os.pread(self.fds[file], PAGE, page * PAGE)
            for file, page, _access in entries
            if file is not None
        )[start % PAGE :][:size]
        views = self.memory.views(start, size, write)
        assert b"".join(views) == expected
        assert all(piece.readonly is not write for piece in views)
        runs = sum(
            a[0] != b[0] or a[1] + 1 != b[1] or (a[2] ^ b[2]) & WRITE != 0
            for a, b in pairwise(entries)
        )
        assert len(views) == (runs + 1 if size else 0)
        if runs:
            assert view is None
        else:
            assert view is not None
            assert view == expected
            assert view.readonly is not write

    @invariant()
    def one_mapping_for_each_file_and_access(self) -> None:
        keys = {
            (file, bool(access & WRITE))
            for file, _page, access in self.shown.values()
            if file is not None
        }
        statistics = self.memory.statistics()
        assert statistics.files == len(keys)
        assert guest_mappings() == self.base + len(keys)
        assert statistics.maps == len(self.ranges)
        local = sum(entry[0] is not None for entry in self.shown.values())
        assert statistics.mapped_bytes == local * PAGE
        assert statistics.remote_bytes == (len(self.shown) - local) * PAGE

    def teardown(self) -> None:
        self.memory.clear()
        for fd in self.fds:
            os.close(fd)
        assert (open_fds(), guest_mappings()) == self.before


TestGuestMemoryModel = GuestMemoryModel.TestCase
TestGuestMemoryModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)

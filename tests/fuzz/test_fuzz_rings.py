"""The fuzz target of the rings, on hypothesis' bytes: it runs, and it can find something."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz import fuzz_rings
from tests.virtio.rings import (
    AVAIL,
    BUFFERS,
    DESC,
    INDIRECT,
    MEMORY_SIZE,
    NEXT,
    TABLES,
    WRITE,
    Descriptor,
    FastRing,
    RingDriver,
    SlowRing,
)

SIZE = 8
near = st.integers(0, SIZE + 1)
descriptors = st.builds(
    Descriptor,
    st.sampled_from([TABLES, TABLES + 16, BUFFERS, 0, MEMORY_SIZE - 1, (1 << 64) - 1])
    | st.integers(0, (1 << 64) - 1),
    st.sampled_from([0, 1, 16, 32, 16 * SIZE, 16 * 1024, 0xFFFF_FFFF]) | st.integers(0, 0xFFFF),
    st.sampled_from([0, NEXT, WRITE, NEXT | WRITE, INDIRECT, INDIRECT | WRITE, INDIRECT | NEXT])
    | st.integers(0, 0xFFFF),
    near | st.integers(0, 0xFFFF),
)
tables = st.lists(descriptors, min_size=SIZE, max_size=SIZE).map(
    lambda entries: b"".join(entry.encode() for entry in entries)
)


@given(st.binary(max_size=400))
@example(b"")
def test_any_bytes(data: bytes) -> None:
    fuzz_rings.one_input(data)


@given(
    st.sampled_from([0, fuzz_rings.EVENT_IDX]),
    st.sampled_from([fuzz_rings.INDIRECT_DESC, fuzz_rings.INDIRECT_DESC, 0]),
    st.integers(0, 0xFFFF),
    st.lists(near, max_size=7),
    st.lists(near, min_size=SIZE + 2, max_size=SIZE + 2),
    tables,
    tables,
)
def test_likely_rings(
    event_idx: int,
    indirect: int,
    start: int,
    steps: list[int],
    available: list[int],
    table: bytes,
    more: bytes,
) -> None:
    indices = [start]
    for step in steps:
        indices.append((indices[-1] + step) & 0xFFFF)
    fuzz_rings.one_input(
        bytes([3 | event_idx | indirect | len(steps) << 5])
        + struct.pack(f"<{len(indices)}H{SIZE + 2}H", *indices, *available)
        + table
        + more
    )


def two_rings(*descriptors: Descriptor) -> tuple[FastRing, SlowRing]:
    fast, slow = FastRing(SIZE), SlowRing(SIZE)
    driver = RingDriver(SIZE, fast.memory, slow.memory)
    driver.write_table(DESC, descriptors)
    driver.offer(0)
    return fast, slow


def test_it_reaches_whole_chains() -> None:
    fast, slow = two_rings(Descriptor(BUFFERS, 9, WRITE))
    assert fuzz_rings.drain(fast, slow)
    assert fast.position == slow.position == (1, 1)


def test_it_finds_another_exception() -> None:
    class Broken(FastRing):
        def take(self) -> None:
            raise IndexError

    with pytest.raises(IndexError):
        fuzz_rings.outcome(Broken(SIZE))


def test_it_finds_queues_that_differ() -> None:
    fast, slow = two_rings(Descriptor(BUFFERS, 9, WRITE))
    slow.memory.data[DESC + 8] = 10
    with pytest.raises(AssertionError, match="the same chain"):
        fuzz_rings.drain(fast, slow)
    fast, slow = two_rings(Descriptor(BUFFERS, 9, WRITE))
    slow.memory.data[AVAIL] = 1
    with pytest.raises(AssertionError, match="both decide alike"):
        fuzz_rings.drain(fast, slow)


def test_it_finds_a_ring_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = two_rings(Descriptor(BUFFERS, 9, WRITE))
    monkeypatch.setattr(fast, "put", lambda head, written: fast.start(0, 0))
    monkeypatch.setattr(slow, "put", lambda head, written: slow.start(0, 0))
    with pytest.raises(AssertionError, match="more chains than it holds"):
        fuzz_rings.drain(fast, slow)

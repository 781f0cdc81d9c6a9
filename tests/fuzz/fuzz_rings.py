"""Any bytes in a ring's memory: chains within bounds or DriverError, and both queues agree.

That is: whatever the descriptor table, an indirect table and the available ring hold, and however
the available index moves, `SplitQueue` and `SlowQueue` take the same chains or raise DriverError
and nothing else; a chain is never longer than the limits and lies in the ring; a ring never gives
more chains than it has descriptors; and both write the same bytes and come to the same decisions.
The one difference allowed: the mapped queue refuses at once a chain with a buffer that is not
memory, of which the other gives the addresses only.

Run it with ``python -m tests.fuzz.fuzz_rings -max_total_time=60`` (atheris, libFuzzer's options);
the tests run `one_input` on hypothesis' bytes.

Input: a byte (low three bits: log2 of the ring's size, at most 4; bit 3 EVENT_IDX, bit 4
INDIRECT_DESC; the top three: how often the index moves), the u16 index at which the device stands,
the u16 indices that the driver publishes, the available ring's flags, entries and used_event, the
descriptor table, and what lies at `TABLES`.
"""

from __future__ import annotations

import importlib
import struct
import sys
from typing import Final

from tests.virtio.rings import (
    AVAIL,
    DESC,
    MEMORY_SIZE,
    TABLES,
    FastRing,
    Ring,
    RingDriver,
    SlowRing,
    Taken,
)
from vfio_user_virtio import limits
from vfio_user_virtio.errors import DriverError

REFUSED: Final = "refused"
EVENT_IDX: Final = 1 << 3
INDIRECT_DESC: Final = 1 << 4


def outcome(ring: Ring) -> Taken | str | None:
    """What taking a chain comes to.  The one place that says which exception may come out."""
    before = ring.position
    try:
        taken = ring.take()
    except DriverError:
        assert ring.position == before, "a refused chain is not taken"
        return REFUSED
    if taken is not None:
        pieces = taken.readable + taken.writable
        assert len(pieces) <= limits.MAX_CHAIN_DESCRIPTORS
        assert all(piece.size <= limits.MAX_DESCRIPTOR_LENGTH for piece in pieces)
        assert 0 <= taken.head < ring.size
    return taken


def is_memory(taken: Taken) -> bool:
    """Whether every buffer of the chain is."""
    pieces = taken.readable + taken.writable
    return all(piece.iova + piece.size <= MEMORY_SIZE for piece in pieces)


def drain(fast: Ring, slow: Ring) -> bool:
    """Take and return every chain on both; False once they have refused one."""
    for _ in range(fast.size + 1):
        by_slow, by_fast = outcome(slow), outcome(fast)
        if isinstance(by_slow, Taken) and not is_memory(by_slow):
            by_slow = REFUSED
            slow.give_back()
        assert by_fast == by_slow, "both queues see the same chain"
        if by_fast is None:
            return True
        if not isinstance(by_fast, Taken):
            return False
        written = sum(piece.size for piece in by_fast.writable)
        for ring in (fast, slow):
            ring.put(by_fast.head, written & 0xFFFF_FFFF)
        if written & 1:  # some in batches, some alone
            publish(fast, slow)
    raise AssertionError("a ring gave more chains than it holds")


def publish(fast: Ring, slow: Ring) -> None:
    fast.publish()
    slow.publish()
    assert fast.should_interrupt() == slow.should_interrupt(), "both decide alike"


def one_input(data: bytes) -> None:
    """One run of the fuzz target.  AssertionError or any other exception is a finding."""
    data = data.ljust(32, b"\0")
    setup = data[0]
    size = 1 << min(setup & 7, 4)
    event_idx, indirect = bool(setup & EVENT_IDX), bool(setup & INDIRECT_DESC)
    start, *indices = struct.unpack_from(f"<{1 + (setup >> 5)}H", data, 1)
    rest = data[3 + 2 * len(indices) :]
    available, rest = rest[: 4 + 2 * size], rest[4 + 2 * size :]
    table, rest = rest[: 16 * size], rest[16 * size :]

    fast = FastRing(size, event_idx=event_idx, indirect=indirect)
    slow = SlowRing(size, event_idx=event_idx, indirect=indirect)
    driver = RingDriver(size, fast.memory, slow.memory)
    driver.poke(AVAIL, available[:2])
    driver.poke(AVAIL + 4, available[2:])
    driver.poke(DESC, table)
    driver.poke(TABLES, rest[: MEMORY_SIZE - TABLES])
    for ring in (fast, slow):
        ring.start(start, start)
    for index in indices:
        driver.publish(index)
        for ring in (fast, slow):
            ring.disable_kicks()
        if not drain(fast, slow):
            break
        publish(fast, slow)
        assert fast.enable_kicks() == slow.enable_kicks() == (fast.position[0] == index)
    assert fast.position == slow.position
    assert fast.memory.data == slow.memory.data, "both leave the same bytes"


def main() -> None:
    atheris = importlib.import_module("atheris")  # has no types, and is not there on Python 3.14
    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

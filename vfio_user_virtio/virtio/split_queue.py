"""A split virtqueue, device side, in guest memory that this process has mapped (virtio 1.4, Split
Virtqueues).

This is the per-packet path, so it works on memoryviews cast to the ring's own widths, takes whole
chains at a time and makes no object that it could avoid.  Nothing the driver wrote is believed:
indices, lengths, flags and addresses are checked as they are read, each is read once, and a broken
rule raises `DriverError`, upon which the device asks for a reset.

Three indices say where the device stands.  `next_avail` is the next available entry to take,
`next_used` the next used entry to fill; whatever lies between them is taken and unfinished.
Entries can be given back by moving `next_avail` (`give_back`), since taking one leaves no trace in
guest memory.

A queue whose rings or buffers cannot be mapped is served by `slow_queue.SlowQueue` instead.
"""

from __future__ import annotations

import platform
import struct
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from vfio_user_virtio import limits
from vfio_user_virtio.errors import DriverError
from vfio_user_virtio.virtio.barrier import full_barrier

if TYPE_CHECKING:
    from collections.abc import Callable

DESCRIPTOR_SIZE: Final = 16
F_NEXT: Final = 1
F_WRITE: Final = 2
F_INDIRECT: Final = 4
AVAIL_F_NO_INTERRUPT: Final = 1
USED_F_NO_NOTIFY: Final = 1

DESCRIPTOR: Final = struct.Struct("<QIHH")
"""addr (IOVA), len in bytes, flags, next."""
assert DESCRIPTOR.size == DESCRIPTOR_SIZE

Views: TypeAlias = "list[memoryview]"
ViewsOf: TypeAlias = "Callable[[int, int, bool], Views]"
"""The host's views of (iova, size, for writing); raises DriverError, or what the memory raises."""


class RingLayout(NamedTuple):
    """Sizes in bytes and alignments of the three areas of a ring of `size` descriptors."""

    desc: int
    avail: int
    used: int


DESC_ALIGN: Final = 16
AVAIL_ALIGN: Final = 2
USED_ALIGN: Final = 4


def ring_layout(size: int) -> RingLayout:
    """Area sizes with the event fields, whether or not EVENT_IDX uses them."""
    return RingLayout(DESCRIPTOR_SIZE * size, 6 + 2 * size, 6 + 8 * size)


def check_alignment_untrusted(desc: int, driver: int, device: int) -> None:
    """Raises DriverError if an area of a ring is not aligned as the standard demands."""
    for name, address, align in (
        ("queue_desc", desc, DESC_ALIGN),
        ("queue_driver", driver, AVAIL_ALIGN),
        ("queue_device", device, USED_ALIGN),
    ):
        if address % align:
            raise DriverError(f"{name} {address:#x} is not aligned to {align} bytes")


class Chain(NamedTuple):
    """A descriptor chain: what the device may read, then what it may write."""

    head: int
    readable: Views
    writable: Views


class SplitQueue:
    """One running queue.  `desc`, `avail` and `used` are views of the whole areas."""

    __slots__ = (
        "_avail",
        "_avail_event",
        "_available",
        "_desc",
        "_event_idx",
        "_indirect",
        "_mask",
        "_used",
        "_used_elements",
        "_views_of",
        "next_avail",
        "next_used",
        "signalled",
        "size",
    )

    def __init__(
        self,
        size: int,
        desc: memoryview,
        avail: memoryview,
        used: memoryview,
        *,
        views_of: ViewsOf,
        event_idx: bool,
        indirect: bool,
    ) -> None:
        layout = ring_layout(size)
        self.size = size
        self._mask = size - 1
        self._desc = desc[: layout.desc].cast("Q")
        self._avail = avail[: layout.avail].cast("H")
        self._used = used[: layout.used].cast("H")
        self._used_elements = used[: layout.used - 2].cast("I")
        self._avail_event = 2 + 4 * size
        self._views_of = views_of
        self._event_idx = event_idx
        self._indirect = indirect
        self.start(0, 0)

    def start(self, next_avail: int, next_used: int) -> None:
        """Go on from these indices (0, 0 for a queue that was just enabled)."""
        self.next_avail = next_avail
        self._available = next_avail
        self.next_used = next_used
        self.signalled = next_used

    # --- taking chains -------------------------------------------------------------------------

    def look(self) -> int:
        """See how far the driver has got; how many available entries wait to be taken."""
        available = self._avail[1]
        check = (available - self.next_avail) & 0xFFFF
        if check > self.size:
            raise DriverError(
                f"the available index is {check} entries ahead in a ring of {self.size}"
            )
        order_accesses()
        self._available = available
        return check

    def take(self) -> Chain | None:
        """The next available chain, or None if there is none."""
        if self.next_avail == self._available and self.look() == 0:
            return None
        head = self._avail[2 + (self.next_avail & self._mask)]
        if head >= self.size:
            raise DriverError(f"descriptor {head} does not exist in a ring of {self.size}")
        address = self._desc[2 * head]
        word = self._desc[2 * head + 1]
        flags = word >> 32 & 0xFFFF
        if flags & (F_NEXT | F_INDIRECT):
            chain = self._walk(head, address, word)
        else:
            views = self._views_of(address, word & 0xFFFF_FFFF, flags & F_WRITE != 0)
            chain = Chain(head, [], views) if flags & F_WRITE else Chain(head, views, [])
        self.next_avail = (self.next_avail + 1) & 0xFFFF
        return chain

    def give_back(self, entries: int = 1) -> None:
        """Un-take the last `entries` chains: they will be taken again."""
        self.next_avail = (self.next_avail - entries) & 0xFFFF

    def _walk(self, head: int, address: int, word: int) -> Chain:
        chain = Chain(head, [], [])
        table, size, index, indirect = self._desc, self.size, head, False
        for _ in range(limits.MAX_CHAIN_DESCRIPTORS):
            flags = word >> 32 & 0xFFFF
            length = word & 0xFFFF_FFFF
            if flags & F_INDIRECT:
                if indirect:
                    raise DriverError("an indirect table holds an indirect descriptor")
                table, size = self._indirect_table(address, length, flags)
                index, indirect = 0, True
            else:
                if flags & F_WRITE:
                    chain.writable.extend(self._views_of(address, length, True))
                elif chain.writable:
                    raise DriverError("a readable descriptor follows a writable one")
                else:
                    chain.readable.extend(self._views_of(address, length, False))
                if not flags & F_NEXT:
                    return chain
                index = word >> 48
                if index >= size:
                    raise DriverError(f"descriptor {index} does not exist in a table of {size}")
            address = table[2 * index]
            word = table[2 * index + 1]
        raise DriverError(
            f"a chain has more than {limits.MAX_CHAIN_DESCRIPTORS} descriptors, or is a loop"
        )

    def _indirect_table(self, address: int, length: int, flags: int) -> tuple[memoryview, int]:
        check_indirect_untrusted(length, flags, allowed=self._indirect)
        views = self._views_of(address, length, False)
        table = views[0] if len(views) == 1 else memoryview(b"".join(views))
        return table.cast("Q"), length // DESCRIPTOR_SIZE

    # --- returning them ------------------------------------------------------------------------

    def put(self, head: int, written: int) -> None:
        """Fill the next used entry; the driver sees it at `publish`."""
        element = 1 + 2 * (self.next_used & self._mask)
        self._used_elements[element] = head
        self._used_elements[element + 1] = written
        self.next_used = (self.next_used + 1) & 0xFFFF

    def publish(self) -> None:
        """Let the driver see every entry that was put."""
        order_accesses()
        self._used[1] = self.next_used

    # --- notifications -------------------------------------------------------------------------

    def should_interrupt(self) -> bool:
        """Whether the driver wants an interrupt for what was published since the last call."""
        full_barrier()
        new, old = self.next_used, self.signalled
        self.signalled = new
        if new == old:
            return False
        if self._event_idx:
            event = self._avail[2 + self.size]
            return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
        return not self._avail[0] & AVAIL_F_NO_INTERRUPT

    def disable_kicks(self) -> None:
        """Ask the driver not to notify while the ring is being worked on.

        With EVENT_IDX nothing is to be done: an event index that has been passed suppresses.
        """
        if not self._event_idx:
            self._used[0] = USED_F_NO_NOTIFY

    def enable_kicks(self) -> bool:
        """Ask for a notification at the next entry; False if one came meanwhile (look again)."""
        if self._event_idx:
            self._used[self._avail_event] = self.next_avail
        else:
            self._used[0] = 0
        full_barrier()
        return self._avail[1] == self.next_avail


def check_indirect_untrusted(length: int, flags: int, *, allowed: bool) -> None:
    """Raises DriverError unless a descriptor with F_INDIRECT may have this length and flags."""
    if not allowed:
        raise DriverError("an indirect descriptor without INDIRECT_DESC")
    if flags & F_NEXT:
        raise DriverError("an indirect descriptor has a next one")
    limit = DESCRIPTOR_SIZE * limits.MAX_CHAIN_DESCRIPTORS
    if length % DESCRIPTOR_SIZE or not 0 < length <= limit:
        raise DriverError(
            f"an indirect table of {length} bytes; it must be a multiple of 16, at most {limit}"
        )


def _nothing() -> None:
    pass


def ordering_for(machine: str) -> Callable[[], object]:
    """What keeps loads in order with loads and stores with stores: on x86-64, nothing needs to."""
    return _nothing if machine == "x86_64" else full_barrier


order_accesses: Final = ordering_for(platform.machine())

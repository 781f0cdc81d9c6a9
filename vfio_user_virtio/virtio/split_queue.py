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

import struct
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from vfio_user_virtio import limits
from vfio_user_virtio.errors import DriverError
from vfio_user_virtio.virtio.barrier import full_barrier, order_accesses

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

_LENGTH: Final = 0xFFFF_FFFF
_NEXT: Final = F_NEXT << 32
_WRITE: Final = F_WRITE << 32
_INDIRECT: Final = F_INDIRECT << 32
_LINKED: Final = _NEXT | _INDIRECT
"""Where length and flags lie in the second half of a descriptor, read as one u64."""

Views: TypeAlias = "list[memoryview]"
ViewsOf: TypeAlias = "Callable[[int, int, bool], Views]"
"""The host's views of (iova, size, for writing), at most one per page and one more; raises
DriverError, or what the memory raises."""


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
        "next_avail",
        "next_used",
        "signalled",
        "size",
        "used_written",
        "views_of",
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
        self.views_of = views_of
        """What `take` asks for the buffers of a chain."""
        self.used_written = False
        """Set at each write to the used ring; for its owner to clear."""
        self._event_idx = event_idx
        self._indirect = indirect
        self.start(0, 0)

    def start(self, next_avail: int, next_used: int) -> None:
        """Go on from these indices (0, 0 for a queue that was just enabled)."""
        self.next_avail = next_avail
        self._available = next_avail
        self.next_used = next_used
        self.signalled = next_used

    @property
    def used_idx(self) -> int:
        """The used index in guest memory: where a queue stands that has nothing in flight."""
        return self._used[1]

    # --- taking chains -------------------------------------------------------------------------

    def look(self) -> int:
        """See how far the driver has got; how many available entries wait to be taken.

        Raises DriverError if that and what was taken and not put would not fit the ring.
        """
        available = self._avail[1]
        order_accesses()
        waiting = (available - self.next_avail) & 0xFFFF
        if waiting > self.size - ((self.next_avail - self.next_used) & 0xFFFF):
            raise too_far(waiting, self.next_avail, self.next_used, self.size)
        self._available = available
        return waiting

    def take(self) -> Chain | None:
        """The next available chain, or None if there is none.

        Buffers longer than `limits.MAX_DESCRIPTOR_LENGTH` appear cut to that.  Raises DriverError
        and takes nothing if the chain breaks a rule.
        """
        position = self.next_avail
        if position == self._available and self.look() == 0:
            return None
        head = self._avail[2 + (position & self._mask)]
        if head >= self.size:
            raise DriverError(f"descriptor {head} does not exist in a ring of {self.size}")
        address = self._desc[2 * head]
        word = self._desc[2 * head + 1]
        if word & _LINKED:
            chain = self._walk(head, address, word)
        else:
            length = word & _LENGTH
            if length > limits.MAX_DESCRIPTOR_LENGTH:
                length = limits.MAX_DESCRIPTOR_LENGTH
            if word & _WRITE:
                chain = Chain(head, [], self.views_of(address, length, True))
            else:
                chain = Chain(head, self.views_of(address, length, False), [])
        self.next_avail = (position + 1) & 0xFFFF
        return chain

    def give_back(self, entries: int = 1) -> None:
        """Un-take the last `entries` chains, of which none was put: they will be taken again."""
        self.next_avail = (self.next_avail - entries) & 0xFFFF

    def _walk(self, head: int, address: int, word: int) -> Chain:
        readable: Views = []
        writable: Views = []
        table, size, index = self._desc, self.size, 0
        writing = indirect = False
        for _ in range(MAX_STEPS):
            length = word & _LENGTH
            if word & _INDIRECT:
                flags = word >> 32 & 0xFFFF
                check_indirect_untrusted(length, flags, nested=indirect, allowed=self._indirect)
                views = self.views_of(address, length, False)
                table = (views[0] if len(views) == 1 else memoryview(b"".join(views))).cast("Q")
                size, index, indirect = length // DESCRIPTOR_SIZE, 0, True
            else:
                if length > limits.MAX_DESCRIPTOR_LENGTH:
                    length = limits.MAX_DESCRIPTOR_LENGTH
                if word & _WRITE:
                    side, writing = writable, True
                elif writing:
                    raise DriverError("a readable descriptor follows a writable one")
                else:
                    side = readable
                side += self.views_of(address, length, writing)
                if len(side) > limits.MAX_CHAIN_PIECES:
                    raise DriverError(
                        f"a chain's buffers lie in more than {limits.MAX_CHAIN_PIECES} pieces, "
                        "or it is a loop"
                    )
                if not word & _NEXT:
                    return Chain(head, readable, writable)
                index = word >> 48
                if index >= size:
                    raise DriverError(f"descriptor {index} does not exist in a table of {size}")
            address = table[2 * index]
            word = table[2 * index + 1]
        raise endless_chain()

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
        self.used_written = True

    # --- notifications -------------------------------------------------------------------------

    def should_interrupt(self) -> bool:
        """Whether the driver wants an interrupt for what was published since the last call."""
        new, old = self.next_used, self.signalled
        if new == old:
            return False
        self.signalled = new
        full_barrier()
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
            self.used_written = True

    def enable_kicks(self) -> bool:
        """Ask for a notification at the next entry; False if one came meanwhile (look again)."""
        if self._event_idx:
            self._used[self._avail_event] = self.next_avail
        else:
            self._used[0] = 0
        self.used_written = True
        full_barrier()
        return self._avail[1] == self.next_avail


def check_indirect_untrusted(length: int, flags: int, *, nested: bool, allowed: bool) -> None:
    """Raises DriverError unless a descriptor with F_INDIRECT may be here, so long, with `flags`.

    F_WRITE means nothing on it, and is ignored as the standard demands.
    """
    if not allowed:
        raise DriverError("an indirect descriptor without INDIRECT_DESC")
    if nested:
        raise DriverError("an indirect table holds an indirect descriptor")
    if flags & F_NEXT:
        raise DriverError("an indirect descriptor has a next one")
    limit = DESCRIPTOR_SIZE * limits.MAX_CHAIN_DESCRIPTORS
    if length % DESCRIPTOR_SIZE or not 0 < length <= limit:
        raise DriverError(
            f"an indirect table of {length} bytes; it must be a multiple of 16, at most {limit}"
        )


MAX_STEPS: Final = limits.MAX_CHAIN_DESCRIPTORS + 1
"""Descriptors that may be read for one chain: an indirect one leads to the others."""


def endless_chain() -> DriverError:
    """What to raise after `MAX_STEPS`."""
    return DriverError(
        f"a chain has more than {limits.MAX_CHAIN_DESCRIPTORS} descriptors, or is a loop"
    )


def too_far(waiting: int, next_avail: int, next_used: int, size: int) -> DriverError:
    """What to raise for an available index `waiting` entries ahead of `next_avail`."""
    unfinished = (next_avail - next_used) & 0xFFFF
    return DriverError(
        f"the available index is {waiting} entries ahead of {next_avail}, "
        f"in a ring of {size} of which {unfinished} are in use"
    )

"""A split virtqueue, driver side (virtio 1.4, Split Virtqueues), over guest memory of a test.

Why: to drive a device as Linux's virtio_ring does, and as nobody should.  `Ring` writes any value
anywhere, for tests of what a device does about a broken or hostile driver; `DriverQueue` keeps the
rules: descriptors from a free list, indirect tables, event index, and a kick only where the device
asks for one.  Nothing here waits; the interrupts are `vfio_user_virtio.testing.virtio_pci`'s.

The two ends run in one process in most tests, so no time passes between them, but they need not:
indices are written after what they announce, and a full barrier stands where a driver needs one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

import attrs

from vfio_user_virtio.virtio.barrier import full_barrier
from vfio_user_virtio.virtio.split_queue import (
    AVAIL_F_NO_INTERRUPT,
    DESCRIPTOR,
    DESCRIPTOR_SIZE,
    F_INDIRECT,
    F_NEXT,
    F_WRITE,
    USED_F_NO_NOTIFY,
    ring_layout,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_user_virtio.testing.guest_ram import GuestBuffer, GuestRam

Segment: TypeAlias = tuple[int, int]
"""IOVA and length in bytes of a part of a buffer."""

TokenT = TypeVar("TokenT")


class QueueFull(Exception):
    """There are fewer free descriptors than the buffer needs; collect used ones first."""


class DeviceBroke(AssertionError):
    """The device wrote something into the used ring that the standard forbids."""


class Ring:
    """The three areas of a ring of `size` descriptors, in memory of `ram`, with no rules.

    `desc`, `driver` and `device` are the areas' IOVAs.  Indices and flags are u16, as they stand.
    """

    def __init__(self, ram: GuestRam, size: int) -> None:
        layout = ring_layout(size)
        self.ram = ram
        self.size = size
        self._areas = [
            ram.allocate(layout.desc),
            ram.allocate(layout.avail),
            ram.allocate_for_device(layout.used),
        ]
        self.desc, self.driver, self.device = (area.iova for area in self._areas)
        self._descriptors = self._areas[0].memory
        self._avail = self._areas[1].memory.cast("H")
        self._used = self._areas[2].memory.cast("B")
        self._used16 = self._used.cast("H")

    def free(self) -> None:
        """Give the memory back; the device must be done with it."""
        for area in self._areas:
            self.ram.free(area)

    def set_descriptor(
        self, index: int, address: int, length: int, flags: int = 0, next_index: int = 0
    ) -> None:
        DESCRIPTOR.pack_into(
            self._descriptors, DESCRIPTOR_SIZE * index, address, length, flags, next_index
        )

    @property
    def avail_flags(self) -> int:
        return self._avail[0]

    @avail_flags.setter
    def avail_flags(self, value: int) -> None:
        self._avail[0] = value

    @property
    def avail_idx(self) -> int:
        return self._avail[1]

    @avail_idx.setter
    def avail_idx(self, value: int) -> None:
        self._avail[1] = value

    def set_avail(self, position: int, head: int) -> None:
        """Write the available entry that index `position` (taken modulo `size`) stands for."""
        self._avail[2 + position % self.size] = head

    @property
    def used_event(self) -> int:
        return self._avail[2 + self.size]

    @used_event.setter
    def used_event(self, value: int) -> None:
        self._avail[2 + self.size] = value

    @property
    def used_flags(self) -> int:
        return self._used16[0]

    @property
    def used_idx(self) -> int:
        return self._used16[1]

    def used(self, position: int) -> tuple[int, int]:
        """The used entry that index `position` stands for: id and written length."""
        start = 4 + 8 * (position % self.size)
        entry = bytes(self._used[start : start + 8])
        return int.from_bytes(entry[:4], "little"), int.from_bytes(entry[4:], "little")

    @property
    def avail_event(self) -> int:
        return self._used16[2 + 4 * self.size]


@attrs.frozen
class Used(Generic[TokenT]):
    """A buffer that came back: what it was added with, and how many bytes the device wrote."""

    token: TokenT
    length: int


@attrs.define
class _Pending(Generic[TokenT]):
    token: TokenT
    descriptors: list[int]
    writable: int
    table: GuestBuffer | None


class DriverQueue(Generic[TokenT]):
    """A virtqueue as a driver that keeps the rules uses it.

    `event_idx` and `indirect` must be what was negotiated.  A buffer of more than one segment goes
    into an indirect table if `indirect`.  `token` is whatever the caller wants back with a buffer.
    """

    def __init__(
        self, ram: GuestRam, size: int, *, event_idx: bool = True, indirect: bool = True
    ) -> None:
        self.ring = Ring(ram, size)
        self.size = size
        self._ram = ram
        self._event_idx = event_idx
        self._indirect = indirect
        self._free = list(range(size - 1, -1, -1))
        self._pending: dict[int, _Pending[TokenT]] = {}
        self._avail = 0
        self._published = 0
        self._used = 0

    @property
    def free_descriptors(self) -> int:
        return len(self._free)

    @property
    def outstanding(self) -> int:
        """Buffers that were added and have not come back."""
        return len(self._pending)

    @property
    def used_waiting(self) -> int:
        """Buffers that came back and have not been collected."""
        return (self.ring.used_idx - self._used) & 0xFFFF

    def close(self) -> list[TokenT]:
        """Give the memory of the ring back; the tokens of all buffers that were outstanding.

        The device must have been reset, or the queue.
        """
        tokens = [pending.token for pending in self._pending.values()]
        for pending in self._pending.values():
            if pending.table is not None:
                self._ram.free(pending.table)
        self._pending.clear()
        self.ring.free()
        return tokens

    # --- to the device -------------------------------------------------------------------------

    def add(
        self, token: TokenT, readable: Sequence[Segment] = (), writable: Sequence[Segment] = ()
    ) -> int:
        """Add a buffer, which the device sees at `publish`; the index of its head.

        Raises QueueFull, and ValueError for a buffer without segments.
        """
        segments = [(*segment, 0) for segment in readable]
        segments += [(*segment, F_WRITE) for segment in writable]
        if not segments:
            raise ValueError("a buffer has at least one segment")
        table = None
        needed = len(segments)
        if self._indirect and needed > 1:
            needed = 1
        if needed > len(self._free):
            raise QueueFull(f"{needed} descriptors are needed, {len(self._free)} are free")
        taken = [self._free.pop() for _ in range(needed)]
        if needed == len(segments):
            for position, (address, length, flags) in enumerate(segments):
                last = position == needed - 1
                self.ring.set_descriptor(
                    taken[position],
                    address,
                    length,
                    flags if last else flags | F_NEXT,
                    0 if last else taken[position + 1],
                )
        else:
            table = self._table(segments)
            self.ring.set_descriptor(taken[0], table.iova, table.size, F_INDIRECT)
        room = sum(length for _, length in writable)
        self._pending[taken[0]] = _Pending(token, taken, room, table)
        self.ring.set_avail(self._avail, taken[0])
        self._avail = (self._avail + 1) & 0xFFFF
        return taken[0]

    def publish(self) -> bool:
        """Let the device see what was added; whether it wants to be notified."""
        full_barrier()
        old, new = self._published, self._avail
        self.ring.avail_idx = self._published = new
        full_barrier()
        if old == new:
            return False
        if self._event_idx:
            return (new - self.ring.avail_event - 1) & 0xFFFF < (new - old) & 0xFFFF
        return not self.ring.used_flags & USED_F_NO_NOTIFY

    def _table(self, segments: list[tuple[int, int, int]]) -> GuestBuffer:
        table = self._ram.allocate(DESCRIPTOR_SIZE * len(segments))
        for index, (address, length, flags) in enumerate(segments):
            last = index == len(segments) - 1
            DESCRIPTOR.pack_into(
                table.memory,
                DESCRIPTOR_SIZE * index,
                address,
                length,
                flags if last else flags | F_NEXT,
                0 if last else index + 1,
            )
        return table

    # --- from the device -----------------------------------------------------------------------

    def collect(self, limit: int | None = None) -> list[Used[TokenT]]:
        """The buffers that came back since the last call, in the device's order, at most `limit`.

        Raises DeviceBroke for an index that ran ahead, an id that was not outstanding, or a length
        beyond what the buffer can hold.
        """
        end = self.ring.used_idx
        ready = (end - self._used) & 0xFFFF
        if ready > len(self._pending):
            raise DeviceBroke(
                f"used idx {end} is {ready} past {self._used}, "
                f"but only {len(self._pending)} buffers are outstanding"
            )
        full_barrier()
        found: list[Used[TokenT]] = []
        for _ in range(ready if limit is None else min(limit, ready)):
            head, length = self.ring.used(self._used)
            pending = self._pending.pop(head, None)
            if pending is None:
                raise DeviceBroke(f"used entry {self._used} returns {head}, which is not out")
            if length > pending.writable:
                raise DeviceBroke(f"{length} bytes written to a buffer of {pending.writable}")
            self._used = (self._used + 1) & 0xFFFF
            self._free.extend(reversed(pending.descriptors))
            if pending.table is not None:
                self._ram.free(pending.table)
            found.append(Used(pending.token, length))
        return found

    def enable_interrupts(self, after: int = 1) -> bool:
        """Ask for an interrupt at the `after`-th next used entry (the first, without EVENT_IDX).

        False if used entries are there already: collect again, no interrupt will come for them.
        """
        if self._event_idx:
            self.ring.used_event = (self._used + after - 1) & 0xFFFF
        else:
            self.ring.avail_flags = 0
        full_barrier()
        return self.ring.used_idx == self._used

    def disable_interrupts(self) -> None:
        """Ask for no interrupts; with EVENT_IDX by an event index that lies behind."""
        if self._event_idx:
            self.ring.used_event = (self._used - 1) & 0xFFFF
        else:
            self.ring.avail_flags = AVAIL_F_NO_INTERRUPT

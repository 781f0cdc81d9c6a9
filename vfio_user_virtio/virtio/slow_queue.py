"""A split virtqueue, device side, in guest memory that is reached piece by piece.

The same ring as `split_queue.SplitQueue`, for the clients that give it no better: guest RAM without
an fd (reached by messages to the client), or rings that a vIOMMU has scattered over pages.  Every
access may wait, so everything is async and copies; it is made to be right, not fast.

The barriers are there because memory that is reached by pieces may be mapped all the same.

Between any two awaits the driver may have reset the queue.  `stop` then makes every further step
raise `QueueStopped`, so that nothing more is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from vfio_user_virtio import limits
from vfio_user_virtio.errors import DriverError
from vfio_user_virtio.virtio.barrier import full_barrier, order_accesses
from vfio_user_virtio.virtio.split_queue import (
    AVAIL_F_NO_INTERRUPT,
    DESCRIPTOR,
    DESCRIPTOR_SIZE,
    F_INDIRECT,
    F_NEXT,
    F_WRITE,
    MAX_STEPS,
    USED_F_NO_NOTIFY,
    check_indirect_untrusted,
    endless_chain,
    too_far,
)

if TYPE_CHECKING:
    from collections.abc import Iterable


class QueueStopped(Exception):
    """The queue was reset while an access to guest memory was under way, or takes no more."""


class AsyncMemory(Protocol):
    """Guest memory by copies.  Raises DriverError where there is none."""

    async def read(self, iova: int, size: int) -> bytes: ...

    async def write(self, iova: int, data: bytes) -> None: ...


class Piece(NamedTuple):
    """Guest memory that belongs to a chain: IOVA and bytes."""

    iova: int
    size: int


class SlowChain(NamedTuple):
    """A descriptor chain by address; nothing of its buffers has been read."""

    head: int
    readable: list[Piece]
    writable: list[Piece]


def total(pieces: Iterable[Piece]) -> int:
    """Bytes in all of `pieces`."""
    return sum(piece.size for piece in pieces)


class SlowQueue:
    """One running queue at the IOVAs `desc`, `avail` and `used`."""

    def __init__(
        self,
        size: int,
        desc: int,
        avail: int,
        used: int,
        *,
        memory: AsyncMemory,
        event_idx: bool,
        indirect: bool,
    ) -> None:
        self.size = size
        self._desc = desc
        self._avail = avail
        self._used = used
        self._memory = memory
        self._event_idx = event_idx
        self._indirect = indirect
        self._stopped = False
        self._finishing = False
        self._publishing = False
        self.placed = True
        """Whether the position is known; if not, the first `take` reads it from guest memory."""
        self.next_avail = 0
        self.next_used = 0
        self.published = 0
        self.signalled = 0

    def start(self, next_avail: int, next_used: int) -> None:
        """Go on from these indices (0, 0 for a queue that was just enabled)."""
        self.next_avail = next_avail
        self.next_used = next_used
        self.published = next_used
        self.signalled = next_used
        self.placed = True

    def start_from_memory(self) -> None:
        """Go on from the used index in guest memory, once that has been read."""
        self.placed = False

    def finish(self) -> None:
        """Take no more chains: `take` raises `QueueStopped`; what was taken can be finished."""
        self._finishing = True

    def go_on(self) -> None:
        """Take chains again, after `finish`."""
        self._finishing = False

    def stop(self) -> None:
        """Touch guest memory no more."""
        self._stopped = True

    async def take(self) -> SlowChain | None:
        """The next available chain, or None if there is none.  As `SplitQueue.take`."""
        if self._finishing:
            raise QueueStopped
        if not self.placed:
            used_idx = await self._read_u16(self._used + 2)
            self.start(used_idx, used_idx)
        available = await self._read_u16(self._avail + 2)
        order_accesses()
        waiting = (available - self.next_avail) & 0xFFFF
        if waiting > self.size - ((self.next_avail - self.next_used) & 0xFFFF):
            raise too_far(waiting, self.next_avail, self.next_used, self.size)
        if not waiting:
            return None
        head = await self._read_u16(self._avail + 4 + 2 * (self.next_avail % self.size))
        chain = await self._walk(head)
        self.next_avail = (self.next_avail + 1) & 0xFFFF
        return chain

    def give_back(self, entries: int = 1) -> None:
        """Un-take the last `entries` chains, of which none was put: they will be taken again."""
        self.next_avail = (self.next_avail - entries) & 0xFFFF

    async def resume(self) -> None:
        """Go on from what was published, though an access failed since.

        All chains after it will be taken again, and it is published again if that is not sure.
        """
        self.next_avail = self.next_used = self.published
        if self._publishing:
            await self.publish()

    async def read(self, pieces: list[Piece], limit: int) -> bytes:
        """The bytes of `pieces`, at most `limit` of them."""
        parts: list[bytes] = []
        for piece in pieces:
            size = min(piece.size, limit)
            parts.append(await self._read(piece.iova, size))
            limit -= size
        return b"".join(parts)

    async def write(self, pieces: list[Piece], data: bytes) -> int:
        """Spread `data` over `pieces`; how many bytes found room."""
        done = 0
        for piece in pieces:
            if part := data[done : done + piece.size]:
                await self._write(piece.iova, part)
                done += len(part)
        return done

    async def put(self, head: int, written: int) -> None:
        """Fill the next used entry; the driver sees it at `publish`."""
        element = head.to_bytes(4, "little") + written.to_bytes(4, "little")
        await self._write(self._used + 4 + 8 * (self.next_used % self.size), element)
        self.next_used = (self.next_used + 1) & 0xFFFF

    async def publish(self) -> None:
        """Let the driver see every entry that was put."""
        order_accesses()
        self.published = self.next_used
        self._publishing = True
        await self._write(self._used + 2, self.next_used.to_bytes(2, "little"))
        self._publishing = False

    async def should_interrupt(self) -> bool:
        """Whether the driver wants an interrupt for what was published since the last call."""
        new, old = self.next_used, self.signalled
        if new == old:
            return False
        full_barrier()
        if self._event_idx:
            event = await self._read_u16(self._avail + 4 + 2 * self.size)
            wanted = (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
        else:
            wanted = not await self._read_u16(self._avail) & AVAIL_F_NO_INTERRUPT
        self.signalled = new
        return wanted

    async def disable_kicks(self) -> None:
        """Ask the driver not to notify while the ring is being worked on."""
        if not self._event_idx:
            await self._write(self._used, USED_F_NO_NOTIFY.to_bytes(2, "little"))

    async def enable_kicks(self) -> bool:
        """Ask for a notification at the next entry; False if one came meanwhile (look again)."""
        if self._event_idx:
            await self._write(self._used + 4 + 8 * self.size, self.next_avail.to_bytes(2, "little"))
        else:
            await self._write(self._used, bytes(2))
        full_barrier()
        return await self._read_u16(self._avail + 2) == self.next_avail

    async def _walk(self, head: int) -> SlowChain:
        chain = SlowChain(head, [], [])
        table, size, index = b"", self.size, head
        for _ in range(MAX_STEPS):
            if index >= size:
                raise DriverError(f"descriptor {index} does not exist in a table of {size}")
            offset = DESCRIPTOR_SIZE * index
            if table:
                fields = DESCRIPTOR.unpack_from(table, offset)
            else:
                fields = DESCRIPTOR.unpack(await self._read(self._desc + offset, DESCRIPTOR_SIZE))
            address, length, flags, index = fields
            if flags & F_INDIRECT:
                check_indirect_untrusted(length, flags, nested=bool(table), allowed=self._indirect)
                table = await self._read(address, length)
                size, index = length // DESCRIPTOR_SIZE, 0
                continue
            piece = Piece(address, min(length, limits.MAX_DESCRIPTOR_LENGTH))
            if flags & F_WRITE:
                chain.writable.append(piece)
            elif chain.writable:
                raise DriverError("a readable descriptor follows a writable one")
            else:
                chain.readable.append(piece)
            if not flags & F_NEXT:
                return chain
        raise endless_chain()

    async def _read(self, iova: int, size: int) -> bytes:
        self._check_running()
        data = await self._memory.read(iova, size) if size else b""
        self._check_running()
        return data

    async def _write(self, iova: int, data: bytes) -> None:
        self._check_running()
        await self._memory.write(iova, data)
        self._check_running()

    def _check_running(self) -> None:
        if self._stopped:
            raise QueueStopped

    async def _read_u16(self, iova: int) -> int:
        return int.from_bytes(await self._read(iova, 2), "little")

"""An administration virtqueue from the driver's side: a split ring and the buffers of its commands
in one piece of memory (virtio 1.4, Split Virtqueues; Administration Virtqueues).

The memory is ours and the device's alone.  A command has two buffers in it, one to be read and one
to be written by the device, each one descriptor; neither indirect tables nor event indices would
save anything here.  Whoever sends a command waits for its answer; whoever stops waiting, because
the time is up, leaves its buffers in the ring: the device may still write to them, so they are used
again only when it has given them back, or has been reset.

What the device writes is not believed: an id that is not out, or a length beyond the buffer, ends
the ring, since nothing that follows could be told apart any more.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import attrs
import trio

from vfio_user_virtio import limits
from vfio_user_virtio.backends.vfio.owner_transport import RingAddresses
from vfio_user_virtio.errors import HostError
from vfio_user_virtio.migration.admin_client import AdminError, held
from vfio_user_virtio.virtio.barrier import full_barrier, order_accesses
from vfio_user_virtio.virtio.split_queue import (
    DESCRIPTOR,
    DESCRIPTOR_SIZE,
    F_NEXT,
    F_WRITE,
    USED_F_NO_NOTIFY,
    ring_layout,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_GRAIN: Final = 64
"""Buffers begin at multiples of this, so that no cache line is in two of them."""
_PER_COMMAND: Final = 2


class Arena:
    """Pieces of `start` … `end` - 1, taken from the first gap that fits."""

    def __init__(self, start: int, end: int) -> None:
        self._gaps: list[tuple[int, int]] = [(_round_up(start), end)]
        self._taken: dict[int, int] = {}

    def take(self, size: int) -> int | None:
        """Where `size` bytes begin; None if no gap is so large."""
        size = _round_up(size)
        for position, (start, end) in enumerate(self._gaps):
            if end - start >= size:
                self._gaps[position] = (start + size, end)
                if start + size == end:
                    del self._gaps[position]
                self._taken[start] = size
                return start
        return None

    def give_back(self, start: int) -> None:
        gaps = sorted([*self._gaps, (start, start + self._taken.pop(start))])
        self._gaps = [gaps[0]]
        for first, last in gaps[1:]:
            if first == self._gaps[-1][1]:
                self._gaps[-1] = (self._gaps[-1][0], last)
            else:
                self._gaps.append((first, last))


@attrs.define(eq=False)
class _Command:
    """A command that is out: its descriptors and where its two buffers are."""

    descriptors: tuple[int, int]
    readable: int
    writable: int
    room: int
    done: trio.Event = attrs.field(factory=trio.Event)
    answer: bytes | None = None
    abandoned: bool = False


class AdminRing:
    """A ring of `size` descriptors at the start of `memory`, which the device has at `iova`.

    `notify` tells the device of new commands.  `abandoned` counts the commands that nobody waits
    for any more.
    """

    def __init__(
        self, memory: memoryview, iova: int, size: int, notify: Callable[[], Awaitable[None]]
    ) -> None:
        self.size = size
        self._memory = memory
        self._words = memory.cast("H")  # one access each: the device reads indices meanwhile
        self._iova = iova
        self._notify = notify
        layout = ring_layout(size)
        self._avail = _round_up(layout.desc)
        self._used = _round_up(self._avail + layout.avail)
        end = _round_up(self._used + layout.used)
        memory[:end] = bytes(end)
        self._arena = Arena(end, len(memory))
        self._free = list(range(size))
        self._out: dict[int, _Command] = {}
        self._next_avail = 0
        self._next_used = 0
        self._failure: HostError | None = None
        self._sending = trio.Lock()
        self._room = trio.Event()

    @property
    def addresses(self) -> RingAddresses:
        areas = (self._iova + offset for offset in (0, self._avail, self._used))
        return RingAddresses(self.size, *areas)

    @property
    def outstanding(self) -> int:
        """Commands that the device has and has not answered."""
        return len(self._out)

    @property
    def abandoned(self) -> int:
        """Those of them that nobody waits for."""
        return sum(command.abandoned for command in self._out.values())

    async def execute(self, readable: bytes, writable: int) -> bytes:
        """Send a command as soon as there is room; what the device wrote.

        Raises HostError if the ring has failed, AdminError for a command that is too long.
        """
        for size in (len(readable), writable):
            if not 0 < size <= limits.MAX_ADMIN_COMMAND_SIZE:
                raise AdminError(
                    errno.EMSGSIZE,
                    f"an administration command of {size} bytes does not go through the owner's "
                    f"queue, which takes 1 to {limits.MAX_ADMIN_COMMAND_SIZE}",
                )
        async with held(self._sending):
            command = await self._when_there_is_room(len(readable), writable)
            self._put(command, readable)
            wanted = self._publish(command)
        try:
            if wanted:
                await self._notify()
            await command.done.wait()
        finally:
            command.abandoned = True
        if command.answer is None:
            assert self._failure is not None
            raise self._failure
        return command.answer

    def collect(self) -> None:
        """Take what the device has given back.

        Raises HostError, having failed, if the device broke a rule.
        """
        while self._failure is None and self._next_used != self._u16(self._used + 2):
            order_accesses()
            entry = self._used + 4 + 8 * (self._next_used % self.size)
            head = int.from_bytes(self._memory[entry : entry + 4], "little")
            length = int.from_bytes(self._memory[entry + 4 : entry + 8], "little")
            command = self._out.pop(head, None)
            if command is None or length > command.room:
                problem = (
                    f"{length} bytes written to a buffer of {command.room}"
                    if command is not None
                    else f"descriptor {head} given back, which it does not have"
                )
                error = HostError(f"the administration virtqueue is broken: {problem}")
                self._finish(command)
                self.fail(error)
                raise error
            self._next_used = self._next_used + 1 & 0xFFFF
            if not command.abandoned:
                command.answer = bytes(self._memory[command.writable : command.writable + length])
            self._finish(command)
            self._release(command)

    def fail(self, error: HostError) -> None:
        """The device is gone or has been reset: every command ends with `error`, now and later."""
        self._failure = self._failure or error
        for command in self._out.values():
            self._finish(command)
        self._room.set()

    @staticmethod
    def _finish(command: _Command | None) -> None:
        if command is not None:
            command.done.set()

    # --- sending -------------------------------------------------------------------------------

    async def _when_there_is_room(self, readable: int, writable: int) -> _Command:
        while True:
            if self._failure is not None:
                raise self._failure
            command = self._allocate(readable, writable)
            if command is not None:
                return command
            self._room = trio.Event()
            await self._room.wait()

    def _allocate(self, readable: int, writable: int) -> _Command | None:
        if len(self._free) < _PER_COMMAND:
            return None
        source = self._arena.take(readable)
        if source is None:
            return None
        target = self._arena.take(writable)
        if target is None:
            self._arena.give_back(source)
            return None
        return _Command((self._free.pop(), self._free.pop()), source, target, writable)

    def _put(self, command: _Command, readable: bytes) -> None:
        self._memory[command.readable : command.readable + len(readable)] = readable
        self._memory[command.writable : command.writable + command.room] = bytes(command.room)
        head, tail = command.descriptors
        source, target = self._iova + command.readable, self._iova + command.writable
        DESCRIPTOR.pack_into(
            self._memory, DESCRIPTOR_SIZE * head, source, len(readable), F_NEXT, tail
        )
        DESCRIPTOR.pack_into(self._memory, DESCRIPTOR_SIZE * tail, target, command.room, F_WRITE, 0)

    def _publish(self, command: _Command) -> bool:
        """Make it available; whether the device wants to be told."""
        head = command.descriptors[0]
        self._out[head] = command
        self._write_u16(self._avail + 4 + 2 * (self._next_avail % self.size), head)
        self._next_avail = self._next_avail + 1 & 0xFFFF
        order_accesses()
        self._write_u16(self._avail + 2, self._next_avail)
        full_barrier()
        return not self._u16(self._used) & USED_F_NO_NOTIFY

    def _release(self, command: _Command) -> None:
        self._arena.give_back(command.readable)
        self._arena.give_back(command.writable)
        self._free.extend(command.descriptors)
        self._room.set()

    def _u16(self, offset: int) -> int:
        return self._words[offset // 2]

    def _write_u16(self, offset: int, value: int) -> None:
        self._words[offset // 2] = value


def _round_up(size: int) -> int:
    return (size + _GRAIN - 1) & -_GRAIN

"""The queues of a member that cannot be worked on in place, served by copies and by messages.

Guest memory without an fd is reached by DMA_READ and DMA_WRITE, and those may not be awaited while
the client waits for us.  So none of this happens in a command: kicks and frames only set a task
going (`SlowService.run`), which takes as long as it takes.  What the switch hands over meanwhile
waits in a bounded backlog.

A pass over one queue is short (`TURN`), the member's queues take turns, and between two frames
other tasks have theirs: memory that is mapped, though in pieces, makes nobody wait by itself.  When
a client does not answer, the queue goes back to what it has published and tries again later.

QEMU re-maps guest memory in steps, and between two of them a ring may be nowhere.  So a pass that
fails says nothing of the driver unless the driver has notified since guest memory was last changed:
otherwise the queue tries again if memory changed during the pass, and waits for the next mapping if
not.  That is how a member with mapped memory has it, too.

The rules of the ring are those of `virtio.slow_queue`; what is done with the frames is the same as
in `receiver` and `transmitter`, whose interfaces the classes here share as far as they are called
from the switch's side.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

import trio

from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.receiver import LARGEST
from vfio_user_virtio.backends.software.transmitter import gather_head
from vfio_user_virtio.errors import ConnectionLost, DriverError, RemoteError
from vfio_user_virtio.virtio.slow_queue import QueueStopped, total

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfio_user_virtio.backends.software.ports import Buffer
    from vfio_user_virtio.backends.software.transmitter import Headers
    from vfio_user_virtio.virtio.slow_queue import Piece, SlowChain, SlowQueue

_log: Final = logging.getLogger(__name__)

BACKLOG_FRAMES: Final = 64
BACKLOG_BYTES: Final = 16 * LARGEST
TURN: Final = 32
"""Chains of one queue before the next queue has its turn."""
RETRY_SECONDS: Final = 1.0
"""Pause after a client has let a request of ours time out."""
_NUM_BUFFERS: Final = slice(10, 12)
_BOUNCE: Final = memoryview(bytearray(LARGEST + 1))


class SlowWorker(Protocol):
    """What serves one slow queue."""

    queue: SlowQueue

    async def run(self) -> bool:
        """Do what there is to do, for a while; whether there may be more.

        Raises DriverError, QueueStopped, or what the memory raises.
        """
        ...


class SlowReceiver:
    """Delivery by way of a backlog; `wake` sets the service going, `room` tells the switch."""

    def __init__(
        self,
        queue: SlowQueue,
        *,
        mergeable: bool,
        wake: Callable[[], None],
        room: Callable[[], None],
    ) -> None:
        self.queue = queue
        self._mergeable = mergeable
        self._wake = wake
        self._room = room
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0
        self.too_long = 0

    def reserve(self) -> Sequence[memoryview] | None:
        return (_BOUNCE,) if self._has_room(LARGEST) else None

    def commit(self, size: int) -> None:
        self._append(bytes(_BOUNCE[:size]))

    def deliver(self, frame: Sequence[Buffer], size: int) -> bool:
        if not self._has_room(size):
            return False
        self._append(b"".join(frame))
        return True

    def peek(self, size: int) -> bytes:
        return bytes(_BOUNCE[:size])

    def reserved(self, size: int) -> Sequence[Buffer]:
        return (_BOUNCE[:size],)

    def forget(self) -> None:
        """Nothing of guest memory is kept here."""

    def keep(self, frames: list[bytes]) -> None:
        """Deliver `frames`, which another receiver of this queue could not, before any other."""
        self._backlog.extendleft(reversed(frames))
        self._backlog_bytes += sum(map(len, frames))

    def take_held(self) -> list[bytes]:
        """The frames that wait, oldest first; they are the caller's now."""
        held = list(self._backlog)
        self._backlog.clear()
        self._backlog_bytes = 0
        return held

    def should_interrupt(self) -> bool:
        return False

    async def run(self) -> bool:
        queue = self.queue
        for _ in range(TURN):
            if not self._backlog:
                return False
            frame = self._backlog[0]
            chains = await self._gather(len(frame))
            if chains is None:
                return False
            if sum(total(chain.writable) for chain in chains) < len(frame):
                queue.give_back(len(chains))
                self.too_long += 1
                self._take_first()
            else:
                await self._fill(chains, frame)
                self._take_first()
                await queue.publish()
            self._room()
            await trio.lowlevel.checkpoint()
        return True

    async def _gather(self, size: int) -> list[SlowChain] | None:
        """Chains for a frame of `size` bytes, or None, and kicks on, if there are too few."""
        chains: list[SlowChain] = []
        room = 0
        while room < size and (self._mergeable or not chains) and len(chains) < self.queue.size:
            try:
                chain = await self.queue.take()
            except QueueStopped:
                self.queue.give_back(len(chains))
                raise
            if chain is not None:
                chains.append(chain)
                room += total(chain.writable)
                await trio.lowlevel.checkpoint()
            elif await self.queue.enable_kicks():
                self.queue.give_back(len(chains))
                return None
        return chains

    async def _fill(self, chains: list[SlowChain], frame: bytes) -> None:
        data = bytearray(frame)
        data[_NUM_BUFFERS] = len(chains).to_bytes(2, "little")
        rest = bytes(data)
        for chain in chains:
            written = await self.queue.write(chain.writable, rest)
            await self.queue.put(chain.head, written)
            rest = rest[written:]

    def _take_first(self) -> None:
        self._backlog_bytes -= len(self._backlog.popleft())

    def _has_room(self, size: int) -> bool:
        return len(self._backlog) < BACKLOG_FRAMES and self._backlog_bytes + size <= BACKLOG_BYTES

    def _append(self, frame: bytes) -> None:
        self._backlog.append(frame)
        self._backlog_bytes += len(frame)
        self._wake()


class SlowTransmitter:
    """Sending by copies; `send(frame, size)` is the switch's answer to each frame."""

    def __init__(
        self,
        queue: SlowQueue,
        headers: Headers,
        send: Callable[[Sequence[Buffer], int], bool],
    ) -> None:
        self.queue = queue
        self._headers = headers
        self._send = send
        self.invalid = 0

    async def run(self) -> bool:
        queue = self.queue
        await queue.disable_kicks()
        for _ in range(TURN):
            chain = await queue.take()
            if chain is None:
                if await queue.enable_kicks():
                    return False
                continue
            if not await self._transmit(chain.readable):
                queue.give_back()
                return False
            await queue.put(chain.head, 0)
            await queue.publish()
            await trio.lowlevel.checkpoint()
        return True

    async def _transmit(self, pieces: list[Piece]) -> bool:
        """Whether the frame in `pieces` is gone, be it sent or dropped."""
        if total(pieces) <= LARGEST:
            data = await self.queue.read(pieces, LARGEST)
            frame, size = gather_head([memoryview(data)])
            if frame is not None:
                head = self._headers.allowed_untrusted(bytes(frame[0]))
                if head is not None:
                    return self._send((head, *frame[1:]), size)
        self.invalid += 1
        return True


class SlowControl:
    """Control commands by copies; `execute(command)` gives the answer."""

    def __init__(self, queue: SlowQueue, execute: Callable[[bytes], bytes]) -> None:
        self.queue = queue
        self._execute = execute

    async def run(self) -> bool:
        queue = self.queue
        for _ in range(TURN):
            chain = await queue.take()
            if chain is None:
                if await queue.enable_kicks():
                    return False
                continue
            command = await queue.read(chain.readable, limits.MAX_CONTROL_SIZE)
            written = await queue.write(chain.writable, self._execute(command))
            await queue.put(chain.head, written)
            await queue.publish()
            await trio.lowlevel.checkpoint()
        return True


class SlowService:
    """The slow queues of one member, by queue index."""

    def __init__(
        self,
        interrupt: Callable[[int], None],
        sent: Callable[[], None],
        failed: Callable[[DriverError], None],
        generation: Callable[[], int],
    ) -> None:
        self._interrupt = interrupt
        self._sent = sent
        self._failed = failed
        self._generation = generation
        """Changes with each mapping and unmapping (`GuestMemory.generation`)."""
        self._notified = -1
        """The generation in which the driver last notified."""
        self._waiting: set[int] = set()
        """Queues that wait for memory to be mapped."""
        self._workers: dict[int, SlowWorker] = {}
        self._kicked: set[int] = set()
        self._wake = trio.Event()
        self._last = -1
        self._out_of_reach = False
        self._serving = False
        self._idle = trio.Event()
        self._pass = trio.CancelScope()
        """What is being done for one queue just now."""

    def add(self, index: int, worker: SlowWorker) -> None:
        """Serve a queue from now on."""
        self._workers[index] = worker
        self.kick(index)

    def kick(self, index: int) -> None:
        """There may be something to do for queue `index`."""
        self._kicked.add(index)
        self._wake.set()

    def notified(self) -> None:
        """The driver has notified, so its rings and buffers have to be where it says."""
        self._notified = self._generation()

    def mapped(self) -> None:
        """More of guest memory is there."""
        for index in self._waiting:
            self.kick(index)
        self._waiting.clear()

    def stop(self) -> None:
        """Forget all queues, and end the access that is under way; nothing is written after it."""
        self._pass.cancel()
        for worker in self._workers.values():
            worker.queue.stop()
        self._workers.clear()
        self._kicked.clear()
        self._waiting.clear()

    @property
    def idle(self) -> bool:
        """Whether no queue is served, and no access to guest memory is under way."""
        return not self._workers and not self._serving

    async def quiesce(self, seconds: float) -> None:
        """Take no more from the rings, and wait until no access to guest memory is under way.

        Frames that wait for the driver are delivered first, as far as it has room and half of the
        time allows.  What is not done within `seconds` is for `stop` to end, which has to follow:
        the client may answer no access before it has the answer that it waits for, as QEMU does.
        After a cancellation all queues go on as before.

        What is ended leaves the ring where its used index says, whether the client carries the
        last access out or not: that index is the last thing that is written for a chain.  A chain
        that was not finished is there for the taking, so that at worst its frame is sent twice, or
        its command is carried out twice (none minds); a frame that was being received may be lost.
        """
        for index, worker in self._workers.items():
            if not isinstance(worker, SlowReceiver):
                worker.queue.finish()
                self._kicked.discard(index)
        done = False
        try:
            with trio.move_on_after(seconds / 2):
                await self._until_idle()
            for worker in self._workers.values():
                worker.queue.finish()
            self._kicked.clear()
            with trio.move_on_after(seconds / 2):
                await self._until_idle()
            done = True
        finally:
            if not done:
                self._go_on()

    def _go_on(self) -> None:
        for index, worker in self._workers.items():
            worker.queue.go_on()
            self.kick(index)

    async def _until_idle(self) -> None:
        while self._serving or self._kicked:
            self._idle = trio.Event()
            await self._idle.wait()

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._kicked:
                index = self._next_kicked()
                worker = self._workers.get(index)
                if worker is not None:
                    self._serving = True
                    try:
                        with trio.CancelScope() as self._pass:
                            await self._serve(index, worker)
                    finally:
                        self._serving = False
                        self._idle.set()
                if self._out_of_reach:
                    await trio.sleep(RETRY_SECONDS)
                else:
                    await trio.lowlevel.checkpoint()
            self._idle.set()

    def _next_kicked(self) -> int:
        """The next queue whose turn it is."""
        index = min((i for i in self._kicked if i > self._last), default=min(self._kicked))
        self._last = index
        self._kicked.discard(index)
        return index

    async def _serve(self, index: int, worker: SlowWorker) -> None:
        generation = self._generation()
        try:
            await worker.queue.resume()
            more = await worker.run()
            wanted = await worker.queue.should_interrupt()
            self._out_of_reach = False
        except QueueStopped:
            return
        except ConnectionLost as lost:
            if not self._out_of_reach:
                _log.info("queue %d waits: guest memory is out of reach: %s", index, lost)
            self._out_of_reach = True
            self.kick(index)
        except (DriverError, RemoteError) as error:
            if self._generation() != generation:
                self.kick(index)
            elif self._notified != generation:
                self._waiting.add(index)
            elif isinstance(error, DriverError):
                self._failed(error)
            else:
                self._failed(DriverError(f"guest memory without an fd is out of reach: {error}"))
        else:
            if more:
                self.kick(index)
            if wanted:
                self._interrupt(index)
            self._sent()

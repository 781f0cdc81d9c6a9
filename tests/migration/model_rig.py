"""What `test_migration_model` is made of: an event loop that stands still between two steps, a
client without a socket, an owner whose commands fail in every way there is, and a driver that never
waits.

All of the device is real: owner, switch, members, migration, guest memory.  Time is virtual.
"""

from __future__ import annotations

import enum
import os
import struct
from collections import deque
from typing import TYPE_CHECKING, Final, TypeVar

import attrs
import outcome
import trio
import trio.testing

from tests.backends.member_rig import ETHERTYPE, LONG, frame
from vfio_user_virtio.backends.software.admin_queue import SoftwareAdminQueue
from vfio_user_virtio.device import FeatureOperation, ResetCause
from vfio_user_virtio.errors import HostError
from vfio_user_virtio.limits import MAX_QUEUE_PAIRS
from vfio_user_virtio.protocol.feature import Feature
from vfio_user_virtio.protocol.migration import (
    decode_device_state_reply_untrusted,
    encode_device_state,
)
from vfio_user_virtio.testing.net_driver import NetDriver
from vfio_user_virtio.virtio.admin import (
    Answer,
    Qualifier,
    Status,
    encode_answer,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vfio_user_virtio.backends.software.administration import Administration
    from vfio_user_virtio.backends.software.member import Member
    from vfio_user_virtio.device import DmaMapping, IrqRequest
    from vfio_user_virtio.migration.member_migration import MemberMigration
    from vfio_user_virtio.migration.migratable_device import MigratableDevice
    from vfio_user_virtio.protocol.migration import MigrationState
    from vfio_user_virtio.testing.guest_ram import GuestBuffer, GuestRam
    from vfio_user_virtio.testing.net_driver import _Port
    from vfio_user_virtio.testing.virtio_pci import VirtioPci

T = TypeVar("T")


class Loop:
    """A trio run, of which `call` lets as much happen as one call takes."""

    def __init__(self) -> None:
        self._ticks: deque[Callable[[], object]] = deque()
        self._over: outcome.Outcome[None] | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._stop = trio.Event()
        trio.lowlevel.start_guest_run(
            self._main,
            run_sync_soon_threadsafe=self._ticks.append,
            done_callback=self._finished,
            clock=trio.testing.MockClock(autojump_threshold=0),
        )
        while self._token is None:
            self._ticks.popleft()()

    async def _main(self) -> None:
        async with trio.open_nursery() as self.nursery:
            self._token = trio.lowlevel.current_trio_token()
            await self._stop.wait()
            self.nursery.cancel_scope.cancel()

    def _finished(self, over: outcome.Outcome[None]) -> None:
        self._over = over

    def call(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        """What `function` returns or raises; fails if it takes too long, or a task has failed."""
        results: list[outcome.Outcome[T]] = []

        async def bounded() -> T:
            with trio.fail_after(100 * LONG):
                return await function(*args)

        async def run() -> None:
            results.append(await outcome.acapture(bounded))

        assert self._token is not None
        self._token.run_sync_soon(lambda: self.nursery.start_soon(run))
        while not results and self._over is None:
            self._ticks.popleft()()
        if self._over is not None:
            self._over.unwrap()
        return results[0].unwrap()

    def close(self) -> None:
        if self._over is None:
            assert self._token is not None
            self._token.run_sync_soon(self._stop.set)
        while self._over is None:
            self._ticks.popleft()()
        self._over.unwrap()


class Fault(enum.Enum):
    """How a command comes to nothing, or to something that its driver does not learn."""

    REFUSED = enum.auto()
    """A status; nothing done."""
    AGAIN = enum.auto()
    """EAGAIN, however often it is sent."""
    BUSY = enum.auto()
    """EAGAIN, and the next time it works."""
    HUNG = enum.auto()
    """Neither carried out nor answered."""
    LOST = enum.auto()
    """Carried out, not answered."""
    CUT = enum.auto()
    """Carried out, and answered with less than a status."""
    GONE = enum.auto()
    """The owner is gone."""


DONE: Final = frozenset({Fault.LOST, Fault.CUT})
"""Faults of a command that is carried out."""


class UnreliableQueue:
    """The owner's administration virtqueue; `fault` befalls the `left`th command from now on."""

    def __init__(self, administration: Administration) -> None:
        self.administration = administration
        self._queue = SoftwareAdminQueue(administration)
        self.fault: Fault | None = None
        self.then: Fault | None = None
        """What befalls the command after that one."""
        self.left = 0
        self._again: bytes | None = None

    def arm(self, fault: Fault, left: int) -> None:
        self.fault, self.left = fault, left

    def disarm(self) -> None:
        self.fault = self.then = self._again = None

    async def execute(self, readable: bytes, writable: int) -> bytes:
        fault = self._fault(readable)
        if fault is None:
            return await self._queue.execute(readable, writable)
        if fault is Fault.REFUSED:
            return encode_answer(Answer(Status.EINVAL, Qualifier.INVALID_COMMAND), writable)
        if fault in (Fault.AGAIN, Fault.BUSY):
            return encode_answer(Answer(Status.EAGAIN, Qualifier.TRYAGAIN), writable)
        if fault is Fault.GONE:
            raise HostError("the owner is gone")
        if fault in DONE:
            await self._queue.execute(readable, writable)
        if fault is Fault.CUT:
            return b"\0\0\0\0"
        await trio.sleep_forever()
        raise AssertionError

    def _fault(self, readable: bytes) -> Fault | None:
        if self._again is not None:
            if readable == self._again:
                return Fault.AGAIN
            self._again = None
        if self.fault is None:
            return None
        self.left -= 1
        if self.left > 0:
            return None
        fault, self.fault, self.then = self.fault, self.then, None
        if fault is Fault.AGAIN:
            self._again = readable
        return fault


class DirectClient:
    """A client of `device`: what a session does with each message, without the messages."""

    def __init__(self, device: MigratableDevice) -> None:
        self.device = device

    async def region_read(self, index: int, offset: int, count: int) -> bytes:
        data = await self.device.region_read(index, offset, count)
        self.device.work()
        return data

    async def region_write(
        self, index: int, offset: int, data: bytes, *, no_reply: bool = False
    ) -> None:
        await self.device.region_write(index, offset, data)
        self.device.work()

    async def set_irqs(self, request: IrqRequest) -> None:
        fds = request.eventfds
        if fds is not None:
            request = attrs.evolve(request, eventfds=tuple(map(os.dup, fds)))
        await self.device.set_irqs(request)

    async def dma_map(self, mapping: DmaMapping) -> None:
        if mapping.fd is not None:
            mapping = attrs.evolve(mapping, fd=os.dup(mapping.fd))
        await self.device.dma_map(mapping)
        self.device.work()

    async def dma_unmap(self, iova: int, size: int) -> None:
        await self.device.dma_unmap(iova, size)
        self.device.work()

    async def reset(self) -> None:
        await self.device.reset(ResetCause.CLIENT)
        self.device.work()

    # --- migration -----------------------------------------------------------------------------

    async def state(self) -> MigrationState:
        data = await self.device.feature(Feature.MIG_DEVICE_STATE, FeatureOperation.GET, b"")
        return decode_device_state_reply_untrusted(data)

    async def set_state(self, state: MigrationState) -> None:
        data = encode_device_state(state)
        await self.device.feature(Feature.MIG_DEVICE_STATE, FeatureOperation.SET, data)
        self.device.work()

    async def read_all(self, piece: int = 4096) -> bytes:
        """What there is to be read now."""
        data = b""
        while more := await self.device.migration_read(piece):
            data += more
        return data


class SlowMemory:
    """Guest memory by messages, each of which takes `delay` seconds."""

    def __init__(self, ram: GuestRam) -> None:
        self._ram = ram
        self.delay = 0.0

    async def dma_read(self, iova: int, count: int) -> bytes:
        await trio.sleep(self.delay)
        return self._ram.read(iova, count)

    async def dma_write(self, iova: int, data: bytes) -> None:
        await trio.sleep(self.delay)
        self._ram.write(iova, data)


class Connection:
    """A client's session with `device`, from now until `end`."""

    def __init__(self, loop: Loop, device: MigratableDevice, memory: SlowMemory) -> None:
        self._device = device
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        loop.nursery.start_soon(self._serve, memory)

    async def _serve(self, memory: SlowMemory) -> None:
        with self._scope:
            await self._device.serve(memory)
        self._ended.set()

    async def end(self) -> None:
        self._scope.cancel()
        await self._ended.wait()
        await self._device.release()


class EagerDriver(NetDriver):
    """A driver that waits for nothing: commands and frames are put into their rings.

    `asked`: the commands that were not answered yet, each with the memory that it is in.
    """

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]  # passed on
        self.asked: deque[GuestBuffer] = deque()
        self._returned = [0] * MAX_QUEUE_PAIRS

    async def start(self, *, rx: bool = True) -> None:
        while self.asked:
            self.ram.free(self.asked.popleft())
        self._returned = [0] * MAX_QUEUE_PAIRS
        await super().start(rx=rx)

    async def raw_command(self, readable: bytes, *, room: int = 1) -> int:
        """Ask for it, if there is room; the answer comes by `answers`."""
        port = self._ports[self.control_index]
        if not port.queue.free_descriptors:
            return 0
        buffer, answer = self.ram.allocate(len(readable)), self.ram.allocate(room)
        buffer.memory[:] = readable
        port.queue.add(answer, [(buffer.iova, buffer.size)], [(answer.iova, answer.size)])
        self.asked.append(buffer)
        await self._publish(port)
        return 0

    def answers(self) -> list[tuple[bytes, int]]:
        """The commands that were answered since the last call, and their acks."""
        found = []
        for used in self._ports[self.control_index].queue.collect():
            buffer = self.asked.popleft()
            found.append((bytes(buffer.memory), used.token.memory[0]))
            self.ram.free(used.token)
            self.ram.free(buffer)
        return found

    async def put(self, frame: bytes, pair: int) -> bool:
        """Send a frame, if there is room."""
        if self._ports[2 * pair + 1].queue.free_descriptors < 1:
            return False
        await self.send(frame, pair=pair)
        return True

    def _reclaim(self, port: _Port) -> None:
        for used in port.queue.collect():
            self.ram.free(used.token)
            self._returned[port.index // 2] += 1

    def returned(self, pair: int) -> int:
        """How many frames came back as sent since the last call."""
        self._reclaim(self._ports[2 * pair + 1])
        count, self._returned[pair] = self._returned[pair], 0
        return count

    def unsent(self, pair: int) -> int:
        """How many frames have not come back."""
        return self._ports[2 * pair + 1].queue.outstanding

    async def take(self, pair: int, *, repost: bool) -> list[bytes]:
        """The frames that have come."""
        found = []
        while self.received(pair):
            found.append((await self.receive(pair, repost=repost)).data)
        return found


_NUMBER: Final = struct.Struct(">BI")


def numbered(to: bytes, sender: bytes, flow: int, number: int) -> bytes:
    return frame(to, sender, _NUMBER.pack(flow, number))


def number_of(data: bytes) -> tuple[int, int] | None:
    """Flow and number of a frame, None if it is a member's announcement."""
    return _NUMBER.unpack_from(data, 14) if data[12:14] == ETHERTYPE else None


@attrs.define(eq=False)
class Place:
    """A member that a guest can be on, with its client and what the client keeps."""

    member: Member
    device: MigratableDevice
    client: DirectClient
    pci: VirtioPci
    session: Connection
    mapped: bool = False
    was_stopped: bool = False
    """It was stopped after the last step, and has not run since."""

    @property
    def migration(self) -> MemberMigration:
        return self.device.migration

"""The administration virtqueue of a served PF: commands from a ring in the driver's memory, carried
out at the same time, answered as they end (virtio 1.4, Administration Virtqueues).

The ring is a `SlowQueue`, since commands are few, may come behind a vIOMMU that scatters a ring
over pages, and have to wait anyway.  Commands are read and begun in the order of the ring; one that
waits, for a member to stop, holds up no command for another member.  As many can be under way as
the ring has descriptors for.

A reset of the PF ends those under way: their answers would have nowhere to go.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Final, Protocol

import trio

from vfio_user_virtio import limits
from vfio_user_virtio.errors import ConnectionLost, DriverError, RemoteError
from vfio_user_virtio.migration.admin_client import held
from vfio_user_virtio.virtio.admin import (
    Answer,
    Qualifier,
    Status,
    decode_answer_untrusted,
    decode_command_untrusted,
    encode_answer,
    opcode_name,
)
from vfio_user_virtio.virtio.slow_queue import QueueStopped, total

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfio_user_virtio.virtio.slow_queue import SlowChain, SlowQueue

_log: Final = logging.getLogger(__name__)

_SHOWN: Final = 24
"""Bytes of a command's data that the log shows: all of it but device parts."""


class Executor(Protocol):
    """What carries commands out; an `AdminQueue`."""

    async def execute(self, readable: bytes, writable: int) -> bytes: ...


class AdminVirtqueue:
    """One administration virtqueue: `start` and `stop` follow the registers, `run` is its task.

    `name` is the owner's in logs, which at level debug tell each command and its answer.
    `interrupt` tells the driver of used buffers, `failed` hears of rules that the driver broke.
    """

    def __init__(
        self,
        name: str,
        executor: Executor,
        *,
        interrupt: Callable[[], None],
        failed: Callable[[DriverError], None],
    ) -> None:
        self._name = name
        self._executor = executor
        self._interrupt = interrupt
        self._failed = failed
        self._queue: SlowQueue | None = None
        self._scope = trio.CancelScope()
        self._started = trio.Event()
        self._kicked = trio.Event()
        self._completing = trio.Lock()

    def start(self, queue: SlowQueue) -> None:
        """Serve `queue` from now on."""
        self._queue = queue
        self._started.set()
        self._kicked.set()

    def stop(self) -> None:
        """Forget the queue; nothing is written to the driver's memory any more."""
        if self._queue is not None:
            self._queue.stop()
            self._queue = None
            self._started = trio.Event()
            self._scope.cancel()

    def kick(self) -> None:
        """There may be new commands."""
        self._kicked.set()

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            await self._started.wait()
            queue = self._queue
            assert queue is not None
            with trio.CancelScope() as self._scope:
                async with trio.open_nursery() as nursery:
                    with self._reporting():
                        await self._serve(queue, nursery)

    async def _serve(self, queue: SlowQueue, nursery: trio.Nursery) -> None:
        while True:
            await self._kicked.wait()
            self._kicked = trio.Event()
            await queue.disable_kicks()
            while (chain := await _next(queue)) is not None:
                too_long = total(chain.readable) > limits.MAX_ADMIN_COMMAND_SIZE
                size = 0 if too_long else limits.MAX_ADMIN_COMMAND_SIZE
                readable = await queue.read(chain.readable, size)
                nursery.start_soon(self._carry_out, queue, chain, None if too_long else readable)
                await trio.lowlevel.checkpoint()  # it has begun before the next one is made

    async def _carry_out(
        self,
        queue: SlowQueue,
        chain: SlowChain,
        readable: bytes | None,
    ) -> None:
        with self._reporting():
            room = min(total(chain.writable), limits.MAX_ADMIN_COMMAND_SIZE)
            if readable is None:
                answer = Answer(Status.ENOMEM, Qualifier.INVALID_COMMAND)
                written = encode_answer(answer, room)
            else:
                written = await self._executor.execute(readable, room)
            if _log.isEnabledFor(logging.DEBUG):
                _log.debug("%s: %s", self._name, _described(readable or b"", written))
            async with held(self._completing):
                await queue.put(chain.head, await queue.write(chain.writable, written))
                await queue.publish()
                if await queue.should_interrupt():
                    self._interrupt()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except QueueStopped:
            return
        except DriverError as error:
            self._failed(error)
        except RemoteError as error:
            self._failed(DriverError(f"an administration command is out of reach: {error}"))
        except ConnectionLost as lost:
            _log.info("%s: the administration virtqueue is out of reach: %s", self._name, lost)
            self.stop()


def _described(readable: bytes, written: bytes) -> str:
    """A command and its answer as a line of the log, with the first bytes of what they carry."""
    command, answer = decode_command_untrusted(readable), decode_answer_untrusted(written)
    what = f"{opcode_name(command.opcode)} of group {command.group_type}"
    to_whom = f"member {command.member_id}"
    if answer is None:
        return f"{what}, {to_whom}: no room for an answer"
    return (
        f"{what}, {to_whom}: {answer.describe()}; "
        f"data {_shown(command.data)}, result {_shown(answer.result)}"
    )


def _shown(data: bytes) -> str:
    """`data` in hexadecimal as it lies in memory, and how long it is if that is not all."""
    if len(data) <= _SHOWN:
        return data.hex() or "none"
    return f"{data[:_SHOWN].hex()}… ({len(data)} bytes)"


async def _next(queue: SlowQueue) -> SlowChain | None:
    """The next chain, or None, and kicks on, if there is none."""
    while (chain := await queue.take()) is None:
        if await queue.enable_kicks():
            return None
    return chain

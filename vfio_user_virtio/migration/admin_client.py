"""The driver's side of an administration virtqueue: commands out, results or a named error back.

All that is known of the queue is `AdminQueue`: encoded bytes in, written bytes out.  So the
software owner, an owner driven through VFIO and one behind a broker's socket are the same to those
who migrate a member, and the codec is exercised by all of them.

What a driver owes its device is kept here, once (virtio 1.4, Administration Virtqueues): commands
for one member one at a time, at most `depth` at once in all; EAGAIN and "try again" repeated, a
bounded number of times; anything unknown taken for EINVAL.  And what Linux's driver lacks: a time
limit for each command, tries and all, so that an owner that hangs is an error and not a hang.

A client's request may take many commands, and when one fails others to undo what was done, and all
that has to be over before the client gives up.  So within a `request` each command may take half of
the time that is left: there is always some, and it is never exceeded.
"""

from __future__ import annotations

import contextlib
import errno
import math
from typing import TYPE_CHECKING, Final, Protocol

import trio

from vfio_user_virtio import limits
from vfio_user_virtio.virtio.admin import (
    STATUS_SIZE,
    Answer,
    Command,
    GroupType,
    Qualifier,
    Status,
    decode_answer_untrusted,
    encode_command,
    opcode_name,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


class AdminQueue(Protocol):
    """An owner's administration virtqueue.

    Raises HostError when the owner is gone.  A call that is cancelled may still be carried out by
    the device; the implementation keeps the buffers until then and drops the answer.
    """

    async def execute(self, readable: bytes, writable: int) -> bytes:
        """Send one encoded command with room for `writable` bytes; what the device wrote."""
        ...


class AdminError(Exception):
    """A command failed; `errno` says how in the client's terms."""

    def __init__(self, errno_: int, message: str) -> None:
        super().__init__(message)
        self.errno = errno_


UNANSWERED: Final = frozenset((errno.ETIMEDOUT, errno.EIO))
"""Of an `AdminError`: no status came back, so the command may have been carried out."""

_TRY_AGAIN: Final = frozenset((Qualifier.NORESOURCE, Qualifier.TRYAGAIN))


class AdminClient:
    """Commands on `queue`; `seconds` is the limit of one."""

    def __init__(
        self,
        queue: AdminQueue,
        *,
        depth: int = limits.ADMIN_QUEUE_DEPTH,
        seconds: float = limits.ADMIN_COMMAND_SECONDS,
    ) -> None:
        self._queue = queue
        self._slots = trio.CapacityLimiter(depth)
        self._seconds = seconds
        self._members: dict[tuple[int, int], trio.Lock] = {}
        self._deadlines: dict[int, float] = {}
        """When the request that is being carried out for a member has to be answered."""
        self._open: trio.Event | None = None
        """Set when commands for members may be sent again; None while they may."""

    @contextlib.contextmanager
    def request(self, member: int) -> Iterator[None]:
        """All commands for VF `member` are for one request (`limits.ADMIN_REQUEST_SECONDS`)."""
        self._deadlines[member] = trio.current_time() + limits.ADMIN_REQUEST_SECONDS
        try:
            yield
        finally:
            del self._deadlines[member]

    @contextlib.contextmanager
    def members_wait(self) -> Iterator[None]:
        """Commands for members wait, as long as each may take, while their owner is being brought
        up again: one that comes before it has been asked what it can do is refused."""
        self._open = trio.Event()
        try:
            yield
        finally:
            self._open.set()
            self._open = None

    async def execute(self, command: Command, result_size: int = 0) -> bytes:
        """The result of `command`, of at most `result_size` bytes; it may have padding behind it.

        Raises AdminError, and HostError when the owner is gone.
        """
        left = self._deadlines.get(command.member_id, math.inf) - trio.current_time()
        seconds = min(self._seconds, left / 2)
        answer = None
        with trio.move_on_after(seconds):
            while self._open is not None and command.member_id:
                await self._open.wait()
            answer = await self._tries(command, result_size)
        if answer is None:
            raise AdminError(
                errno.ETIMEDOUT,
                f"{describe(command)} was not done within {seconds:g} s; "
                "the owner may need a reset",
            )
        if not answer.ok:
            raise AdminError(
                answer.errno,
                f"{describe(command)} failed: {answer.describe()}",
            )
        return answer.result

    async def _tries(self, command: Command, result_size: int) -> Answer:
        member = (command.group_type, command.member_id)
        async with held(self._members.setdefault(member, trio.Lock())):
            pause = limits.ADMIN_RETRY_SECONDS
            for number in range(limits.ADMIN_RETRIES):
                if number:
                    await trio.sleep(pause)
                    pause = min(2 * pause, limits.ADMIN_MAX_RETRY_SECONDS)
                answer = await self._attempt(command, result_size)
                if answer.status != Status.EAGAIN and answer.qualifier not in _TRY_AGAIN:
                    break
        return answer

    async def _attempt(self, command: Command, result_size: int) -> Answer:
        async with held(self._slots):
            written = await self._queue.execute(encode_command(command), STATUS_SIZE + result_size)
        answer = decode_answer_untrusted(written)
        if answer is None:
            raise AdminError(
                errno.EIO, f"{describe(command)} was answered with {len(written)} bytes, no status"
            )
        return answer


@contextlib.asynccontextmanager
async def held(lock: trio.Lock | trio.CapacityLimiter) -> AsyncIterator[None]:
    """`async with lock`, which does not give way to others where `lock` is free.

    With 255 members that migrate at once all others take seconds, and those would count as the
    owner's.
    """
    try:
        lock.acquire_nowait()
    except trio.WouldBlock:
        await lock.acquire()
    try:
        yield
    finally:
        lock.release()


def describe(command: Command) -> str:
    """The command and whom it is for."""
    whom = (
        f"member {command.member_id}"
        if command.group_type == GroupType.SR_IOV and command.member_id
        else "the owner"
    )
    return f"{opcode_name(command.opcode)} for {whom}"

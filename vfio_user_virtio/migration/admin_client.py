"""The driver's side of an administration virtqueue: commands out, results or a named error back.

All that is known of the queue is `AdminQueue`: encoded bytes in, written bytes out.  So the
software owner, an owner driven through VFIO and one behind a broker's socket are the same to those
who migrate a member, and the codec is exercised by all of them.

What a driver owes its device is kept here, once (virtio 1.4, Administration Virtqueues): commands
for one member one at a time, at most `depth` at once in all; EAGAIN and "try again" repeated, a
bounded number of times; anything unknown taken for EINVAL.  And what Linux's driver lacks: a time
limit for each command, so that an owner that hangs is an error and not a hang.
"""

from __future__ import annotations

import errno
from typing import Final, Protocol

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


_TRY_AGAIN: Final = frozenset((Qualifier.NORESOURCE, Qualifier.TRYAGAIN))


class AdminClient:
    """Commands on `queue`; `seconds` is the limit of one attempt."""

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

    async def execute(self, command: Command, result_size: int = 0) -> bytes:
        """The result of `command`, of at most `result_size` bytes; it may have padding behind it.

        Raises AdminError, and HostError when the owner is gone.
        """
        member = (command.group_type, command.member_id)
        async with self._members.setdefault(member, trio.Lock()):
            pause = limits.ADMIN_RETRY_SECONDS
            for _ in range(limits.ADMIN_RETRIES):
                answer = await self._attempt(command, result_size)
                if answer.status != Status.EAGAIN and answer.qualifier not in _TRY_AGAIN:
                    break
                await trio.sleep(pause)
                pause = min(2 * pause, limits.ADMIN_MAX_RETRY_SECONDS)
        if not answer.ok:
            raise AdminError(
                answer.errno,
                f"{describe(command)} failed: {answer.describe()}",
            )
        return answer.result

    async def _attempt(self, command: Command, result_size: int) -> Answer:
        async with self._slots:
            with trio.move_on_after(self._seconds) as patience:
                written = await self._queue.execute(
                    encode_command(command), STATUS_SIZE + result_size
                )
        if patience.cancelled_caught:
            raise AdminError(
                errno.ETIMEDOUT,
                f"{describe(command)} was not answered within {self._seconds:g} s; "
                "the owner may need a reset",
            )
        answer = decode_answer_untrusted(written)
        if answer is None:
            raise AdminError(
                errno.EIO, f"{describe(command)} was answered with {len(written)} bytes, no status"
            )
        return answer


def describe(command: Command) -> str:
    """The command and whom it is for."""
    whom = (
        f"member {command.member_id}"
        if command.group_type == GroupType.SR_IOV and command.member_id
        else "the owner"
    )
    return f"{opcode_name(command.opcode)} for {whom}"

"""Commands of ours on one endpoint, and the replies they wait for.

Both peers of vfio-user send commands, so session and client share this.  A reply is matched by
message id *and* command; one that answers nothing we asked ends the connection, because its sender
is out of step.  A request whose waiter has gone (cancelled, out of patience) keeps its id until
the late reply has come, which then harms nobody.

Source: vfio-user, Header.  At most MAX_PENDING_REQUESTS await a reply at once; more wait here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import trio

from vfio_user_virtio.errors import ConnectionLost, RemoteError
from vfio_user_virtio.limits import MAX_PENDING_REQUESTS
from vfio_user_virtio.protocol.header import Command, encode_command
from vfio_user_virtio.transport.endpoint import close_fds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_user_virtio.protocol.framing import Frame
    from vfio_user_virtio.protocol.header import Buffer
    from vfio_user_virtio.transport.endpoint import Endpoint

_ID_MASK: Final = 0xFFFF


@attrs.define
class MessageIds:
    """The next message id of one side: plain data, so that a connection can be handed over."""

    next: int = 0


def command_name(command: int) -> str:
    """`command` as the specification calls it, for messages and statistics."""
    try:
        return Command(command).name
    except ValueError:
        return f"command {command}"


@attrs.define(eq=False)
class _Request:
    command: int
    answered: trio.Event = attrs.field(factory=trio.Event)
    abandoned: bool = False
    reply: Frame | None = None
    fds: list[int] = attrs.field(factory=list)


class Requests:
    """See the module head.  Whoever reads the endpoint gives replies to `deliver`."""

    def __init__(self, endpoint: Endpoint, ids: MessageIds) -> None:
        self._endpoint = endpoint
        self._ids = ids
        self._waiting: dict[int, _Request] = {}
        self._room = trio.Semaphore(MAX_PENDING_REQUESTS)
        self._lost: ConnectionLost | None = None

    async def request(
        self,
        command: Command,
        payload: Buffer = b"",
        fds: Sequence[int] = (),
        tail: Buffer = b"",
    ) -> bytes:
        """Send a command; the payload of its successful reply, whose fds, if any, are closed.

        `fds` stay the caller's.  `tail` is the end of the payload, if that had better not be
        copied; it must not change.  Raises RemoteError for an error reply, ConnectionLost.
        """
        reply = await self.request_frame(command, payload, fds, tail)
        close_fds(reply.fds)
        return reply.payload

    async def request_frame(
        self,
        command: Command,
        payload: Buffer = b"",
        fds: Sequence[int] = (),
        tail: Buffer = b"",
    ) -> Frame:
        """The same; the whole reply, and its `fds` are the caller's to close."""
        await self._room.acquire()
        if self._lost is not None:
            self._room.release()
            raise self._lost
        message_id = self._next_id()
        request = self._waiting[message_id] = _Request(command)
        try:
            message = encode_command(message_id, command, payload, tail_size=len(tail))
            await self._endpoint.send(message, fds, tail)
            await request.answered.wait()
        except (trio.Cancelled, ConnectionLost):
            request.abandoned = True
            close_fds(request.fds)
            raise
        reply = request.reply
        if reply is None:
            assert self._lost is not None
            raise self._lost
        reply.fds = request.fds
        if reply.is_error:
            close_fds(reply.take_fds())
            raise RemoteError(reply.error, f"{command.name} was refused")
        return reply

    async def send(self, command: Command, payload: Buffer = b"") -> None:
        """Send a command that wants no reply (NO_REPLY).  Raises ConnectionLost."""
        if self._lost is not None:
            raise self._lost
        message = encode_command(self._next_id(), command, payload, no_reply=True)
        await self._endpoint.send(message)

    def deliver(self, reply: Frame) -> None:
        """Hand `reply` to whoever waits for it.  Raises ConnectionLost if nobody asked."""
        request = self._waiting.get(reply.message_id)
        if request is None or request.command != reply.command:
            raise ConnectionLost(
                f"a reply to {command_name(reply.command)} with message id {reply.message_id} "
                "answers nothing that was asked"
            )
        del self._waiting[reply.message_id]
        self._room.release()
        if not request.abandoned:
            request.reply, request.fds = reply, reply.take_fds()
            request.answered.set()

    def fail(self, lost: ConnectionLost) -> None:
        """The connection is over: wake every waiter with `lost`, and refuse new requests."""
        self._lost = lost
        while self._waiting:
            _, request = self._waiting.popitem()
            self._room.release()
            request.answered.set()

    def _next_id(self) -> int:
        message_id = self._ids.next
        while message_id in self._waiting:
            message_id = (message_id + 1) & _ID_MASK
        self._ids.next = (message_id + 1) & _ID_MASK
        return message_id

"""Connections to the control interface: bytes to calls, and replies back.

Each connection is a task; its calls are carried out in their order, one at a time.  A peer is
trusted with devices, since it could connect, but not with this process, which serves other guests:
it may hold a connection open and say nothing, but not leave a message half sent, or its replies
unread, for more than `limits.CONTROL_SECONDS`.  Whatever fails in a method ends that connection.

Beyond `limits.MAX_CONTROL_CONNECTIONS` the newest is turned away at once, as a peer that waits in
the backlog cannot tell why.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Final

import trio

from vfio_user_virtio import limits
from vfio_user_virtio.control.device_control import Caller
from vfio_user_virtio.control.varlink import (
    Call,
    Object,
    Reply,
    Splitter,
    VarlinkError,
    decode_call_untrusted,
    encode_reply,
)
from vfio_user_virtio.errors import ConnectionLost
from vfio_user_virtio.transport.listener import accept

if TYPE_CHECKING:
    import socket

    from vfio_user_virtio.control.service import ControlService

_log: Final = logging.getLogger(__name__)

_RECEIVE_SIZE: Final = 64 << 10


async def serve_control(listener: socket.socket, service: ControlService) -> None:
    """Serve whoever connects to `listener`, which stays the caller's, until cancelled."""
    listener.setblocking(False)
    async with trio.open_nursery() as nursery:
        while True:
            sock = await accept(listener, "control")
            if len(nursery.child_tasks) >= limits.MAX_CONTROL_CONNECTIONS:
                _log.warning(
                    "control: a connection is turned away, there are %d",
                    limits.MAX_CONTROL_CONNECTIONS,
                )
                sock.close()
                continue
            nursery.start_soon(serve_connection, sock, service)


async def serve_connection(sock: socket.socket, service: ControlService) -> None:
    """Serve one peer until it goes.  Closes `sock`.  Raises nothing but trio.Cancelled."""
    caller = Caller()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
    try:
        await _serve(stream, service, caller)
    except (ConnectionLost, trio.BrokenResourceError) as lost:
        _log.info("control: connection closed: %s", lost)
    except Exception:  # a method that fails must not take the guests with it
        _log.exception("control: unexpected failure")
    finally:
        with trio.move_on_after(limits.RELEASE_SECONDS, shield=True):
            await service.caller_is_gone(caller)
        stream.socket.close()


async def _serve(stream: trio.SocketStream, service: ControlService, caller: Caller) -> None:
    splitter = Splitter()
    deadline = math.inf
    while data := await _receive(stream, deadline):
        messages = splitter.feed_untrusted(data)
        for message in messages:
            await _answer(stream, service, caller, decode_call_untrusted(message))
        if not splitter.partial:
            deadline = math.inf
        elif messages or deadline == math.inf:
            deadline = trio.current_time() + limits.CONTROL_SECONDS


async def _receive(stream: trio.SocketStream, deadline: float) -> bytes:
    """What comes next; nothing at the end."""
    with trio.CancelScope(deadline=deadline):
        return bytes(await stream.receive_some(_RECEIVE_SIZE))
    raise ConnectionLost(f"half a message, and no more within {limits.CONTROL_SECONDS:g} s")


async def _answer(
    stream: trio.SocketStream, service: ControlService, caller: Caller, call: Call
) -> None:
    async def emit(parameters: Object) -> None:
        await send(Reply(parameters, continues=True))

    async def send(reply: Reply) -> None:
        if call.oneway:
            return
        with trio.move_on_after(limits.CONTROL_SECONDS) as patience:
            await stream.send_all(encode_reply(reply))
        if patience.cancelled_caught:
            raise ConnectionLost(f"the peer took no reply for {limits.CONTROL_SECONDS:g} s")

    try:
        reply = Reply(await service.answer_untrusted(call, caller, emit))
    except VarlinkError as error:
        _log.debug("control: refused %s: %s", call.method, error)
        reply = Reply(error.parameters, error=error.name)
    await send(reply)

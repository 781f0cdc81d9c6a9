"""The engine: one client over one device, behind libvfio-user.

`LibvfioUserSession` takes the place of the native `Session`: the same device, the same sockets, the
same life.  trio waits for the client's messages.  When one is there, a thread that this session has
to itself looks at it, lets the library take and answer it, and goes on until there are no more; the
library's callbacks run what the device has to do in trio and wait for it.  So the library may
block, on a client that does not read or a device that takes its time, and nobody else waits.

What differs from the native engine, which is the default:

=================================  ===============================================================
the native engine                  this one
=================================  ===============================================================
a register access is one wake-up   two changes of thread more, about six times as long
REGION_WRITE_MULTI, MIG_DATA_SIZE  unknown to the library, as is MIG_GET_PRECOPY_INFO; and what is
                                   unknown, command or feature, is EINVAL, not ENOSYS or ENOTTY
VERSION grants what was proposed   limits of its own (1 MiB, 8 fds), whatever the client's; 0.2 to
                                   who asks for it; a page size other than the host's is refused
DMA_READ and DMA_WRITE of memory   never sent: the library loses its place if the client sends a
without an fd                      command meanwhile, as QEMU does; such memory cannot be used
DMA_UNMAP of all in a range        of exactly one mapping, or of all by flag; else ENOENT
dirty pages of any range, in       from the start of one mapping on, in pages of the size that
pages of any size                  DMA_LOGGING_START named; else ENOENT, EOPNOTSUPP
P2P states; MIGRATION says what    never; always STOP_COPY and PRE_COPY, in which a device that does
the device can do                  not have it gives no data
a stopped device is as any other   in STOP and STOP_COPY all but RESET, features, data and registers
                                   is refused, and in STOP_COPY registers too
MIG_DEVICE_STATE is the device's   what the client has asked for, not who uses the control interface
a device that fails ends its       answers EIO first
session
an error reply is a header         some carry a payload; a reply to an access of 0 bytes has none
fds where none belong: EINVAL      closed, and the command carried out
IRQ flags as the device has them   EVENTFD alone, for every index
a region without sparse areas      is shown with one area
a message may take 10 s            longer, if it is none of those that are looked at beforehand
refusals and bytes are counted     refusals by the device, and by what looks at messages before the
                                   library; bytes that come from the client
=================================  ===============================================================

Nothing else differs that a client could see, and nothing that a guest could.  In particular, what
the library alone would not do is done around it: it serves sockets that we accepted
(`vfio_user_virtio.libvfio_user.greeting`); the device has the client's eventfds and the memory's
fds, split messages are put together, RESET leads back to RUNNING (`.stand_in`), and what the
library does not survive, or does not know how to refuse in the device's name, it never sees
(`.arrival`, `.proxy`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from vfio_user_virtio.errors import ClientError, ConnectionLost, RemoteError
from vfio_user_virtio.libvfio_user.arrival import Incomplete, Message, peek, prepare, refuse
from vfio_user_virtio.libvfio_user.declarations import LogLevel
from vfio_user_virtio.libvfio_user.description import can_migrate, describe
from vfio_user_virtio.libvfio_user.greeting import greet, listening_context
from vfio_user_virtio.libvfio_user.proxy import DeviceProxy
from vfio_user_virtio.libvfio_user.stand_in import take, tell
from vfio_user_virtio.limits import HANDSHAKE_SECONDS, PARTIAL_MESSAGE_SECONDS, RELEASE_SECONDS
from vfio_user_virtio.protocol.header import Command
from vfio_user_virtio.transport.session_state import SessionStatistics, peer_process

if TYPE_CHECKING:
    from vfio_user_virtio.device import Device
    from vfio_user_virtio.libvfio_user.context import Context
    from vfio_user_virtio.libvfio_user.library import Library
    from vfio_user_virtio.protocol.version import Version

_log: Final = logging.getLogger(__name__)

_BATCH: Final = 64
"""Messages in a row that the thread answers before the device does the work that arose."""

_KNOWN: Final = frozenset(Command)

_REST_SECONDS: Final = 0.001
"""How often to look for the rest of a message: there is no event for it."""


class LibvfioUserSession:
    """See the module head.  `name` stands in front of its log lines."""

    def __init__(
        self, library: Library, sock: socket.socket, device: Device, *, name: str = "session"
    ) -> None:
        self.name = name
        self._library = library
        self._device = device
        self._socket = sock
        prepare(sock)
        self._proxy = DeviceProxy(device, name)
        self._context: Context | None = None
        self._thread = trio.CapacityLimiter(1)
        self._version: Version | None = None
        self._commands: Counter[str] = Counter()
        self._bytes = 0
        self._over = "it was stopped"
        self.connected: Final = time.time()
        """When the client came, in seconds since 1970."""
        self.process: Final = peer_process(sock)
        """The client's pid, if the kernel tells."""
        self.over = False

    def statistics(self) -> SessionStatistics:
        """What the library answers is not seen: refusals of its own, and bytes sent, are not in."""
        return SessionStatistics(
            dict(self._commands), self._proxy.refusals, self._bytes, 0, self._version
        )

    async def run(self) -> None:
        """Serve the client until it goes.  Raises nothing but trio.Cancelled."""
        _log.info("%s: client connected; served by libvfio-user", self.name)
        try:
            try:
                await self._serve()
            finally:
                await self._end()
        except* ConnectionLost as lost:
            self._over = _first(lost)
        # A device or a library may fail in any way, and must not take other sessions with it.
        except* Exception as errors:
            self._over = f"the device failed: {_first(errors)}"
            _log.exception("%s: unexpected failure", self.name, exc_info=errors)
        finally:
            self.over = True
            _log.info("%s: session over: %s", self.name, self._over)

    async def _serve(self) -> None:
        migration = await can_migrate(self._device)
        with await self._greeting() as message, listening_context(self._library) as made:
            self._context, path = made
            self._context.setup_log(self._on_log, LogLevel.ERROR)
            describe(self._context, self._device, self._proxy, migration=migration)
            self._context.realize()
            self._count(message)
            self._version = greet(self._context, path, self._socket, message)
        self._proxy.serve(self._context, partial(tell, self._context, self._socket))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._device.serve, _NoRemoteMemory())
            nursery.start_soon(self._hang_up_in_the_end)
            await self._converse(self._context)

    async def _greeting(self) -> Message:
        """The client's first message.  Raises ConnectionLost."""
        with trio.move_on_after(HANDSHAKE_SECONDS):
            await trio.lowlevel.wait_readable(self._socket)
            while not isinstance(found := peek(self._socket, _KNOWN), Message):  # noqa: ASYNC110 - no event
                await trio.sleep(_REST_SECONDS)
            return found
        raise ConnectionLost(f"no complete VERSION within {HANDSHAKE_SECONDS:g} s")

    async def _converse(self, context: Context) -> None:
        """Raises ConnectionLost in the end."""
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            begun = await trio.to_thread.run_sync(self._answer_all, context, limiter=self._thread)
            self._device.work()
            if begun:
                await self._rest_of_message()

    async def _rest_of_message(self) -> None:
        with trio.move_on_after(PARTIAL_MESSAGE_SECONDS):
            while isinstance(found := peek(self._socket, self._proxy.wanted), Incomplete):  # noqa: ASYNC110 - as above
                await trio.sleep(_REST_SECONDS)
            if found is not None:
                with found:
                    return
        raise ConnectionLost(f"a message was not complete within {PARTIAL_MESSAGE_SECONDS:g} s")

    async def _hang_up_in_the_end(self) -> None:
        """When the session is stopped, its thread must not wait for the client any more."""
        try:
            await trio.sleep_forever()
        finally:
            with contextlib.suppress(OSError):  # it has gone already
                self._socket.shutdown(socket.SHUT_RDWR)

    async def _end(self) -> None:
        self._proxy.over = True
        try:
            with trio.move_on_after(RELEASE_SECONDS, shield=True) as patience:
                await self._device.release()
            if patience.cancelled_caught:
                _log.error(
                    "%s: the device was not released within %g s", self.name, RELEASE_SECONDS
                )
        finally:
            if self._context is not None:
                self._context.close()
            self._socket.close()

    # --- in the thread --------------------------------------------------------------------------

    def _answer_all(self, context: Context) -> bool:
        """Let the library answer what is there; whether the next message has begun to come."""
        for _ in range(_BATCH):
            message = peek(self._socket, self._proxy.wanted)
            if not isinstance(message, Message):
                return message is not None
            self._answer(context, message)
        return False

    def _answer(self, context: Context, message: Message) -> None:
        self._count(message)
        try:
            with message:
                self._proxy.prepare(message)
        except ClientError as error:
            _log.debug("%s: refused command %d: %s", self.name, message.command, error)
            refuse(self._socket, message, error.errno)
            return
        take(context)
        self._proxy.settle()

    def _count(self, message: Message) -> None:
        known = message.command in _KNOWN
        self._commands[Command(message.command).name if known else "unknown"] += 1
        self._bytes += message.size

    def _on_log(self, level: LogLevel, text: str) -> None:
        _log.debug("%s: libvfio-user: %s: %s", self.name, level.name.lower(), text)


class _NoRemoteMemory:
    """`RemoteMemory` that refuses; the table in the module head says why."""

    async def dma_read(self, iova: int, count: int) -> bytes:
        raise _no_messages(iova)

    async def dma_write(self, iova: int, data: bytes) -> None:
        raise _no_messages(iova)


def _no_messages(iova: int) -> RemoteError:
    return RemoteError(
        errno.EOPNOTSUPP,
        f"memory at {iova:#x} came without a descriptor, and libvfio-user cannot safely ask the "
        "client for it; share it (share=on), or use the native engine",
    )


def _first(group: BaseExceptionGroup[BaseException]) -> str:
    """The first of possibly nested exceptions, for one line of a log."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__

"""Where sessions come from: a listening socket, or one that is connected already.

A device serves one client at a time.  The next one waits in the backlog until the device has been
released, rather than being turned away: QEMU started again on the same socket may well knock
before the end of its predecessor has been noticed.  That somebody waits is logged, since to a
second QEMU, started by mistake, it looks like a server that does not answer.
"""

from __future__ import annotations

import errno
import logging
import select
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import trio

from vfio_user_virtio.protocol.version import OWN_CAPABILITIES, Capabilities
from vfio_user_virtio.transport.session import Session

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vfio_user_virtio.device import Device
    from vfio_user_virtio.transport.session_state import SessionStatistics

logger = logging.getLogger(__name__)

_OUT_OF_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_RETRY_SECONDS: Final = 0.1


class Serving(Protocol):
    """A session of any engine: see `Session`."""

    @property
    def connected(self) -> float:
        """When the client came, in seconds since 1970."""
        ...

    @property
    def process(self) -> int | None:
        """The client's pid, if the kernel tells."""
        ...

    @property
    def over(self) -> bool: ...

    def statistics(self) -> SessionStatistics: ...

    async def run(self) -> None: ...


MakeSession: TypeAlias = "Callable[[socket.socket, Device, str], Serving]"
"""An engine's way to make a session, which owns the socket; the string is its name in the log."""


async def serve_listener(
    listener: socket.socket,
    device: Device,
    *,
    name: str = "session",
    capabilities: Capabilities = OWN_CAPABILITIES,
    on_session: Callable[[Serving], None] | None = None,
    make_session: MakeSession | None = None,
) -> None:
    """Serve one client after the other until cancelled.

    `listener` is a listening UNIX stream socket and stays the caller's; it is made non-blocking.
    `on_session` sees each session before it runs (statistics).  `make_session` makes those of
    another engine, which have their own `capabilities`.
    """
    listener.setblocking(False)
    while True:
        sock = await accept(listener, name)
        session = _begin(sock, device, name, capabilities, on_session, make_session)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_mention_waiting, listener, name)
            await session.run()
            nursery.cancel_scope.cancel()


async def serve_connected(
    sock: socket.socket,
    device: Device,
    *,
    name: str = "session",
    capabilities: Capabilities = OWN_CAPABILITIES,
    on_session: Callable[[Serving], None] | None = None,
    make_session: MakeSession | None = None,
) -> Serving:
    """Serve the client at the other end of `sock` until it goes; the session, for its statistics.

    `sock` is closed in the end.  The rest is as for `serve_listener`.
    """
    session = _begin(sock, device, name, capabilities, on_session, make_session)
    await session.run()
    return session


def _begin(
    sock: socket.socket,
    device: Device,
    name: str,
    capabilities: Capabilities,
    on_session: Callable[[Serving], None] | None,
    make_session: MakeSession | None,
) -> Serving:
    session: Serving
    if make_session is None:
        session = Session(sock, device, name=name, capabilities=capabilities)
    else:
        session = make_session(sock, device, name)
    if on_session is not None:
        on_session(session)
    return session


async def accept(listener: socket.socket, name: str) -> socket.socket:
    """The next connection, for `name` in the log.  Raises OSError if there can be no other."""
    while True:
        await trio.lowlevel.wait_readable(listener)
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            if _is_shut_down(listener):
                raise OSError(errno.ESHUTDOWN, "somebody shut the listening socket down") from None
            continue
        except ConnectionAbortedError:
            continue
        except OSError as error:
            if error.errno not in _OUT_OF_RESOURCES:
                raise
            logger.warning("%s: cannot accept a client: %s; trying again", name, error.strerror)
            await trio.sleep(_RETRY_SECONDS)
            continue
        return sock


def _is_shut_down(listener: socket.socket) -> bool:
    """Whether the socket will be readable for ever, with nobody to accept."""
    poll = select.poll()
    poll.register(listener, 0)
    return any(event & select.POLLHUP for _, event in poll.poll(0))


async def _mention_waiting(listener: socket.socket, name: str) -> None:
    await trio.lowlevel.wait_readable(listener)
    logger.info("%s: another client waits until this session is over", name)

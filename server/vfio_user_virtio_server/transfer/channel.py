"""A transfer stream over whatever pipe there is: frames out, frames in, with time limits.

Nothing here authenticates or encrypts.  Who may speak to a receiver is who can write to its pipe,
which ssh, a socket's permissions or a firewall decide.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import socket
import stat
from typing import TYPE_CHECKING, Final

import trio

from vfio_user_virtio.errors import ConnectionLost, HostError
from vfio_user_virtio.limits import TRANSFER_SECONDS
from vfio_user_virtio.migration.transfer_stream import FrameReader, FrameWriter
from vfio_user_virtio_server.transfer.address import TcpAddress

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from vfio_user_virtio.migration.transfer_frames import Frame
    from vfio_user_virtio_server.transfer.address import Address

_PIECE: Final = 256 << 10
END_SECONDS: Final = 2.0
"""How long the other end may take to end by itself when all has been said."""


class Channel:
    """Frames over `outgoing` and `incoming`, either of which may be missing.

    `order`: of what comes in.  `seconds`: how long the peer may take to take or to send anything.
    All methods raise ConnectionLost.
    """

    def __init__(
        self,
        incoming: trio.abc.ReceiveStream | None,
        outgoing: trio.abc.SendStream | None,
        order: Mapping[str, Mapping[type[Frame], str]],
        *,
        seconds: float = TRANSFER_SECONDS,
    ) -> None:
        self.reader = FrameReader(order)
        self.writer = FrameWriter()
        self.seconds = seconds
        self._incoming = incoming
        self._outgoing = outgoing
        self._frames: collections.deque[Frame] = collections.deque()
        self._failure: ConnectionLost | None = None

    @property
    def answers(self) -> bool:
        """Whether there are both directions."""
        return self._incoming is not None and self._outgoing is not None

    async def send(self, frame: Frame) -> None:
        """Hand a frame to the pipe.  After ConnectionLost, the peer has not got all of it."""
        assert self._outgoing is not None
        try:
            with trio.fail_after(self.seconds):
                await self._outgoing.send_all(self.writer.write(frame))
        except trio.TooSlowError:
            raise ConnectionLost(
                f"the other end of the transfer has taken nothing for {self.seconds:g} s"
            ) from None
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            raise ConnectionLost(
                f"the other end of the transfer takes no more ({_reason(error)})"
            ) from error

    async def receive(self, *, patient: bool = False) -> Frame:
        """The next frame; `patient`: however long it takes."""
        assert self._incoming is not None
        while not self._frames:
            if self._failure is not None:
                raise self._failure
            try:
                with trio.fail_after(float("inf") if patient else self.seconds):
                    data = await self._incoming.receive_some(_PIECE)
            except trio.TooSlowError:
                raise ConnectionLost(
                    f"the other end of the transfer has sent nothing for {self.seconds:g} s"
                ) from None
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
                raise ConnectionLost(
                    f"the transfer's connection failed ({_reason(error)})"
                ) from error
            try:
                if data:
                    for frame in self.reader.feed_untrusted(data):
                        self._frames.append(frame)
                else:
                    self._failure = ConnectionLost("the transfer stream is over")
                    self.reader.finish_untrusted()
            except ConnectionLost as error:
                self._failure = error
        return self._frames.popleft()


def _reason(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    return cause.strerror or str(cause) if isinstance(cause, OSError) else "closed"


# --- what a channel can run over ----------------------------------------------------------------


@contextlib.asynccontextmanager
async def fd_streams(
    incoming: int | None, outgoing: int | None
) -> AsyncIterator[tuple[trio.abc.ReceiveStream | None, trio.abc.SendStream | None]]:
    """Streams on descriptors, which stay the caller's."""
    async with contextlib.AsyncExitStack() as stack:
        source = target = None
        if incoming is not None:
            source = await stack.enter_async_context(_duplicate(incoming))
        if outgoing is not None:
            target = await stack.enter_async_context(_duplicate(outgoing))
        yield source, target


def _duplicate(fd: int) -> trio.lowlevel.FdStream:
    try:
        return trio.lowlevel.FdStream(os.dup(fd))
    except OSError as error:
        raise HostError(
            f"descriptor {fd}: {error.strerror}; was it passed?", exit_code=os.EX_USAGE
        ) from None


def is_socket(fd: int) -> bool:
    """Whether a descriptor goes both ways.  Raises HostError if there is none."""
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError as error:
        raise HostError(
            f"descriptor {fd}: {error.strerror}; was it passed?", exit_code=os.EX_USAGE
        ) from None


@contextlib.asynccontextmanager
async def connected(address: Address) -> AsyncIterator[trio.SocketStream]:
    """A stream to whoever listens at `address`.  Raises HostError."""
    try:
        if isinstance(address, TcpAddress):
            stream = await trio.open_tcp_stream(address.host, address.port)
        else:
            stream = await trio.open_unix_socket(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise HostError(
            f"cannot connect to {address}: {reason}; does `receive --listen` run there?",
            exit_code=os.EX_UNAVAILABLE,
        ) from None
    async with stream:
        yield stream


@contextlib.asynccontextmanager
async def accepted(address: Address) -> AsyncIterator[trio.SocketStream]:
    """A stream from the first who connects to `address`.  Raises HostError.

    Nobody else is let in, and the socket is gone by then.
    """
    try:
        if isinstance(address, TcpAddress):
            (listener, *others) = await trio.open_tcp_listeners(address.port, host=address.host)
            for other in others:
                await other.aclose()
        else:
            listener = _unix_listener(address)
    except OSError as error:
        remedy = "remove it" if error.errno == errno.EADDRINUSE else "choose another"
        raise HostError(
            f"cannot listen at {address}: {error.strerror or error}; {remedy}",
            exit_code=os.EX_CANTCREAT,
        ) from None
    try:
        async with listener:
            stream = await listener.accept()
    finally:
        if isinstance(address, str):
            with contextlib.suppress(OSError):
                os.unlink(address)
    async with stream:
        yield stream


def _unix_listener(path: str) -> trio.SocketListener:
    """One that only its owner can connect to."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        sock.bind(path)
        sock.listen(1)
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(mask)
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


@contextlib.asynccontextmanager
async def command_streams(
    command: Sequence[str],
) -> AsyncIterator[tuple[trio.abc.ReceiveStream, trio.abc.SendStream]]:
    """Streams from and to a program that is run for it; it ends before the block is left.

    Raises HostError if it cannot be started, and ConnectionLost with its exit status if that is why
    the block could not go on.
    """
    try:
        process = await trio.lowlevel.open_process(list(command), stdin=-1, stdout=-1)
    except OSError as error:
        raise HostError(
            f"cannot run {command[0]}: {error.strerror}", exit_code=os.EX_UNAVAILABLE
        ) from None
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdout, process.stdin
    except ConnectionLost as error:
        await _end(process)
        status = process.returncode
        raise ConnectionLost(f"{error}; {command[0]} {_ended(status)}") from error
    finally:
        await _end(process)


async def _end(process: trio.Process) -> None:
    """Let it end at the end of its input; stop it if it does not."""
    with trio.CancelScope(shield=True):
        if process.stdin is not None:
            await process.stdin.aclose()
        with trio.move_on_after(END_SECONDS):
            await process.wait()
            return
        process.terminate()
        with trio.move_on_after(END_SECONDS):
            await process.wait()
            return
        process.kill()
        await process.wait()


def _ended(status: int | None) -> str:
    assert status is not None
    return f"ended with exit status {status}" if status >= 0 else f"ended by signal {-status}"

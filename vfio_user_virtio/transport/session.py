"""One client, from VERSION to disconnect, over one device.

A session is a loop in one task: read what is there, answer it in the order it came, send the
answers together, let the device do the work that arose, sleep.  Beside it runs the device's own
task (`Device.serve`), which may send DMA_READ and DMA_WRITE; their replies come in by the same
loop, or by the twin socket if the client wanted one.

The client is hostile: whatever it sends costs it at most its own session.  So is, in a way, the
device: an exception that it should not have raised is logged once, with what was being done, and
ends this session and no other.  In any case, also when cancelled, the device is released exactly
once before the socket closes; its registers stay as they are (vfio-user, Disconnection).

What another process would need to go on with a live session is in `SessionState` and the device,
never in locals of the loop.

Source: vfio-user, Protocol Specification; the answers to malformed messages are in
tests/transport/test_hostile_client.py, one test each.
"""

from __future__ import annotations

import errno
import logging
import socket
import time
from typing import TYPE_CHECKING, Final

import trio

from vfio_user_virtio.errors import ClientError, ConnectionLost, HostError
from vfio_user_virtio.limits import HANDSHAKE_SECONDS, RELEASE_SECONDS
from vfio_user_virtio.protocol.header import (
    NO_REPLY,
    REPLY,
    TYPE_MASK,
    Command,
    encode_error_reply,
    encode_reply,
)
from vfio_user_virtio.protocol.version import (
    OWN_CAPABILITIES,
    Capabilities,
    Version,
    decode_version_request_untrusted,
    encode_version,
    negotiate,
)
from vfio_user_virtio.transport.commands import Commands
from vfio_user_virtio.transport.endpoint import Endpoint
from vfio_user_virtio.transport.remote_memory import ClientMemory
from vfio_user_virtio.transport.requests import Requests, command_name
from vfio_user_virtio.transport.session_state import SessionState, SessionStatistics, peer_process

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from vfio_user_virtio.device import Device
    from vfio_user_virtio.protocol.framing import Frame

logger = logging.getLogger(__name__)

_UNKNOWN: Final = 0
"""Under this number, which no command has, those are counted that no specification knows."""

_TOLD_ONCE: Final = frozenset(
    {
        Command.DMA_MAP,
        Command.DEVICE_SET_IRQS,
        Command.DEVICE_RESET,
        Command.DEVICE_FEATURE,
        Command.MIG_DATA_WRITE,
    }
)
"""Commands whose refusal a user wants to know of, once for each reason."""


class Session:
    """See the module head.  `name` stands in front of its log lines."""

    def __init__(
        self,
        sock: socket.socket,
        device: Device,
        *,
        name: str = "session",
        capabilities: Capabilities = OWN_CAPABILITIES,
    ) -> None:
        self.name = name
        self.state = SessionState()
        self._device = device
        self._own = capabilities
        self._endpoint = Endpoint(sock)
        self._twin: Endpoint | None = None
        self._counts = dict.fromkeys((_UNKNOWN, *Command), 0)
        self._errors = 0
        self._told: set[tuple[int, int]] = set()
        self._at_hand: Frame | None = None
        self._over = "it was stopped"
        self.connected: Final = time.time()
        """When the client came, in seconds since 1970."""
        self.process: Final = peer_process(sock)
        """The client's pid, if the kernel tells."""
        self.over = False

    def statistics(self) -> SessionStatistics:
        counts = {Command(c).name: n for c, n in self._counts.items() if n and c != _UNKNOWN}
        if self._counts[_UNKNOWN]:
            counts["unknown"] = self._counts[_UNKNOWN]
        twin = self._twin
        return SessionStatistics(
            counts,
            self._errors,
            self._endpoint.bytes_received + (twin.bytes_received if twin else 0),
            self._endpoint.bytes_sent + (twin.bytes_sent if twin else 0),
            self.state.version,
        )

    async def run(self) -> None:
        """Serve the client until it goes.  Raises nothing but trio.Cancelled."""
        logger.info("%s: client connected", self.name)
        try:
            try:
                await self._serve()
            finally:
                await self._end()
        except* ConnectionLost as lost:
            self._over = _first(lost)
        except* HostError as gone:
            self._over = f"the device is lost: {_first(gone)}"
            logger.error("%s: %s", self.name, self._over)  # noqa: TRY400 - no fault of the program
        # A device may fail in any way, and must not take other sessions with it.
        except* Exception as errors:
            self._over = f"the device failed: {_first(errors)}"
            logger.exception("%s: unexpected failure", self.name, exc_info=errors)
        finally:
            self.over = True
            logger.info("%s: session over: %s", self.name, self._over)

    # --- a session's life -----------------------------------------------------------------------

    async def _serve(self) -> None:
        with trio.move_on_after(HANDSHAKE_SECONDS) as handshake:
            frames = await self._negotiate()
        if handshake.cancelled_caught:
            raise ConnectionLost(f"no complete VERSION within {HANDSHAKE_SECONDS:g} s")
        if self.state.version is None:
            self._over = "the client left before VERSION"
            return
        granted = self.state.version.capabilities
        requests = Requests(self._twin or self._endpoint, self.state.message_ids)
        memory = ClientMemory(requests, granted.max_data_xfer_size)
        commands = Commands(self._device, granted)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve_device, memory)
                if self._twin is not None:
                    nursery.start_soon(self._receive_twin, self._twin, requests)
                await self._receive(frames, commands, requests)
                nursery.cancel_scope.cancel()
        finally:
            requests.fail(ConnectionLost("the session is over"))
        self._over = "the client closed the connection"

    async def _serve_device(self, memory: ClientMemory) -> None:
        with _Noting(lambda: "in the device's own task (Device.serve)"):
            await self._device.serve(memory)

    async def _end(self) -> None:
        try:
            with (
                trio.move_on_after(RELEASE_SECONDS, shield=True) as patience,
                _Noting(lambda: "while releasing the device (Device.release)"),
            ):
                await self._device.release()
            if patience.cancelled_caught:
                logger.error(
                    "%s: the device was not released within %g s", self.name, RELEASE_SECONDS
                )
        finally:
            self._endpoint.close()
            if self._twin is not None:
                self._twin.close()

    # --- VERSION --------------------------------------------------------------------------------

    async def _negotiate(self) -> list[Frame]:
        """Answer VERSION; what came with it and is still to be answered."""
        frames = await self._endpoint.receive()
        if not frames:
            return frames
        first = self._at_hand = frames[0]
        try:
            await self._answer_version(first)
        except ConnectionLost as lost:
            await self._say_why(lost)
            raise
        return frames[1:]

    async def _answer_version(self, frame: Frame) -> None:
        self._count(frame.command)
        if frame.is_reply:
            raise ConnectionLost("the first message is a reply, not VERSION")
        if frame.command != Command.VERSION or frame.no_reply:
            raise ConnectionLost(
                f"the first message is {command_name(frame.command)} with flags "
                f"{frame.flags:#x}, not VERSION with a reply",
                reply_errno=errno.EINVAL,
            )
        asked = decode_version_request_untrusted(frame.payload, len(frame.fds))
        version = negotiate(asked, self._own)
        reply = encode_reply(frame, encode_version(version))
        twin = version.capabilities.twin_socket
        if twin is not None and twin.supported:
            ours, theirs = socket.socketpair()
            self._twin = Endpoint(ours)
            with theirs:
                await self._endpoint.send(reply, [theirs.fileno()])
        else:
            await self._endpoint.send(reply)
        self.state.version = version
        logger.info("%s: %s", self.name, _summary(version))

    async def _say_why(self, lost: ConnectionLost) -> None:
        """Send the error reply that `lost` asks for, if the client takes it."""
        frame = self._at_hand
        if not lost.reply_errno or frame is None or frame.no_reply:
            return
        self._errors += 1
        self._endpoint.post(encode_error_reply(frame, lost.reply_errno))
        with trio.move_on_after(RELEASE_SECONDS):
            await self._endpoint.flush()

    # --- commands -------------------------------------------------------------------------------

    async def _receive(self, frames: list[Frame], commands: Commands, requests: Requests) -> None:
        endpoint, device = self._endpoint, self._device
        deliver = requests.deliver if self._twin is None else _refuse_reply
        with _Noting(self._doing):
            while True:
                for frame in frames:
                    if frame.flags & TYPE_MASK == REPLY:
                        deliver(frame)
                        continue
                    self._at_hand = frame
                    await self._answer(frame, commands)
                    if endpoint.full:
                        await endpoint.flush()
                await endpoint.flush()
                self._at_hand = None
                device.work()
                frames = await endpoint.receive()
                if not frames:
                    return

    async def _answer(self, frame: Frame, commands: Commands) -> None:
        self._count(frame.command)
        silent = frame.flags & NO_REPLY
        try:
            message, fds, tail = await commands.answer(frame)
        except ClientError as error:
            self._errors += 1
            self._log_refusal(frame.command, error)
            if not silent:
                self._endpoint.post(encode_error_reply(frame, error.errno))
            return
        if silent:
            return
        self._endpoint.post(message, fds, tail)
        if fds:
            await self._endpoint.flush()  # while the device still has them open

    def _log_refusal(self, command: int, error: ClientError) -> None:
        """What leaves a guest without memory or interrupts, or ends its migration, is told once,
        all else to who debugs.  That there is no such feature is no news."""
        level = logging.DEBUG
        told = (command, error.errno)
        if command in _TOLD_ONCE and error.errno != errno.ENOTTY and told not in self._told:
            self._told.add(told)
            level = logging.WARNING
        logger.log(level, "%s: refused %s: %s", self.name, command_name(command), error)

    def _count(self, command: int) -> None:
        counts = self._counts
        counts[command if command in counts else _UNKNOWN] += 1

    async def _receive_twin(self, twin: Endpoint, requests: Requests) -> None:
        while frames := await twin.receive():
            for frame in frames:
                if not frame.is_reply:
                    raise ConnectionLost(
                        f"{command_name(frame.command)} came by the twin socket, "
                        "which is for the server's commands"
                    )
                requests.deliver(frame)
        raise ConnectionLost("the client closed the twin socket")

    def _doing(self) -> str:
        frame = self._at_hand
        if frame is None:
            return "in Device.work"
        return (
            f"while answering {command_name(frame.command)} (message {frame.message_id}, "
            f"{len(frame.payload)} bytes: {frame.payload[:32].hex(' ', 4)})"
        )


class _Noting:
    """Says, in a note on the exception that passes, what was being done."""

    def __init__(self, describe: Callable[[], str]) -> None:
        self._describe = describe

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception):
            error.add_note(self._describe())


def _refuse_reply(frame: Frame) -> None:
    raise ConnectionLost(
        f"a reply to {command_name(frame.command)} came by the main socket, not by the twin socket"
    )


def _first(group: BaseExceptionGroup[BaseException]) -> str:
    """The first of possibly nested exceptions, for one line of a log."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__


def _summary(version: Version) -> str:
    granted = version.capabilities
    twin = granted.twin_socket is not None and granted.twin_socket.supported
    return (
        f"vfio-user {version.major}.{version.minor}, max_data_xfer_size "
        f"{granted.max_data_xfer_size}, max_msg_fds {granted.max_msg_fds}, max_dma_maps "
        f"{granted.max_dma_maps}, pgsizes {granted.pgsizes:#x}, write_multiple "
        f"{'yes' if granted.write_multiple else 'no'}, twin_socket {'yes' if twin else 'no'}"
    )

"""The control interface from the other end: a varlink client, and its methods with types.

`VarlinkClient` speaks to any varlink service; `ControlClient` to ours.  Replies are checked against
the interface's description before they are believed, so a server that lies is a ConnectionLost like
one that has gone.

    async with connect_control("/run/vfio-user-virtio/control") as control:
        for device in await control.devices():
            …

One call at a time; a task that wants its own makes its own connection.
"""

from __future__ import annotations

import base64
import contextlib
import socket
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from vfio_user_virtio import limits
from vfio_user_virtio.control.idl import MismatchError
from vfio_user_virtio.control.interface import CONTROL, SERVICE
from vfio_user_virtio.control.records import (
    Device,
    Mapping,
    Migration,
    Pages,
    Range,
    Statistics,
    from_json,
    to_json,
)
from vfio_user_virtio.control.varlink import (
    Call,
    Splitter,
    VarlinkError,
    decode_reply_untrusted,
    encode_call,
)
from vfio_user_virtio.errors import ConnectionLost

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence

    from vfio_user_virtio.control.idl import Interface
    from vfio_user_virtio.control.varlink import Json, Object

_RECEIVE_SIZE: Final = 64 << 10
_T = TypeVar("_T")


class VarlinkClient:
    """A connection to the varlink service at the other end of `sock`, which it owns."""

    def __init__(self, sock: socket.socket) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._splitter = Splitter()
        self._messages: list[bytes] = []
        self._one_at_a_time = trio.Lock()
        self._broken = False

    async def call(self, interface: Interface, method: str, parameters: Object) -> Object:
        """The parameters of the reply.  Raises VarlinkError, ConnectionLost."""
        async with contextlib.aclosing(
            self._call(interface, method, parameters, more=False)
        ) as replies:
            async for reply in replies:
                return reply
        raise AssertionError("a call ends with a reply or an error")

    async def call_more(
        self, interface: Interface, method: str, parameters: Object
    ) -> list[Object]:
        """The parameters of all replies.  Raises VarlinkError, ConnectionLost."""
        async with contextlib.aclosing(
            self._call(interface, method, parameters, more=True)
        ) as replies:
            return [reply async for reply in replies]

    def stream(
        self, interface: Interface, method: str, parameters: Object
    ) -> contextlib.aclosing[AsyncGenerator[Object, None]]:
        """The parameters of each reply as it comes, for ``async with … as replies``.

        One that is left early leaves a connection that cannot be used again.
        """
        return contextlib.aclosing(self._call(interface, method, parameters, more=True))

    async def _call(
        self, interface: Interface, method: str, parameters: Object, *, more: bool
    ) -> AsyncGenerator[Object, None]:
        async with self._one_at_a_time:
            if self._broken:
                raise ConnectionLost("an earlier call of this connection was given up")
            self._broken = True
            await self._send(encode_call(Call(f"{interface.name}.{method}", parameters, more=more)))
            continues = True
            while continues:
                reply = decode_reply_untrusted(await self._message())
                continues = reply.continues
                self._broken = continues
                if reply.error is not None:
                    raise VarlinkError(reply.error, reply.parameters)
                if continues and not more:
                    raise ConnectionLost("the server has more replies than were asked for")
                try:
                    interface.check_untrusted(
                        interface.methods[method].reply, dict(reply.parameters), strict=False
                    )
                except MismatchError as error:
                    raise ConnectionLost(
                        f"the reply to {method} makes no sense: {error}"
                    ) from error
                yield reply.parameters

    async def _send(self, message: bytes) -> None:
        try:
            await self._stream.send_all(message)
        except trio.BrokenResourceError as error:
            raise ConnectionLost("the server has closed the control connection") from error

    async def _message(self) -> bytes:
        while not self._messages:
            try:
                data = bytes(await self._stream.receive_some(_RECEIVE_SIZE))
            except trio.BrokenResourceError as error:
                raise ConnectionLost("the control connection broke") from error
            if not data:
                raise ConnectionLost("the server has closed the control connection")
            self._messages += self._splitter.feed_untrusted(data)
        return self._messages.pop(0)

    async def aclose(self) -> None:
        await self._stream.aclose()


class ControlClient:
    """The methods of ``io.vfio-user-virtio.Control``; see its text in `interface`.

    All raise VarlinkError for what the server refuses, ConnectionLost.
    """

    def __init__(self, client: VarlinkClient) -> None:
        self._client = client

    async def info(self) -> Object:
        """``org.varlink.service.GetInfo``."""
        return await self._client.call(SERVICE, "GetInfo", {})

    async def devices(self) -> list[Device]:
        return _taken(list[Device], await self._call("GetDevices"), "devices")

    async def device(self, name: str) -> Device:
        return _taken(Device, await self._call("GetDevice", device=name), "device")

    async def statistics(self, name: str | None = None) -> list[Statistics]:
        """Of one device, or of all."""
        named: dict[str, Json] = {} if name is None else {"device": name}
        return _taken(list[Statistics], await self._call("GetStatistics", **named), "statistics")

    # --- migration -----------------------------------------------------------------------------

    async def quiesce(self, device: str, *, keep: bool = False) -> None:
        await self._call("Quiesce", device=device, keep=keep)

    async def resume(self, device: str) -> None:
        await self._call("Resume", device=device)

    async def release(self, device: str) -> None:
        await self._call("Release", device=device)

    async def set_migration_state(
        self, device: str, state: str, *, keep: bool = False
    ) -> Migration:
        """`state` as `MigrationState` names it."""
        reply = await self._call("SetMigrationState", device=device, state=state, keep=keep)
        return _taken(Migration, reply, "migration")

    async def precopy_info(self, device: str) -> tuple[int, int]:
        """Bytes to read of the first image, and beyond; makes the server look for a newer one."""
        reply = await self._call("GetPrecopyInfo", device=device)
        return _taken(int, reply, "initial"), _taken(int, reply, "dirty")

    async def image_size(self, device: str) -> int:
        return _taken(int, await self._call("GetImageSize", device=device), "size")

    async def read_image(self, device: str) -> bytes:
        """What there is of the stream."""
        replies = await self._more("ReadImage", device=device)
        return b"".join(_decoded(_taken(str, reply, "data")) for reply in replies)

    async def write_image(self, device: str, data: bytes) -> None:
        """The next bytes of the stream, any number."""
        for start in range(0, len(data), limits.CONTROL_CHUNK):
            piece = data[start : start + limits.CONTROL_CHUNK]
            await self._call("WriteImage", device=device, data=base64.b64encode(piece).decode())

    # --- dirty log -----------------------------------------------------------------------------

    async def start_dirty_log(
        self, device: str, ranges: Iterable[Range] = (), *, keep: bool = False
    ) -> None:
        """Of all memory unless `ranges` says which."""
        shown: list[Json] = [to_json(one) for one in ranges]
        await self._call("StartDirtyLog", device=device, ranges=shown, keep=keep)

    async def stop_dirty_log(self, device: str) -> None:
        await self._call("StopDirtyLog", device=device)

    async def report_dirty_log(self, device: str) -> list[Range]:
        """What was written since the last report, in all that is mapped now."""
        replies = await self._more("ReportDirtyLog", device=device)
        return [one for reply in replies for one in _taken(list[Range], reply, "ranges")]

    # --- guest memory --------------------------------------------------------------------------

    async def mappings(self, device: str) -> list[Mapping]:
        replies = await self._more("GetMappings", device=device)
        return [one for reply in replies for one in _taken(list[Mapping], reply, "mappings")]

    @contextlib.asynccontextmanager
    async def reading_memory(
        self, device: str, ranges: Sequence[Range]
    ) -> AsyncIterator[AsyncIterator[Pages]]:
        """Guest memory in the pieces that `write_pages` takes, as they come.  At most
        `limits.CONTROL_RANGES` ranges at once."""
        parameters: Object = {"device": device, "ranges": [to_json(one) for one in ranges]}
        async with self._client.stream(CONTROL, "ReadMemory", parameters) as replies:
            yield (_taken(Pages, reply, "pages") async for reply in replies)

    async def read_memory(self, device: str, iova: int, size: int) -> bytes:
        found = bytearray()
        async with self.reading_memory(device, [Range(iova, size)]) as replies:
            async for pages in replies:
                found += _decoded(pages.data)
        return bytes(found)

    async def write_pages(self, device: str, pages: Pages) -> int:
        """Write what one reply of `reading_memory` had; how many bytes that was."""
        reply = await self._call("WriteMemory", device=device, pages=to_json(pages))
        return _taken(int, reply, "size")

    async def write_memory(self, device: str, iova: int, data: bytes) -> None:
        for start in range(0, len(data), limits.CONTROL_CHUNK):
            piece = data[start : start + limits.CONTROL_CHUNK]
            text = base64.b64encode(piece).decode()
            await self.write_pages(device, Pages([Range(iova + start, len(piece))], text))

    async def copy_memory(
        self, device: str, ranges: Sequence[Range], to: ControlClient, target: str
    ) -> int:
        """Write these ranges of `device` to the same addresses of `target` at another server; how
        many bytes that was."""
        copied = 0
        for start in range(0, len(ranges), limits.CONTROL_RANGES):
            part = ranges[start : start + limits.CONTROL_RANGES]
            async with self.reading_memory(device, part) as replies:
                async for pages in replies:
                    copied += await to.write_pages(target, pages)
        return copied

    # --- the rest ------------------------------------------------------------------------------

    async def replay(self, device: str) -> None:
        await self._call("Replay", device=device)

    async def announce(self, device: str) -> None:
        await self._call("Announce", device=device)

    async def _call(self, method: str, **parameters: Json) -> Object:
        return await self._client.call(CONTROL, method, parameters)

    async def _more(self, method: str, **parameters: Json) -> list[Object]:
        return await self._client.call_more(CONTROL, method, parameters)


@contextlib.asynccontextmanager
async def control_of(sock: socket.socket) -> AsyncIterator[ControlClient]:
    """A client on a connected socket, which is closed in the end."""
    client = VarlinkClient(sock)
    try:
        yield ControlClient(client)
    finally:
        with trio.CancelScope(shield=True):
            await client.aclose()


@contextlib.asynccontextmanager
async def connect_control(path: str) -> AsyncIterator[ControlClient]:
    """A client of the server that listens at `path`.  Raises OSError."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    async with control_of(sock) as control:
        yield control


def _taken(kind: type[_T], reply: Object, name: str) -> _T:
    return from_json(kind, reply[name])


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise ConnectionLost("what the server calls base64 is none") from None

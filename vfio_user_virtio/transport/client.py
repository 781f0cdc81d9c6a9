"""A vfio-user client: what QEMU is to our server, for tests, `probe`, guest drivers and tools.

`connect` and `connect_socket` are async context managers; inside them a `Client` has one method per
command, with the arguments and results of the `Device` seam.  Any number of tasks may have requests
in flight.  Commands of the server (DMA_READ, DMA_WRITE) are answered from a `ServedMemory` as they
come, also while requests of ours wait.

Errors: `RemoteError` when the server refuses a command; `ConnectionLost` when it breaks a rule or
has gone, from then on for every call; `HostError` when nobody can be connected to.

Source: vfio-user, Protocol Specification.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import TYPE_CHECKING, Final, Protocol

import attrs
import trio

from vfio_user_virtio.device import U64_END, DmaMapping, IrqInfo, IrqRequest, RegionInfo
from vfio_user_virtio.errors import ClientError, ConnectionLost, HostError
from vfio_user_virtio.limits import HANDSHAKE_SECONDS, MAX_MESSAGE_OVERHEAD
from vfio_user_virtio.protocol.device_info import (
    decode_device_info_reply_untrusted,
    encode_device_info_request,
)
from vfio_user_virtio.protocol.dirty_bitmap import bitmap_size_untrusted
from vfio_user_virtio.protocol.dma import (
    DMA_ACCESS_SIZE,
    DmaUnmapRequest,
    decode_dma_read_request_untrusted,
    decode_dma_unmap_reply_untrusted,
    decode_dma_write_request_untrusted,
    encode_dma_map_request,
    encode_dma_read_reply,
    encode_dma_unmap_request,
    encode_dma_write_reply,
)
from vfio_user_virtio.protocol.feature import (
    DEVICE_FEATURE_SIZE,
    FeatureRequest,
    decode_feature_reply_untrusted,
    encode_feature_request,
)
from vfio_user_virtio.protocol.header import Command, encode_error_reply, encode_reply
from vfio_user_virtio.protocol.irq import (
    decode_irq_info_reply_untrusted,
    encode_irq_info_request,
    encode_set_irqs_request,
)
from vfio_user_virtio.protocol.migration import (
    decode_migration_read_reply_untrusted,
    encode_migration_data_head,
    encode_migration_read_request,
)
from vfio_user_virtio.protocol.precopy_info import (
    decode_precopy_info_reply_untrusted,
    encode_precopy_info_request,
)
from vfio_user_virtio.protocol.region import (
    decode_region_read_reply_untrusted,
    decode_region_write_multi_reply_untrusted,
    decode_region_write_reply_untrusted,
    encode_region_read_request,
    encode_region_write_multi_request,
    encode_region_write_request,
)
from vfio_user_virtio.protocol.region_info import (
    REGION_INFO_SIZE,
    decode_region_info_reply_untrusted,
    encode_region_info_request,
)
from vfio_user_virtio.protocol.region_io_fds import (
    REGION_IO_FDS_SIZE,
    IoFd,
    decode_region_io_fds_reply_untrusted,
    encode_region_io_fds_request,
)
from vfio_user_virtio.protocol.version import (
    MAJOR,
    MINOR,
    OWN_CAPABILITIES,
    Capabilities,
    Version,
    decode_version_reply_untrusted,
    encode_version,
)
from vfio_user_virtio.transport.endpoint import Endpoint, close_fds
from vfio_user_virtio.transport.requests import MessageIds, Requests, command_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from vfio_user_virtio.device import DeviceInfo, FeatureOperation
    from vfio_user_virtio.protocol.framing import Frame
    from vfio_user_virtio.protocol.header import Buffer

PROPOSAL: Final = attrs.evolve(OWN_CAPABILITIES, twin_socket=None)
"""What a client proposes if not told otherwise: like QEMU, everything but the twin socket."""

_MAX_ASKS: Final = 3
"""How often to ask with a larger argsz; once is what it takes, unless the answer has changed."""


class ServedMemory(Protocol):
    """What DMA_READ and DMA_WRITE reach.  OSError becomes an error reply with its errno."""

    def read(self, address: int, count: int) -> bytes: ...

    def write(self, address: int, data: bytes) -> None: ...


class Client:
    """One connection to a server; made by `connect` and `connect_socket`."""

    def __init__(self, sock: socket.socket, memory: ServedMemory | None = None) -> None:
        self.endpoint = Endpoint(sock)
        """For who must say what no method would: whole messages and fds as they are."""
        self.version = Version(MAJOR, MINOR, PROPOSAL)
        """What was negotiated."""
        self.lost = trio.Event()
        """Set when the server has gone, or has been given up."""
        self.twin: Endpoint | None = None
        """The second socket, if one was negotiated."""
        self._memory = memory
        self._requests = Requests(self.endpoint, MessageIds())

    # --- the device -----------------------------------------------------------------------------

    async def device_info(self) -> DeviceInfo:
        reply = await self._requests.request(Command.DEVICE_GET_INFO, encode_device_info_request())
        return decode_device_info_reply_untrusted(reply)

    async def region_info(self, index: int) -> RegionInfo:
        """Region `index`; its fd, if there is one, is the caller's to close."""
        argsz = REGION_INFO_SIZE
        for _ in range(_MAX_ASKS):
            frame = await self._requests.request_frame(
                Command.DEVICE_GET_REGION_INFO, encode_region_info_request(index, argsz)
            )
            with _closing(frame.fds) as fds:
                reply = decode_region_info_reply_untrusted(frame.payload)
                if reply.argsz <= argsz:
                    return attrs.evolve(reply.info, fd=fds.pop() if fds else None)
            argsz = self._room(reply.argsz)
        raise ConnectionLost(f"information about region {index} grows while it is asked for")

    async def region_io_fds(self, index: int) -> tuple[tuple[IoFd, ...], list[int]]:
        """The entries of region `index`, and their fds, which are the caller's to close."""
        argsz = REGION_IO_FDS_SIZE
        for _ in range(_MAX_ASKS):
            frame = await self._requests.request_frame(
                Command.DEVICE_GET_REGION_IO_FDS, encode_region_io_fds_request(index, argsz)
            )
            with _closing(frame.fds) as fds:
                reply = decode_region_io_fds_reply_untrusted(frame.payload, len(fds))
                if reply.argsz <= argsz:
                    taken = fds[:]
                    fds.clear()
                    return reply.entries, taken
            argsz = self._room(reply.argsz)
        raise ConnectionLost(f"io fds of region {index} grow while they are asked for")

    async def irq_info(self, index: int) -> IrqInfo:
        reply = await self._requests.request(
            Command.DEVICE_GET_IRQ_INFO, encode_irq_info_request(index)
        )
        return decode_irq_info_reply_untrusted(reply, index)

    async def set_irqs(self, request: IrqRequest) -> None:
        """`request.eventfds` stay the caller's."""
        payload = encode_set_irqs_request(request)
        await self._requests.request(Command.DEVICE_SET_IRQS, payload, request.eventfds or ())

    async def reset(self) -> None:
        await self._requests.request(Command.DEVICE_RESET)

    # --- registers ------------------------------------------------------------------------------

    async def region_read(self, index: int, offset: int, count: int) -> bytes:
        payload = encode_region_read_request(offset, index, count)
        reply = await self._requests.request(Command.REGION_READ, payload)
        return decode_region_read_reply_untrusted(reply, count)

    async def region_write(
        self, index: int, offset: int, data: Buffer, *, no_reply: bool = False
    ) -> None:
        """With `no_reply` the write is posted: nobody tells whether it was done."""
        payload = encode_region_write_request(offset, index, data)
        if no_reply:
            await self._requests.send(Command.REGION_WRITE, payload)
            return
        reply = await self._requests.request(Command.REGION_WRITE, payload)
        decode_region_write_reply_untrusted(reply, len(data))

    async def region_write_multi(
        self, writes: Sequence[tuple[int, int, bytes]], *, no_reply: bool = False
    ) -> int:
        """Write (offset, region, at most 8 bytes) in that order; how many were done."""
        payload = encode_region_write_multi_request(writes)
        if no_reply:
            await self._requests.send(Command.REGION_WRITE_MULTI, payload)
            return len(writes)
        reply = await self._requests.request(Command.REGION_WRITE_MULTI, payload)
        return decode_region_write_multi_reply_untrusted(reply)

    # --- memory ---------------------------------------------------------------------------------

    async def dma_map(self, mapping: DmaMapping) -> None:
        """`mapping.fd` stays the caller's."""
        fds = () if mapping.fd is None else (mapping.fd,)
        await self._requests.request(Command.DMA_MAP, encode_dma_map_request(mapping), fds)

    async def dma_unmap(self, iova: int, size: int) -> None:
        """Unmap a range; (0, U64_END) stands for everything."""
        request = DmaUnmapRequest(iova, size, everything=(iova, size) == (0, U64_END))
        reply = await self._requests.request(Command.DMA_UNMAP, encode_dma_unmap_request(request))
        decode_dma_unmap_reply_untrusted(reply, request)

    async def dma_unmap_dirty(self, iova: int, size: int, page_size: int) -> bytes:
        """Unmap a range; the bitmap of pages of it that were written since the last report.

        Of a device that is logging, and as `protocol.dirty_bitmap` has it.
        """
        bitmap_size = bitmap_size_untrusted(size, page_size, "DMA_UNMAP")
        request = DmaUnmapRequest(iova, size, False, page_size, bitmap_size)
        reply = await self._requests.request(Command.DMA_UNMAP, encode_dma_unmap_request(request))
        return decode_dma_unmap_reply_untrusted(reply, request)

    # --- migration ------------------------------------------------------------------------------

    async def feature(
        self, index: int, operation: FeatureOperation, data: bytes = b"", *, room: int = 0
    ) -> bytes:
        """DEVICE_FEATURE; the data of the reply, for which `room` bytes are offered at first."""
        argsz = DEVICE_FEATURE_SIZE + max(len(data), room)
        for _ in range(_MAX_ASKS):
            request = FeatureRequest(index, operation, data, argsz)
            payload = await self._requests.request(
                Command.DEVICE_FEATURE, encode_feature_request(request)
            )
            reply = decode_feature_reply_untrusted(payload, request)
            if reply.argsz <= argsz:
                return reply.data
            argsz = self._room(reply.argsz)
        raise ConnectionLost(f"device feature {index} grows while it is asked for")

    async def migration_read(self, count: int) -> bytes | memoryview:
        """Up to `count` bytes of device state; fewer means that no more is there now."""
        payload = encode_migration_read_request(count)
        return decode_migration_read_reply_untrusted(
            await self._requests.request(Command.MIG_DATA_READ, payload), count
        )

    async def migration_write(self, data: Buffer) -> None:
        """The next bytes of device state, which must not change until the server has them."""
        head = encode_migration_data_head(len(data))
        await self._requests.request(Command.MIG_DATA_WRITE, head, tail=data)

    async def precopy_info(self) -> tuple[int, int]:
        """Bytes to read in PRE_COPY: of the first image, and of later ones."""
        payload = encode_precopy_info_request()
        return decode_precopy_info_reply_untrusted(
            await self._requests.request(Command.MIG_GET_PRECOPY_INFO, payload)
        )

    # --- the connection -------------------------------------------------------------------------

    async def negotiate(self, proposal: Capabilities) -> None:
        """Exchange VERSION.  For `connect_socket`; raises ConnectionLost, RemoteError."""
        asked = encode_version(Version(MAJOR, MINOR, proposal))
        with trio.move_on_after(HANDSHAKE_SECONDS) as handshake:
            reply = await self._requests.request_frame(Command.VERSION, asked)
        if handshake.cancelled_caught:
            raise ConnectionLost(f"no reply to VERSION within {HANDSHAKE_SECONDS:g} s")
        with _closing(reply.fds) as fds:
            self.version = decode_version_reply_untrusted(reply.payload, len(fds))
            twin = self.version.capabilities.twin_socket
            if twin is not None and twin.fd_index is not None:
                self.twin = _twin_endpoint(fds.pop(twin.fd_index))

    def _room(self, argsz: int) -> int:
        """`argsz`, unless no reply could be that large."""
        limit = self.version.capabilities.max_data_xfer_size + MAX_MESSAGE_OVERHEAD
        if argsz > limit:
            raise ConnectionLost(f"the server has a reply of {argsz} bytes, at most {limit} fit")
        return argsz

    async def receive(self, endpoint: Endpoint) -> None:
        """Take in what comes by `endpoint` until the server goes.  For `connect_socket`."""
        lost = ConnectionLost("the server closed the connection")
        try:
            while frames := await endpoint.receive():
                for frame in frames:
                    if frame.is_reply:
                        self._requests.deliver(frame)
                    else:
                        await self._serve(endpoint, frame)
        except ConnectionLost as error:
            lost = error
        if endpoint is self.endpoint:
            self._requests.fail(lost)
            self.lost.set()

    async def _serve(self, endpoint: Endpoint, frame: Frame) -> None:
        """Answer a command of the server."""
        try:
            message = encode_reply(frame, self._dma(frame))
        except ClientError as error:
            message = encode_error_reply(frame, error.errno)
        except OSError as error:
            message = encode_error_reply(frame, error.errno or errno.EIO)
        if not frame.no_reply:
            await endpoint.send(message)

    def _dma(self, frame: Frame) -> bytes:
        if frame.command not in (Command.DMA_READ, Command.DMA_WRITE):
            raise ClientError(errno.ENOSYS, f"{command_name(frame.command)} from a server")
        if self._memory is None:
            raise ClientError(errno.ENODEV, "this client serves no memory")
        if frame.command == Command.DMA_READ:
            address, count = decode_dma_read_request_untrusted(frame.payload)
            return encode_dma_read_reply(address, self._memory.read(address, count))
        address, count = decode_dma_write_request_untrusted(frame.payload)
        self._memory.write(address, frame.payload[DMA_ACCESS_SIZE:])
        return encode_dma_write_reply(address, count)

    def close(self) -> None:
        """Hang up.  Idempotent."""
        self._requests.fail(ConnectionLost("this client has hung up"))
        self.lost.set()
        self.endpoint.close()
        if self.twin is not None:
            self.twin.close()


@contextlib.asynccontextmanager
async def connect(
    path: str | os.PathLike[str],
    *,
    capabilities: Capabilities = PROPOSAL,
    memory: ServedMemory | None = None,
) -> AsyncIterator[Client]:
    """Connect to the server that listens at `path`.  See the module head for errors."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await _connect(sock, path)
    except BaseException:
        sock.close()
        raise
    async with connect_socket(sock, capabilities=capabilities, memory=memory) as client:
        yield client


@contextlib.asynccontextmanager
async def connect_socket(
    sock: socket.socket,
    *,
    capabilities: Capabilities = PROPOSAL,
    memory: ServedMemory | None = None,
) -> AsyncIterator[Client]:
    """Be the client on a connected socket, which is closed in the end."""
    client = Client(sock, memory)
    failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.receive, client.endpoint)
            try:
                await client.negotiate(capabilities)
                if client.twin is not None:
                    nursery.start_soon(client.receive, client.twin)
                yield client
            except Exception as error:  # the caller's, to leave here as it came: not in a group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
    finally:
        client.close()


async def _connect(sock: socket.socket, path: str | os.PathLike[str]) -> None:
    with trio.move_on_after(HANDSHAKE_SECONDS):
        while True:
            try:
                sock.connect(os.fspath(path))
            except BlockingIOError:  # its backlog is full; there is nothing to wait on
                await trio.sleep(0.05)
                continue
            except OSError as error:
                raise HostError(
                    f"cannot connect to {os.fspath(path)}: {error.strerror}; "
                    "is a server listening there?",
                    exit_code=os.EX_UNAVAILABLE,
                ) from None
            return
    raise HostError(
        f"cannot connect to {os.fspath(path)}: too many others wait there",
        exit_code=os.EX_UNAVAILABLE,
    )


def _twin_endpoint(fd: int) -> Endpoint:
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        os.close(fd)
        raise ConnectionLost(f"the twin socket is none: {error.strerror}") from None
    return Endpoint(sock)


@contextlib.contextmanager
def _closing(fds: list[int]) -> Iterator[list[int]]:
    """Close what is left in `fds` in the end."""
    try:
        yield fds
    finally:
        close_fds(fds)

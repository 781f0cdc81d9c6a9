"""Guest memory by messages: VFIO_USER_DMA_READ and VFIO_USER_DMA_WRITE, from us to the client.

What QEMU needs of it: pieces of at most REMOTE_DMA_CHUNK, because it truncates replies that do not
fit its socket buffer; one piece in flight at a time, for the same reason; and never a wait for a
reply while the client waits for one of ours, because QEMU holds its big lock until it comes.  The
last is a rule for devices (`vfio_user_virtio.device`); a device that breaks it is told at once
instead of stalling its guest for REMOTE_DMA_SECONDS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from vfio_user_virtio.errors import ConnectionLost
from vfio_user_virtio.limits import REMOTE_DMA_CHUNK, REMOTE_DMA_SECONDS
from vfio_user_virtio.protocol.dma import (
    decode_dma_read_reply_untrusted,
    decode_dma_write_reply_untrusted,
    encode_dma_read_request,
    encode_dma_write_request,
)
from vfio_user_virtio.protocol.header import Command

if TYPE_CHECKING:
    from vfio_user_virtio.transport.requests import Requests


class ClientMemory:
    """`vfio_user_virtio.device.RemoteMemory` over `requests`.

    `max_count` is the client's max_data_xfer_size.  The task that makes it is the one that answers
    the client, and may not use it.
    """

    def __init__(self, requests: Requests, max_count: int) -> None:
        self._requests = requests
        self._chunk = min(REMOTE_DMA_CHUNK, max_count)
        self._one_at_a_time = trio.Lock()
        self._answering = trio.lowlevel.current_task()

    async def dma_read(self, iova: int, count: int) -> bytes:
        pieces = []
        for offset in range(0, count, self._chunk):
            size = min(self._chunk, count - offset)
            payload = encode_dma_read_request(iova + offset, size)
            reply = await self._request(Command.DMA_READ, payload)
            pieces.append(decode_dma_read_reply_untrusted(reply, size))
        return b"".join(pieces)

    async def dma_write(self, iova: int, data: bytes) -> None:
        view = memoryview(data)
        for offset in range(0, len(data), self._chunk):
            piece = view[offset : offset + self._chunk]
            payload = encode_dma_write_request(iova + offset, piece)
            reply = await self._request(Command.DMA_WRITE, payload)
            decode_dma_write_reply_untrusted(reply, len(piece))

    async def _request(self, command: Command, payload: bytes) -> bytes:
        if trio.lowlevel.current_task() is self._answering:
            raise RuntimeError(
                f"{command.name} inside a command of the client would wait for ever: the client "
                "answers when it has its reply; do it in Device.serve"
            )
        async with self._one_at_a_time:
            with trio.move_on_after(REMOTE_DMA_SECONDS):
                return await self._requests.request(command, payload)
        raise ConnectionLost(f"no reply to {command.name} within {REMOTE_DMA_SECONDS:g} s")

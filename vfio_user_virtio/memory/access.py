"""Reading and writing guest memory wherever it is: the slow path.

Why: mappings without an fd (ROM, private memory, another device's BAR) can be reached only by
messages to the client, and a ring or buffer may lie in one, or across several.  What is mapped is
copied to and from views, the rest travels as DMA_READ and DMA_WRITE, so callers need not tell.

Nothing here may be awaited inside a `Device` call that the client waits for; see
`vfio_user_virtio.device.RemoteMemory`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_user_virtio.device import RemoteMemory
    from vfio_user_virtio.memory.guest_memory import GuestMemory, MappedRange, Piece


class GuestAccess:
    """Guest memory as `read` and `write`, whether it came with an fd or not.

    The mappings may change while a message is under way, so each piece is looked up when its turn
    comes.  `count` and the length of `data` are bytes, and the caller's to bound: the range is
    checked before anything is copied, but a client may map as much as it likes without an fd.

    `written(iova, size)` is told of each piece after it was written, and of one whose writing
    failed or was cancelled, since it may have been written all the same.
    """

    def __init__(
        self,
        memory: GuestMemory,
        remote: RemoteMemory,
        written: Callable[[int, int], None] | None = None,
    ) -> None:
        self._memory = memory
        self._remote = remote
        self._written = written

    def mappings(self) -> list[MappedRange]:
        """What is mapped, in the order of addresses."""
        return self._memory.mappings()

    async def read(self, iova: int, count: int) -> bytes:
        """The `count` bytes at `iova`.

        Raises DriverError if a byte is not mapped for reading, RemoteError if the client refuses
        a message, ConnectionLost if it is gone.
        """
        result = bytearray()
        while len(result) < count:
            piece = self._first(iova + len(result), count - len(result), write=False)
            if piece.memory is not None:
                result += piece.memory
            else:
                result += await self._remote.dma_read(piece.iova, piece.size)
        return bytes(result)

    async def write(self, iova: int, data: bytes | memoryview) -> None:
        """Write `data` at `iova`; errors as `read`.

        Nothing is written if a byte of the range is not mapped for writing when the call begins.
        """
        rest = memoryview(data).cast("B")
        while rest:
            piece = self._first(iova, len(rest), write=True)
            try:
                if piece.memory is not None:
                    piece.memory[:] = rest[: piece.size]
                else:
                    await self._remote.dma_write(piece.iova, bytes(rest[: piece.size]))
            finally:
                if self._written is not None:
                    self._written(piece.iova, piece.size)
            iova += piece.size
            rest = rest[piece.size :]

    def _first(self, iova: int, size: int, *, write: bool) -> Piece:
        """The first piece of the range, all of which is checked."""
        return self._memory.pieces(iova, size, write=write)[0]

"""Guest memory as libvfio-user gives it out: scatter-gather lists.

A range of guest addresses may lie in several regions, each mapped elsewhere, or not at all.  A list
is valid from its making until the device is next asked to quiesce: then the client may take memory
away, and the library would follow a pointer into nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.libvfio_user.declarations import DIRECT_ACCESS, Protection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_user_virtio.libvfio_user.context import Context
    from vfio_user_virtio.libvfio_user.library import Native

_USUAL: Final = 4
"""Pieces that are asked for at first."""


class ScatterList:
    """See the module head; made by `Context.scatter`.  `size` in bytes, `pieces` of it."""

    def __init__(self, context: Context, iova: int, size: int, protection: Protection) -> None:
        self._ffi, self._lib = context.library.ffi, context.library.lib
        self._context = context
        self._sg_size = context.library.sg_size
        self.size = size
        self.protection = protection
        address = self._ffi.cast("void *", iova)
        room = _USUAL
        while True:
            self._memory = self._ffi.new("char[]", room * self._sg_size)
            self._list = self._ffi.cast("dma_sg_t *", self._memory)
            found = self._lib.vfu_addr_to_sgl(
                context.handle, address, size, self._list, room, protection
            )
            if found >= 0:
                self.pieces: int = found
                return
            if found == -1:
                raise self._error(f"vfu_addr_to_sgl: {size} bytes at {iova:#x}")
            room = -found - 1

    @property
    def is_mappable(self) -> bool:
        """Whether `map` can be used; `read` and `write` always can, if there is one piece."""
        return all(
            self._lib.vfu_sg_is_mappable(self._context.handle, self._piece(number))
            for number in range(self.pieces)
        )

    @contextlib.contextmanager
    def map(self) -> Iterator[list[memoryview]]:
        """The memory itself, one memoryview for each piece; read-only unless asked for writing.

        In the end it is marked dirty, if it was asked for writing.
        """
        vectors = self._ffi.new("struct iovec[]", self.pieces)
        handle = self._context.handle
        if self._lib.vfu_sgl_get(handle, self._list, vectors, self.pieces, 0) < 0:
            raise self._error("vfu_sgl_get")
        views = [
            memoryview(self._ffi.buffer(vector.iov_base, vector.iov_len)).cast("B")
            for vector in vectors
        ]
        if not self.protection & Protection.WRITE:
            views = [view.toreadonly() for view in views]
        try:
            yield views
        finally:
            for view in views:
                view.release()
            self._lib.vfu_sgl_put(handle, self._list, vectors, self.pieces)

    def mark_dirty(self) -> None:
        """Mark it as written, for a device that keeps it mapped; needs WRITE and a mapping."""
        if not self.is_mappable:
            raise OSError(errno.EFAULT, "memory that is not mapped cannot be marked dirty")
        self._lib.vfu_sgl_mark_dirty(self._context.handle, self._list, self.pieces)

    def read(self, *, direct: bool = True) -> bytes:
        """Read it whole.

        Not `direct`, or where the client gave no descriptor: by a message to the client, whose
        reply is waited for.  A client that sends a command meanwhile breaks the session, unless it
        negotiated a twin socket.
        """
        if direct and self.is_mappable:
            with self.map() as pieces:
                return b"".join(pieces)
        data = self._ffi.new("char[]", self.size)
        flags = DIRECT_ACCESS if direct else 0
        result = self._lib.vfu_sgl_read(self._context.handle, self._list, self.pieces, data, flags)
        if result < 0:
            raise self._error("vfu_sgl_read")
        return bytes(self._ffi.buffer(data, self.size))

    def write(self, data: bytes, *, direct: bool = True) -> None:
        """Write it whole, see `read`."""
        if len(data) != self.size:
            raise ValueError(f"{len(data)} bytes are not the {self.size} of the list")
        if direct and self.is_mappable:
            if not self.protection & Protection.WRITE:
                raise OSError(errno.EPERM, "the list was not asked for writing")
            with self.map() as pieces:
                for piece in pieces:
                    piece[:], data = data[: len(piece)], data[len(piece) :]
            return
        flags = DIRECT_ACCESS if direct else 0
        source = self._ffi.from_buffer(data)
        result = self._lib.vfu_sgl_write(
            self._context.handle, self._list, self.pieces, source, flags
        )
        if result < 0:
            raise self._error("vfu_sgl_write")

    def _piece(self, number: int) -> Native:
        offset = self._ffi.cast("char *", self._list) + number * self._sg_size
        return self._ffi.cast("dma_sg_t *", offset)

    def _error(self, what: str) -> OSError:
        code = self._ffi.errno
        return OSError(code, f"{what}: {os.strerror(code)}")

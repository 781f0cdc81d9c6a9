"""Lines out of a byte stream: what QEMU's monitor and its test protocol have in common."""

from __future__ import annotations

from typing import Final

from vfio_user_virtio_server.vm.errors import QemuError

MAX_LINE: Final = 16 << 20
"""Bytes of one line.  The longest that QEMU sends are some 100 KiB (`query-qmp-schema`)."""


class LineDecoder:
    """Takes bytes as they come, gives lines as they are complete."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed_untrusted(self, data: bytes) -> list[bytes]:
        """The lines, without their ends, that are complete with `data`.

        Raises QemuError for a line without end.
        """
        self._buffer += data
        *lines, rest = self._buffer.split(b"\n")
        if len(rest) > MAX_LINE:
            raise QemuError(f"QEMU sent a line of more than {MAX_LINE} bytes")
        self._buffer = bytearray(rest)
        return [bytes(line).rstrip(b"\r") for line in lines]

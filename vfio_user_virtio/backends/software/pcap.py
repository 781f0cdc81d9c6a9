"""A capture of what passes at one port, as a pcapng file for tcpdump, tshark and wireshark.

pcapng rather than classic pcap, since it tells directions and the name of the port, at no cost.
Blocks used: Section Header, Interface Description with if_name, if_tsresol 9 and if_snaplen, and
Enhanced Packet with epb_flags; little-endian (draft-ietf-opsawg-pcapng).  Frames are recorded as
they stand at the port, without their virtio_net_hdr: unfinished ones show as large segments and
with partial checksums, just as on a Linux host.

Each record is one writev straight from where the frame is, unbuffered, so that what was captured
is in the file whatever happens next.  A capture is a debugging aid: when a write fails, or the
file has grown to its bound, it ends with one line in the log, and the port lives on.
"""

from __future__ import annotations

import logging
import os
import struct
import time
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.backends.software.ports import NET_HEADER_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_user_virtio.backends.software.ports import Buffer, Frame

_log = logging.getLogger(__name__)

DEFAULT_SNAP_LENGTH: Final = 262_144
"""tcpdump's own default: every frame whole."""

_LINKTYPE_ETHERNET: Final = 1
_SECTION: Final = struct.Struct("<IIIHHqI")
assert _SECTION.size == 28
_INTERFACE: Final = struct.Struct("<IIHHI")
assert _INTERFACE.size == 16
_PACKET: Final = struct.Struct("<IIIIIII")
assert _PACKET.size == 28
_PACKET_END: Final = struct.Struct("<HHIHHI")
assert _PACKET_END.size == 16
_OPTION: Final = struct.Struct("<HH")

_OPT_END: Final = b"\0\0\0\0"
_IF_NAME: Final = 2
_IF_TSRESOL: Final = 9
_EPB_FLAGS: Final = 2
_INBOUND: Final = 1
_OUTBOUND: Final = 2
_PADDING: Final = (b"", b"\0\0\0", b"\0\0", b"\0")


class Capture:
    """Records into `fd`, which must be open for writing, empty and blocking; it becomes ours.

    `snap_length`: bytes of each frame that are kept.  `max_size`: bytes of the file; None means no
    bound.  `clock`: nanoseconds since 1970.  Raises OSError if the file takes not even its headers.
    """

    def __init__(
        self,
        fd: int,
        port_name: str,
        *,
        snap_length: int = DEFAULT_SNAP_LENGTH,
        max_size: int | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        if snap_length < 1:
            raise ValueError(f"a snap length of {snap_length} keeps nothing; it must be 1 or more")
        self._fd = fd
        self._name = port_name
        self._snap_length = snap_length
        self._max_size = max_size
        self._clock = clock
        self._size = 0
        headers = _file_headers(port_name, snap_length)
        if os.write(fd, headers) != len(headers):
            raise OSError(f"the capture of {port_name} could not be begun: its file takes no more")
        self._size = len(headers)

    @property
    def is_open(self) -> bool:
        """Whether frames are still recorded."""
        return self._fd >= 0

    def record(self, frame: Frame, *, inbound: bool) -> None:
        """Record a frame; `inbound` is from the port into the switch."""
        if self._fd < 0:
            return
        size = sum(map(len, frame)) - NET_HEADER_SIZE
        kept = min(size, self._snap_length)
        padding = _PADDING[kept & 3]
        total = _PACKET.size + kept + len(padding) + _PACKET_END.size
        if self._max_size is not None and self._size + total > self._max_size:
            _log.info("capture of %s ended: it has reached its bound", self._name)
            self.close()
            return
        now = self._clock()
        block: list[Buffer] = [
            _PACKET.pack(6, total, 0, now >> 32, now & 0xFFFF_FFFF, kept, size),
            *_without_header(frame, kept),
            padding + _PACKET_END.pack(_EPB_FLAGS, 4, _flags(inbound), 0, 0, total),
        ]
        if len(block) > 1_000:  # more than one writev takes
            block = [b"".join(block)]
        try:
            written = os.writev(self._fd, block)
        except OSError as error:
            self._fail(str(error))
        else:
            self._size += written
            if written != total:
                self._cut(self._size - written)
                self._fail("the file takes no more")

    def close(self) -> None:
        """End the capture and close its file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _fail(self, reason: str) -> None:
        _log.warning("capture of %s ended: %s", self._name, reason)
        self.close()

    def _cut(self, size: int) -> None:
        """Take half a block off again, so that the file can be read; pipes do not care."""
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            _log.warning("the capture of %s ends in half a record: %s", self._name, error.strerror)


def _flags(inbound: bool) -> int:
    return _INBOUND if inbound else _OUTBOUND


def _without_header(frame: Frame, kept: int) -> list[Buffer]:
    """The first `kept` bytes of the Ethernet frame, as views."""
    parts: list[Buffer] = []
    skip = NET_HEADER_SIZE
    for part in frame:
        piece = memoryview(part)[skip : skip + kept]
        skip = max(0, skip - len(part))
        if len(piece):
            parts.append(piece)
            kept -= len(piece)
        if not kept:
            break
    return parts


def _file_headers(port_name: str, snap_length: int) -> bytes:
    section = _SECTION.pack(0x0A0D_0D0A, 28, 0x1A2B_3C4D, 1, 0, -1, 28)
    options = _option(_IF_NAME, port_name.encode()) + _option(_IF_TSRESOL, b"\x09") + _OPT_END
    total = _INTERFACE.size + len(options) + 4
    interface = _INTERFACE.pack(1, total, _LINKTYPE_ETHERNET, 0, snap_length)
    return section + interface + options + struct.pack("<I", total)


def _option(code: int, value: bytes) -> bytes:
    return _OPTION.pack(code, len(value)) + value + _PADDING[len(value) & 3]

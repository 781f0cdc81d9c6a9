"""Device parts end to end: the image of a device, as DEV_PARTS_GET gives it and DEV_PARTS_SET takes
it (virtio 1.4, Device parts).

An image is parts back to back, each a header (`virtio.part_header`) and a value, without padding
between them: behind a one-byte status everything stands on odd offsets.  Behind the last part there
may be zeros, since both buffers of a command are multiples of 8 bytes: fewer than 16, or an
all-zero header (type 0 with no value is no part) and nothing but zeros after it.

Whatever is wrong is a `PartsError`, one exception for bytes of a stream, of a driver and of a
device.  It is a `ClientError(EINVAL)` because that is what a session must answer to a stream that
does not fit; the owner of a device turns it into a status instead.  What the values mean is
`virtio.common_parts` and `virtio.net_parts`.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

import attrs

from vfio_user_virtio import limits
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.virtio.admin_commands import (
    COUNT_SIZE,
    decode_count_untrusted,
    encode_count,
)
from vfio_user_virtio.virtio.part_header import (
    NO_SELECTOR,
    PART_HEADER_SIZE,
    PartHeader,
    PartType,
    decode_part_header_untrusted,
    encode_part_header,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

_Blob = TypeVar("_Blob", bytes, bytearray)

END_OF_LIST: Final = bytes(PART_HEADER_SIZE)

KERNEL_JUNK_SIZE: Final = 8
"""What sources of Linux 6.13.0 to 6.15.2 append: they counted the 8 bytes of the status twice."""


class PartsError(ClientError):
    """A part, or what should be one, is wrong.  `part` is its name; `offset`, if it was found in an
    image, where its header is, in bytes."""

    def __init__(self, part: str, offset: int | None, message: str) -> None:
        where = part if offset is None else f"{part} at byte {offset}"
        super().__init__(errno.EINVAL, f"{where}: {message}")
        self.part = part
        self.offset = offset


@attrs.frozen
class Part:
    """One part; `offset` is where it was found, for messages, and does not count as different."""

    type: int
    value: bytes
    selector: bytes = NO_SELECTOR
    flags: int = 0
    reserved: int = 0
    offset: int | None = attrs.field(default=None, eq=False, kw_only=True)

    @property
    def header(self) -> PartHeader:
        return PartHeader(self.type, self.flags, self.selector, len(self.value), self.reserved)

    @property
    def name(self) -> str:
        return self.header.name

    def refuse(self, message: str) -> PartsError:
        """The error that says what is wrong with this part."""
        return PartsError(self.name, self.offset, message)

    def require_size(self, size: int) -> None:
        """Raises PartsError unless the value has exactly `size` bytes."""
        if len(self.value) != size:
            raise self.refuse(f"its value has {len(self.value)} bytes, not {size}")


def encode_parts(parts: Iterable[Part]) -> bytes:
    """The image of `parts`, in their order, without padding."""
    return b"".join(encode_part_header(part.header) + part.value for part in parts)


def image_size(parts: Iterable[Part]) -> int:
    """Bytes of the image of `parts`."""
    return sum(PART_HEADER_SIZE + len(part.value) for part in parts)


def parse_parts_untrusted(blob: bytes) -> list[Part]:
    """The parts of an image.  Values and order are not looked at.  Raises PartsError."""
    found, _ = _whole_untrusted(blob)
    return [
        Part(
            header.type,
            blob[start : start + header.length],
            header.selector,
            header.flags,
            header.reserved,
            offset=start - PART_HEADER_SIZE,
        )
        for header, start in found
    ]


def image_untrusted(blob: bytes | bytearray) -> memoryview:
    """`blob` without what follows its last part; nothing is copied.  Raises PartsError as
    `parse_parts_untrusted` does."""
    return memoryview(blob)[: _whole_untrusted(blob)[1]]


def strip_kernel_junk(blob: _Blob) -> tuple[_Blob, bool]:
    """`blob` without the bytes that Linux 6.13.0 to 6.15.2 append to an image, and whether any
    were there.

    They are exactly 8, with anything in them, behind the last part or behind the zeros with which
    the device filled its answer up to a multiple of 8.  Zeros are taken for them too: a device has
    no reason to write 8 of its own.  A blob that cannot be walked is returned as it is.
    """
    try:
        _, end = _walk_untrusted(blob)
    except PartsError:
        return blob, False
    rest = len(blob) - end
    padding = rest - KERNEL_JUNK_SIZE
    if padding in (0, -end % 8) and not any(blob[end : end + padding]):
        return blob[:-KERNEL_JUNK_SIZE], True
    return blob, False


_Found: TypeAlias = tuple[list[tuple[PartHeader, int]], int]
"""Headers, where their values start, and where the last value ends."""


def _whole_untrusted(blob: bytes | bytearray) -> _Found:
    """The parts of `blob`, which are all that is in it.  Raises PartsError."""
    found, end = _walk_untrusted(blob)
    if blob.count(0, end) != len(blob) - end:
        after = f"after {found[-1][0].name}" if found else "at the start"
        raise PartsError(
            "no part",
            end,
            f"the {len(blob) - end} bytes {after} are neither a part nor zeros",
        )
    return found, end


def _walk_untrusted(blob: bytes | bytearray) -> _Found:
    """The whole parts at the front of `blob`: they end at fewer bytes than a header has, or at a
    header of zeros.  Raises PartsError."""
    found: list[tuple[PartHeader, int]] = []
    offset = 0
    while len(blob) - offset >= PART_HEADER_SIZE and not blob.startswith(END_OF_LIST, offset):
        header = decode_part_header_untrusted(blob, offset)
        start = offset + PART_HEADER_SIZE
        if len(found) == limits.MAX_PARTS:
            raise PartsError(
                header.name, offset, f"an image may not have more than {limits.MAX_PARTS} parts"
            )
        if header.length > limits.MAX_PART_SIZE:
            raise PartsError(
                header.name,
                offset,
                f"its value has {header.length} bytes; the limit is {limits.MAX_PART_SIZE}",
            )
        if header.length > len(blob) - start:
            raise PartsError(
                header.name,
                offset,
                f"its value has {header.length} bytes, {len(blob) - start} are there",
            )
        found.append((header, start))
        offset = start + header.length
    return found, offset


# --- headers alone ------------------------------------------------------------------------------


def encode_headers(headers: Iterable[PartHeader]) -> bytes:
    """Headers end to end, as DEV_PARTS_GET takes them to select parts."""
    return b"".join(encode_part_header(header) for header in headers)


def decode_headers_untrusted(data: bytes) -> list[PartHeader]:
    """The whole headers in `data`, up to one of zeros.  Raises PartsError for too many."""
    headers: list[PartHeader] = []
    for offset in range(0, len(data) - PART_HEADER_SIZE + 1, PART_HEADER_SIZE):
        if data.startswith(END_OF_LIST, offset):
            break
        header = decode_part_header_untrusted(data, offset)
        if len(headers) == limits.MAX_PARTS:
            raise PartsError(
                header.name, offset, f"a list may not have more than {limits.MAX_PARTS} headers"
            )
        headers.append(header)
    return headers


def encode_part_list(headers: Iterable[PartHeader]) -> bytes:
    """The result of DEV_PARTS_METADATA_GET for LIST: count u32, 4 reserved, headers."""
    raw = encode_headers(headers)
    return encode_count(len(raw) // PART_HEADER_SIZE) + raw


def decode_part_list_untrusted(result: bytes) -> list[PartHeader]:
    """The headers in such a result.  Raises PartsError if it has fewer than it counts."""
    count = decode_count_untrusted(result)
    headers = result[COUNT_SIZE : COUNT_SIZE + PART_HEADER_SIZE * count]
    found = decode_headers_untrusted(headers)
    if len(found) != count:
        raise PartsError("the list of parts", None, f"it counts {count} and has {len(found)}")
    return found


# --- order --------------------------------------------------------------------------------------


def canonical(parts: Iterable[Part]) -> list[Part]:
    """`parts` in the order in which a device must give them and a driver must set them."""
    return sorted(parts, key=lambda part: part.header.key)


def first_out_of_order(parts: Iterable[Part]) -> Part | None:
    """The first common part that should have come before one that precedes it.

    Only what the standard demands: the order of the common types.  Device parts may be anywhere,
    and registers and queues in any order.
    """
    latest = 0
    for part in parts:
        if part.type in _ORDERED:
            if part.type < latest:
                return part
            latest = part.type
    return None


def first_repeated(parts: Iterable[Part]) -> Part | None:
    """The first part that is of the same thing as one before it."""
    seen: set[tuple[int, int]] = set()
    for part in parts:
        key = part.header.key
        if key in seen:
            return part
        seen.add(key)
    return None


_ORDERED: Final = frozenset(range(PartType.DEV_FEATURES, PartType.VQ_NOTIFY_CFG + 1))

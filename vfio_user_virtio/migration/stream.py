"""The migration stream: records, one after the other, byte for byte as Linux's vfio-virtio has it.

A record, little-endian:

- ``0`` u64 record_size: bytes of the payload
- ``8`` u32 flags: bit 0 says that a reader who does not know the tag may skip the record
- ``12`` u32 tag: 0 is device data, the device parts of one DEV_PARTS_GET(ALL) as they came
- ``16`` the payload

Nothing stands before, between or after records; the stream ends where the saving side says so.
Each record of device data is a complete image, and the last one counts, but every one is to be set
as it completes: that is what warms the target.

`StreamDecoder` is incremental, because the client may cut the stream anywhere.  Where Linux is weak
it differs: a record that may be skipped is skipped as it streams by, not stored; a size is bounded
before anything is stored; a stream that ends inside a record, or has no image, is refused.

Source: Linux, drivers/vfio/pci/virtio/migrate.c (the format), behaviour of 6.13 and newer.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio import limits
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.migration.private_record import PRIVATE_TAG

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfio_user_virtio.protocol.header import Buffer

RECORD_HEADER: Final = struct.Struct("<QII")
RECORD_HEADER_SIZE: Final = 16
assert RECORD_HEADER.size == RECORD_HEADER_SIZE

DEVICE_DATA: Final = 0
"""The tag of an image."""

MANDATORY: Final = 0
OPTIONAL: Final = 1
"""Flags: whoever does not know the tag must refuse the stream, or may skip the record."""


@attrs.frozen
class RecordHeader:
    """What stands before a payload of `record_size` bytes."""

    record_size: int
    flags: int = MANDATORY
    tag: int = DEVICE_DATA


@attrs.frozen
class Record:
    """A record whose tag we know, complete."""

    tag: int
    payload: bytearray


def encode_record_header(header: RecordHeader) -> bytes:
    return RECORD_HEADER.pack(header.record_size, header.flags, header.tag)


def encode_image(image: Buffer) -> bytes:
    """A record of device data; `image` is a result of DEV_PARTS_GET(ALL), without the status."""
    return encode_record_header(RecordHeader(len(image))) + image


def encode_private_record(payload: Buffer) -> bytes:
    """The record of ours, which belongs after an image; see `private_record`."""
    return encode_record_header(RecordHeader(len(payload), OPTIONAL, PRIVATE_TAG)) + payload


def decode_record_header_untrusted(data: Buffer, max_record_size: int) -> RecordHeader:
    """Decode the first 16 bytes of `data`.

    Raises ClientError: ENOMEM beyond `max_record_size`, EOPNOTSUPP for an unknown tag that may not
    be skipped, EINVAL for an image without a byte or a private record longer than its limit.
    """
    header = RecordHeader(*RECORD_HEADER.unpack_from(data))
    if header.record_size > max_record_size:
        raise ClientError(
            errno.ENOMEM,
            f"a record of {header.record_size} bytes (tag {header.tag:#x}) in the migration "
            f"stream; the limit is {max_record_size}, raise it if the source can be trusted",
        )
    if header.tag == DEVICE_DATA:
        if not header.record_size:
            raise ClientError(errno.EINVAL, "an image of 0 bytes in the migration stream")
    elif header.tag == PRIVATE_TAG:
        if header.record_size > limits.MAX_PRIVATE_RECORD:
            raise ClientError(
                errno.EINVAL,
                f"our record of the migration stream has {header.record_size} bytes, at most "
                f"{limits.MAX_PRIVATE_RECORD} are taken",
            )
    elif not header.flags & OPTIONAL:
        raise ClientError(
            errno.EOPNOTSUPP,
            f"a record with tag {header.tag:#x} in the migration stream, which is unknown here "
            "and may not be skipped; migrate to a server that knows it",
        )
    return header


class StreamDecoder:
    """Takes a stream apart, however it was cut.  One decoder is one stream.

    `taken`: bytes that came.  `images`: how many came whole.  `skipped`: how many records were
    skipped; `on_skip`, if there is one, is told the header of each when all of it has gone by.
    """

    def __init__(
        self,
        *,
        max_record_size: int = limits.MAX_MIGRATION_RECORD,
        on_skip: Callable[[RecordHeader], None] | None = None,
    ) -> None:
        self._max_record_size = max_record_size
        self._on_skip = on_skip
        self.taken = 0
        self.images = 0
        self.skipped = 0
        self._head = bytearray()
        self._header: RecordHeader | None = None
        self._payload = bytearray()
        self._left = 0
        """Bytes of the payload that are still to come."""
        self._failed: str | None = None

    def feed_untrusted(self, data: Buffer) -> Iterator[Record]:
        """Take the next bytes; give each image, and each record of ours, as it completes.

        `data` must stay as it is until the iterator is at its end.  An iterator that is left before
        its end leaves a stream that cannot be continued, which is right if setting an image failed.
        Raises ClientError: what `decode_record_header_untrusted` says, ENOMEM if there is no memory
        for a record, and ENODEV ever after.
        """
        self._check_sound()
        self.taken += len(data)
        self._failed = "its last piece was not taken to the end"
        return self._records_untrusted(memoryview(data))

    def finish_untrusted(self) -> None:
        """The stream is over.

        Raises ClientError: EINVAL if it ends inside a record or had no image, ENODEV as before.
        """
        self._check_sound()
        self._failed = "it is over"
        if self._head:
            raise ClientError(
                errno.EINVAL,
                f"the migration stream ends {len(self._head)} bytes into the header of a record, "
                "or has trailing data; start the migration anew",
            )
        if self._header is not None:
            raise ClientError(
                errno.EINVAL,
                f"the migration stream ends {self._left} bytes before the end of a record of "
                f"{self._header.record_size}; start the migration anew",
            )
        if not self.images:
            raise ClientError(errno.EINVAL, "the migration stream has no image of the device")

    def _check_sound(self) -> None:
        if self._failed is not None:
            raise ClientError(
                errno.ENODEV, f"the migration stream cannot be continued: {self._failed}"
            )

    def _records_untrusted(self, data: memoryview) -> Iterator[Record]:
        while data:
            if self._header is None:
                data = self._take_header_untrusted(data)
            else:
                data = self._take_payload(self._header, data)
            if self._header is not None and not self._left:
                yield from self._complete(self._header)
        self._failed = None

    def _take_header_untrusted(self, data: memoryview) -> memoryview:
        wanted = RECORD_HEADER_SIZE - len(self._head)
        self._head += data[:wanted]
        if len(self._head) == RECORD_HEADER_SIZE:
            try:
                header = decode_record_header_untrusted(self._head, self._max_record_size)
            except ClientError as error:
                self._failed = str(error)
                raise
            self._head.clear()
            self._header = header
            self._left = header.record_size
        return data[wanted:]

    def _take_payload(self, header: RecordHeader, data: memoryview) -> memoryview:
        piece = data[: self._left]
        if header.tag in _KNOWN_TAGS:
            try:
                self._payload += piece
            except MemoryError:
                self._payload = bytearray()
                self._failed = f"there was no memory for a record of {header.record_size} bytes"
                raise ClientError(errno.ENOMEM, f"the migration stream: {self._failed}") from None
        self._left -= len(piece)
        return data[len(piece) :]

    def _complete(self, header: RecordHeader) -> Iterator[Record]:
        self._header = None
        if header.tag not in _KNOWN_TAGS:
            self.skipped += 1
            if self._on_skip is not None:
                self._on_skip(header)
            return
        payload, self._payload = self._payload, bytearray()
        self.images += header.tag == DEVICE_DATA
        yield Record(header.tag, payload)


_KNOWN_TAGS: Final = frozenset({DEVICE_DATA, PRIVATE_TAG})

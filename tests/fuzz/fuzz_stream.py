"""Any migration stream, cut anyhow: the records that a naive reader finds, or its refusal.

That is: `StreamDecoder` raises nothing but ClientError, gives the same records and the same errno
however the stream is cut, stays bad after an error, and what it accepts it accepts again after
having been encoded anew.

Run it with ``python -m tests.fuzz.fuzz_stream -max_total_time=60`` (atheris, libFuzzer's options);
the tests run `one_input` on hypothesis' bytes.

Input: a byte n, then n lengths of pieces (0…255 bytes), then the stream; what the lengths leave
over is the last piece.
"""

from __future__ import annotations

import errno
import importlib
import struct
import sys
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.limits import MAX_PRIVATE_RECORD
from vfio_user_virtio.migration.private_record import (
    PRIVATE_TAG,
    decode_private_untrusted,
    encode_private,
)
from vfio_user_virtio.migration.stream import StreamDecoder, encode_image, encode_private_record

if TYPE_CHECKING:
    from collections.abc import Iterator

Records = list[tuple[int, bytes]]

MAX_RECORD: Final = MAX_PRIVATE_RECORD + 256


def expected(stream: bytes) -> tuple[Records, int]:
    """What the stream holds, and the errno that ends it, 0 if none; from the format's text."""
    records: Records = []
    while stream:
        if len(stream) < 16:
            return records, errno.EINVAL
        size, flags, tag = struct.unpack("<QII", stream[:16])
        payload, stream = stream[16 : 16 + size], stream[16 + size :]
        if size > MAX_RECORD:
            return records, errno.ENOMEM
        if (tag == 0 and size == 0) or (tag == PRIVATE_TAG and size > MAX_PRIVATE_RECORD):
            return records, errno.EINVAL
        if tag not in (0, PRIVATE_TAG) and not flags & 1:
            return records, errno.EOPNOTSUPP
        if len(payload) < size:
            return records, errno.EINVAL
        if tag in (0, PRIVATE_TAG):
            records.append((tag, payload))
    return records, 0 if any(tag == 0 for tag, _ in records) else errno.EINVAL


def found(pieces: list[bytes]) -> tuple[Records, int]:
    decoder = StreamDecoder(max_record_size=MAX_RECORD)
    records: Records = []
    try:
        for piece in pieces:
            for record in decoder.feed_untrusted(piece):
                records.append((record.tag, bytes(record.payload)))
        decoder.finish_untrusted()
    except ClientError as error:
        assert after_an_error(decoder) == errno.ENODEV, "a stream that failed stays bad"
        return records, error.errno
    return records, 0


def after_an_error(decoder: StreamDecoder) -> int:
    try:
        list(decoder.feed_untrusted(b""))
    except ClientError as error:
        return error.errno
    return 0


def check_private(payload: bytes) -> None:
    try:
        state, _ = decode_private_untrusted(payload)
    except ClientError:
        return
    assert decode_private_untrusted(encode_private(state)) == (state, ())


def encoded(records: Records) -> Iterator[bytes]:
    for tag, payload in records:
        yield encode_private_record(payload) if tag == PRIVATE_TAG else encode_image(payload)


def one_input(data: bytes) -> None:
    """One run of the fuzz target.  AssertionError or any other exception is a finding."""
    count = data[0] if data else 0
    lengths, stream = data[1 : 1 + count], data[1 + count :]
    pieces: list[bytes] = []
    position = 0
    for length in lengths:
        pieces.append(stream[position : position + length])
        position += length
    pieces.append(stream[position:])
    outcome = found(pieces)
    assert outcome == expected(stream)
    assert outcome == found([stream])
    records, error = outcome
    if not error:
        assert found(list(encoded(records))) == outcome
    for tag, payload in records:
        if tag == PRIVATE_TAG:
            check_private(payload)


def main() -> None:
    atheris = importlib.import_module("atheris")  # has no types, and is not there on Python 3.14
    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

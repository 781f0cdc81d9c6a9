"""Any transfer stream, cut anyhow: the frames that a naive reader finds, or a refusal.

That is: `FrameReader` raises nothing but ConnectionLost, gives the same frames and the same refusal
however the stream is cut, stays bad after an error, keeps no more than a frame, and what it gives
it gives again after having been encoded anew.

Run it with ``python -m tests.fuzz.fuzz_transfer -max_total_time=60`` (atheris, with
libFuzzer's options); the tests run `one_input` on hypothesis' bytes.

Input: a byte whose bit 0 is the direction and whose bit 1 says that each frame of the stream is
written properly (see `mended`); a byte n, then n lengths of pieces (0…255 bytes), then the stream;
what the lengths leave over is the last piece.
"""

from __future__ import annotations

import importlib
import struct
import sys
import zlib
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.errors import ConnectionLost
from vfio_user_virtio.limits import MAX_TRANSFER_PAYLOAD
from vfio_user_virtio.migration.transfer_frames import encode_frame
from vfio_user_virtio.migration.transfer_stream import BACKWARD, FORWARD, MAGIC, FrameReader

if TYPE_CHECKING:
    from vfio_user_virtio.migration.transfer_frames import Frame

HEADER: Final = 20
_MAX_KEPT: Final = 300 + MAX_TRANSFER_PAYLOAD + HEADER


def mended(stream: bytes) -> bytes:
    """`stream` with its magic number, and each header's numbers and checksums as they should be.

    Otherwise no fuzzer gets past the first checksum.  A frame is a byte of kind, one of size, and
    that much payload.
    """
    found, sequence, position = bytearray(MAGIC), 0, 0
    while position + 2 <= len(stream):
        kind, size = stream[position], stream[position + 1]
        payload = stream[position + 2 : position + 2 + size]
        head = struct.pack("<HHIII", kind, 0, size, sequence, zlib.crc32(payload))
        found += head + struct.pack("<I", zlib.crc32(head)) + payload
        sequence += 1
        position += 2 + size
    return bytes(found)


def whole_frames(stream: bytes) -> int:
    """How many frames begin and end properly, whatever they say; from the format's text."""
    if not stream.startswith(MAGIC):
        return 0
    count, position = 0, len(MAGIC)
    while position + HEADER <= len(stream):
        head = stream[position : position + HEADER]
        _, reserved, size, sequence, checksum, own = struct.unpack("<HHIIII", head)
        payload = stream[position + HEADER : position + HEADER + size]
        if (
            zlib.crc32(head[:16]) != own
            or reserved
            or sequence != count
            or size > MAX_TRANSFER_PAYLOAD
            or len(payload) < size
            or zlib.crc32(payload) != checksum
        ):
            break
        count += 1
        position += HEADER + size
    return count


def found(pieces: list[bytes], *, backward: bool) -> tuple[list[Frame], str, FrameReader]:
    """The frames, and why it ended there."""
    reader = FrameReader(BACKWARD if backward else FORWARD)
    frames: list[Frame] = []
    try:
        for piece in pieces:
            frames += reader.feed_untrusted(piece)
            assert len(reader._buffer) <= _MAX_KEPT, "it keeps what it need not"
        reader.finish_untrusted()
    except ConnectionLost as error:
        assert stays_bad(reader), "a stream that failed stays bad"
        return frames, str(error), reader
    return frames, "", reader


def reason(why: str) -> str:
    """Without the beginning of what is no stream, of which as much is shown as there is."""
    return why.partition(" it begins with ")[0]


def stays_bad(reader: FrameReader) -> bool:
    try:
        list(reader.feed_untrusted(b""))
    except ConnectionLost:
        return True
    return False


def one_input(data: bytes) -> None:
    """One run of the fuzz target.  AssertionError or any other exception is a finding."""
    flags, count = (*data[:2], 0, 0)[:2]
    lengths, stream = data[2 : 2 + count], data[2 + count :]
    if flags & 2:
        stream = mended(stream)
    backward = bool(flags & 1)
    pieces: list[bytes] = []
    position = 0
    for length in lengths:
        pieces.append(stream[position : position + length])
        position += length
    pieces.append(stream[position:])
    frames, why, reader = found(pieces, backward=backward)
    again, why_again, _ = found([bytes((byte,)) for byte in stream[:2000]], backward=backward)
    if len(stream) <= 2000:
        assert (frames, reason(why)) == (again, reason(why_again))
    assert len(frames) <= reader.sequence <= whole_frames(stream)
    if not why:
        assert reader.sequence == whole_frames(stream)
    if len(frames) == reader.sequence:  # none was skipped
        encoded = [encode_frame(frame, number) for number, frame in enumerate(frames)]
        assert found([MAGIC, *encoded], backward=backward)[0] == frames


def main() -> None:
    atheris = importlib.import_module("atheris")  # has no types, and is not there on Python 3.14
    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""The stream decoder on golden streams, on every way to cut and to break one, against a model."""

from __future__ import annotations

import errno
import tracemalloc
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.migration.golden_streams import FOLDER, NAMES, golden
from vfio_user_virtio import limits
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.migration.private_record import PRIVATE_TAG
from vfio_user_virtio.migration.stream import (
    DEVICE_DATA,
    OPTIONAL,
    RECORD_HEADER_SIZE,
    Record,
    RecordHeader,
    StreamDecoder,
    decode_record_header_untrusted,
    encode_image,
    encode_private_record,
    encode_record_header,
)

STATUS_PART: Final = bytes.fromhex("03010000 0000000000000000 01000000 0f")
UNKNOWN: Final = 0x1234_5678


def promisc_part(value: int) -> bytes:
    return bytes.fromhex("00020000 0000000000000000 01000000") + bytes((value,))


def feed(decoder: StreamDecoder, *pieces: bytes) -> list[Record]:
    return [record for piece in pieces for record in decoder.feed_untrusted(piece)]


def read(stream: bytes, *, max_record_size: int = 4096) -> list[Record]:
    return feed_and_finish(StreamDecoder(max_record_size=max_record_size), stream)


def record(tag: int, payload: bytes, flags: int = 0) -> bytes:
    return encode_record_header(RecordHeader(len(payload), flags, tag)) + payload


def refusal(decoder: StreamDecoder, *pieces: bytes) -> ClientError:
    """The error of taking `pieces`, else of the end."""
    with pytest.raises(ClientError) as caught:
        feed_and_finish(decoder, *pieces)
    return caught.value


def feed_and_finish(decoder: StreamDecoder, *pieces: bytes) -> list[Record]:
    records = feed(decoder, *pieces)
    decoder.finish_untrusted()
    return records


def test_golden_files_are_all_described() -> None:
    readme = (FOLDER / "README.md").read_text()
    assert [name for name in NAMES if f"| `{name}.hex` |" not in readme] == []
    assert readme.count(".hex` |") == len(NAMES)


def test_golden_image_both_ways() -> None:
    stream = golden("image")
    (found,) = read(stream)
    assert found.tag == DEVICE_DATA
    assert found.payload == stream[RECORD_HEADER_SIZE:]
    assert encode_image(found.payload) == stream


def test_golden_pre_copy_both_ways() -> None:
    images = [promisc_part(0), promisc_part(1), STATUS_PART + promisc_part(0)]
    assert [found.payload for found in read(golden("pre_copy"))] == images
    assert b"".join(map(encode_image, images)) == golden("pre_copy")


def test_golden_image_with_bytes_too_many_is_given_as_it_came() -> None:
    (found,) = read(golden("kernel_6_13"))
    assert found.payload == STATUS_PART + b"Z" * 8


def test_golden_optional_records_are_skipped() -> None:
    decoder = StreamDecoder()
    (found,) = feed(decoder, golden("optional"))
    decoder.finish_untrusted()
    assert found == Record(DEVICE_DATA, bytearray(STATUS_PART))
    assert (decoder.images, decoder.skipped) == (1, 2)


def test_golden_mandatory_record_is_refused_after_the_image() -> None:
    decoder = StreamDecoder()
    pieces = decoder.feed_untrusted(golden("mandatory"))
    assert next(pieces).payload == STATUS_PART
    with pytest.raises(ClientError, match="tag 0x12345678") as caught:
        next(pieces)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_golden_private_record_both_ways() -> None:
    image, ours = read(golden("private"))
    assert (image.tag, ours.tag) == (DEVICE_DATA, PRIVATE_TAG)
    stream = encode_image(image.payload) + encode_private_record(ours.payload)
    assert stream == golden("private")


@pytest.mark.parametrize("name", ["image", "pre_copy", "kernel_6_13", "optional", "private"])
def test_truncation_at_every_offset(name: str) -> None:
    stream = golden(name)
    ends = {0}
    while max(ends) < len(stream):
        size = decode_record_header_untrusted(stream[max(ends) :], len(stream)).record_size
        ends.add(max(ends) + RECORD_HEADER_SIZE + size)
    for length in range(len(stream)):
        decoder = StreamDecoder()
        records = feed(decoder, stream[:length])
        if length in ends and records:
            decoder.finish_untrusted()
        else:
            with pytest.raises(ClientError) as caught:
                decoder.finish_untrusted()
            assert caught.value.errno == errno.EINVAL


def test_bytes_behind_the_last_record_are_refused() -> None:
    error = refusal(StreamDecoder(), golden("image") + bytes(8))
    assert error.errno == errno.EINVAL
    assert "trailing data" in str(error)


def test_a_stream_without_an_image_is_refused() -> None:
    for stream in (b"", record(UNKNOWN, b"hello", OPTIONAL), record(PRIVATE_TAG, b"", OPTIONAL)):
        error = refusal(StreamDecoder(), stream)
        assert error.errno == errno.EINVAL
        assert "no image" in str(error)


def test_an_empty_image_is_refused() -> None:
    assert refusal(StreamDecoder(), record(DEVICE_DATA, b"")).errno == errno.EINVAL


def test_a_finished_stream_takes_no_more() -> None:
    decoder = StreamDecoder()
    feed(decoder, golden("image"))
    decoder.finish_untrusted()
    assert refusal(decoder, golden("image")).errno == errno.ENODEV


@pytest.mark.parametrize("size", [17, 1 << 32, (1 << 32) - 8, (1 << 64) - 1])
@pytest.mark.parametrize("flags", [0, OPTIONAL])
@pytest.mark.parametrize("tag", [DEVICE_DATA, PRIVATE_TAG, UNKNOWN])
def test_a_record_beyond_the_limit_is_refused_by_its_header(
    size: int, flags: int, tag: int
) -> None:
    decoder = StreamDecoder(max_record_size=16)
    error = refusal(decoder, encode_record_header(RecordHeader(size, flags, tag)))
    assert error.errno == errno.ENOMEM
    assert f"{size} bytes" in str(error)
    assert "the limit is 16" in str(error)


def test_the_limit_itself_is_allowed() -> None:
    (found,) = read(record(DEVICE_DATA, b"x" * 16), max_record_size=16)
    assert found.payload == b"x" * 16
    header = encode_record_header(RecordHeader(limits.MAX_MIGRATION_RECORD))
    assert feed(StreamDecoder(), header) == []


def test_a_private_record_has_a_limit_of_its_own() -> None:
    longest = bytes(limits.MAX_PRIVATE_RECORD)
    stream = golden("image") + record(PRIVATE_TAG, longest, OPTIONAL)
    assert read(stream, max_record_size=1 << 20)[1].payload == longest
    error = refusal(StreamDecoder(), record(PRIVATE_TAG, longest + b"x", OPTIONAL))
    assert error.errno == errno.EINVAL


def test_after_an_error_the_stream_stays_bad() -> None:
    decoder = StreamDecoder()
    assert refusal(decoder, record(UNKNOWN, b"")).errno == errno.EOPNOTSUPP
    for piece in (b"", golden("image")):
        error = refusal(decoder, piece)
        assert error.errno == errno.ENODEV
        assert "tag 0x12345678" in str(error), "the first reason is kept"
    with pytest.raises(ClientError) as caught:
        decoder.finish_untrusted()
    assert caught.value.errno == errno.ENODEV


def test_a_piece_that_was_not_taken_to_its_end_ends_the_stream() -> None:
    for take in (0, 1):
        decoder = StreamDecoder()
        records = decoder.feed_untrusted(golden("pre_copy"))
        for _ in range(take):
            next(records)
        assert refusal(decoder, b"x").errno == errno.ENODEV


def test_what_may_be_skipped_is_not_stored() -> None:
    size = 1 << 24
    decoder = StreamDecoder()
    feed(decoder, encode_record_header(RecordHeader(size, OPTIONAL, UNKNOWN)))
    piece = bytes(1 << 16)
    tracemalloc.start()
    try:
        for _ in range(size // len(piece)):
            feed(decoder, piece)
        assert tracemalloc.get_traced_memory()[1] < len(piece)
    finally:
        tracemalloc.stop()
    assert decoder.skipped == 1


def test_a_size_that_is_announced_allocates_nothing() -> None:
    tracemalloc.start()
    try:
        decoder = StreamDecoder()
        feed(decoder, encode_record_header(RecordHeader(limits.MAX_MIGRATION_RECORD)))
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()
    assert decoder.images == 0


records = st.builds(
    record,
    st.sampled_from([DEVICE_DATA, DEVICE_DATA, PRIVATE_TAG, UNKNOWN]),
    st.binary(max_size=40),
    st.sampled_from([OPTIONAL, OPTIONAL, 0, 2, 3]),
)


@given(st.lists(records, max_size=5).map(b"".join), st.binary(max_size=20), st.data())
def test_any_segmentation_is_the_same(stream: bytes, tail: bytes, data: st.DataObject) -> None:
    stream += tail
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    pieces = [
        stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)
    ]
    whole = outcome([stream])
    assert outcome(pieces) == whole
    assert outcome([bytes((byte,)) for byte in stream]) == whole


def outcome(pieces: list[bytes]) -> tuple[list[tuple[int, bytes]], str, int, int]:
    """The records, the first error, and the counters."""
    decoder = StreamDecoder(max_record_size=64)
    found: list[tuple[int, bytes]] = []
    try:
        for piece in pieces:
            for one in decoder.feed_untrusted(piece):
                found.append((one.tag, bytes(one.payload)))  # noqa: PERF401 - one may raise
        decoder.finish_untrusted()
    except ClientError as error:
        return found, str(error), decoder.images, decoder.skipped
    return found, "", decoder.images, decoder.skipped

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.errors import ClientError, ConnectionLost
from vfio_user_virtio.limits import MAX_DATA_XFER_SIZE, MAX_WRITE_MULTI
from vfio_user_virtio.protocol.framing import Frame, FrameReader
from vfio_user_virtio.protocol.header import Command
from vfio_user_virtio.protocol.region import (
    REGION_ACCESS_SIZE,
    check_region_range,
    decode_region_read_reply_untrusted,
    decode_region_read_request_untrusted,
    decode_region_write_multi_reply_untrusted,
    decode_region_write_multi_request_untrusted,
    decode_region_write_reply_untrusted,
    decode_region_write_request_untrusted,
    encode_region_read_reply,
    encode_region_read_request,
    encode_region_write_multi_reply,
    encode_region_write_multi_request,
    encode_region_write_reply,
    encode_region_write_request,
)

u16 = st.integers(0, 0xFFFF)
u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
data = st.binary(max_size=64)


def framed(message: bytes) -> Frame:
    (frame,) = FrameReader().receive(message, [])
    return frame


@given(u64, u32, st.integers(0, MAX_DATA_XFER_SIZE))
def test_read_request_round_trip(offset: int, region: int, count: int) -> None:
    payload = encode_region_read_request(offset, region, count)
    assert decode_region_read_request_untrusted(payload) == (offset, region, count)


@given(u16, u64, u32, data)
def test_read_reply_round_trip(message_id: int, offset: int, region: int, content: bytes) -> None:
    frame = framed(encode_region_read_reply(message_id, offset, region, content))
    assert (frame.message_id, frame.command) == (message_id, Command.REGION_READ)
    assert frame.is_reply
    assert not frame.is_error
    assert frame.payload[:16] == encode_region_read_request(offset, region, len(content))
    assert decode_region_read_reply_untrusted(frame.payload, len(content)) == content


@given(u64, u32, data)
def test_write_request_round_trip(offset: int, region: int, content: bytes) -> None:
    payload = encode_region_write_request(offset, region, memoryview(content))
    assert decode_region_write_request_untrusted(payload) == (offset, region, len(content))
    assert payload[REGION_ACCESS_SIZE:] == content


@given(u16, u64, u32, u32)
def test_write_reply_round_trip(message_id: int, offset: int, region: int, count: int) -> None:
    frame = framed(encode_region_write_reply(message_id, offset, region, count))
    assert (frame.message_id, frame.command) == (message_id, Command.REGION_WRITE)
    assert frame.is_reply
    assert frame.payload == encode_region_read_request(offset, region, count)
    decode_region_write_reply_untrusted(frame.payload, count)


@pytest.mark.parametrize("payload", [b"", bytes(15), bytes(17)])
def test_read_request_of_wrong_length(payload: bytes) -> None:
    with pytest.raises(ClientError, match=f"payload of {len(payload)} bytes, not 16") as caught:
        decode_region_read_request_untrusted(payload)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"", "payload of 0 bytes, 16 are needed"),
        (bytes(15), "payload of 15 bytes"),
        (struct.pack("<QII", 0, 0, 4) + bytes(3), "of 4 bytes brings 3"),
        (struct.pack("<QII", 0, 0, 4) + bytes(5), "of 4 bytes brings 5"),
        (struct.pack("<QII", 0, 0, 0xFFFFFFFF), "of 4294967295 bytes brings 0"),
    ],
)
def test_write_request_of_wrong_length(payload: bytes, says: str) -> None:
    with pytest.raises(ClientError, match=says) as caught:
        decode_region_write_request_untrusted(payload)
    assert caught.value.errno == errno.EINVAL


def test_max_data_xfer_size() -> None:
    read = encode_region_read_request(0, 0, 9)
    assert decode_region_read_request_untrusted(read, 9) == (0, 0, 9)
    with pytest.raises(ClientError, match="READ of 9 bytes; max_data_xfer_size is 8") as caught:
        decode_region_read_request_untrusted(read, 8)
    assert caught.value.errno == errno.EINVAL
    write = encode_region_write_request(0, 0, bytes(9))
    assert decode_region_write_request_untrusted(write, 9) == (0, 0, 9)
    with pytest.raises(ClientError, match="WRITE of 9 bytes; max_data_xfer_size is 8") as caught:
        decode_region_write_request_untrusted(write, 8)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(("offset", "count"), [(0, 16), (15, 1), (16, 0), (0, 0)])
def test_inside_a_region(offset: int, count: int) -> None:
    check_region_range(offset, count, 16)


@pytest.mark.parametrize(("offset", "count"), [(0, 17), (16, 1), (17, 0), ((1 << 64) - 1, 2)])
def test_outside_a_region(offset: int, count: int) -> None:
    with pytest.raises(ClientError, match="not inside a region of 0x10 bytes") as caught:
        check_region_range(offset, count, 16)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        encode_region_read_request(0, 0, 4),
        encode_region_read_request(0, 0, 4) + bytes(5),
        encode_region_read_request(0, 0, 3) + bytes(4),
    ],
)
def test_bad_read_reply(payload: bytes) -> None:
    with pytest.raises(ConnectionLost, match="the reply to REGION_READ"):
        decode_region_read_reply_untrusted(payload, 4)


@pytest.mark.parametrize("payload", [b"", bytes(17), encode_region_read_request(0, 0, 3)])
def test_bad_write_reply(payload: bytes) -> None:
    with pytest.raises(ConnectionLost, match="the reply to REGION_WRITE"):
        decode_region_write_reply_untrusted(payload, 4)


@given(st.lists(st.tuples(u64, u32, st.binary(max_size=8)), max_size=5))
def test_write_multi_round_trip(writes: list[tuple[int, int, bytes]]) -> None:
    payload = encode_region_write_multi_request(writes)
    assert len(payload) == 8 + 24 * len(writes)
    assert decode_region_write_multi_request_untrusted(payload) == writes


def multi(wr_cnt: int, entries: int, count: int = 8) -> bytes:
    return struct.pack("<Q", wr_cnt) + struct.pack("<QII8s", 0, 0, count, b"") * entries


def test_write_multi_of_qemus_largest_size() -> None:
    payload = multi(MAX_WRITE_MULTI, MAX_WRITE_MULTI)
    assert len(payload) == 4808
    assert len(decode_region_write_multi_request_untrusted(payload)) == 200


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"", errno.EINVAL),
        (bytes(7), errno.EINVAL),
        (multi(2, 1), errno.EINVAL),
        (multi(0, 1), errno.EINVAL),
        (multi(1, 1)[:-1], errno.EINVAL),
        (multi(1 << 63, 1), errno.EINVAL),
        (multi((1 << 64) - 1, 0), errno.EINVAL),
        (multi(1, 1, count=9), errno.EINVAL),
        (multi(1, 1, count=0xFFFFFFFF), errno.EINVAL),
        (multi(201, 201), errno.E2BIG),
    ],
)
def test_bad_write_multi(payload: bytes, code: int) -> None:
    with pytest.raises(ClientError, match="REGION_WRITE_MULTI") as caught:
        decode_region_write_multi_request_untrusted(payload)
    assert caught.value.errno == code


def test_write_multi_reply() -> None:
    payload = encode_region_write_multi_reply(3)
    assert decode_region_write_multi_reply_untrusted(payload) == 3
    with pytest.raises(ConnectionLost, match="the reply to REGION_WRITE_MULTI"):
        decode_region_write_multi_reply_untrusted(payload + b"\0")

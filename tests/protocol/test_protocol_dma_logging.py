from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.device import U64_END, LoggingReport, LoggingStart
from vfio_user_virtio.errors import ClientError, ConnectionLost
from vfio_user_virtio.protocol.dma_logging import (
    decode_logging_report_reply_untrusted,
    decode_logging_report_untrusted,
    decode_logging_start_untrusted,
    encode_logging_report_reply,
    encode_logging_report_request,
    encode_logging_start,
    logging_report_reply_size,
)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int]:
    iova = draw(st.integers(0, U64_END - 1))
    return iova, min(draw(st.integers(1, U64_END - iova)), U64_END - 1)


@given(st.integers(0, 63), st.lists(ranges(), max_size=4))
def test_start_round_trip(shift: int, some: list[tuple[int, int]]) -> None:
    start = LoggingStart(1 << shift, tuple(some))
    assert decode_logging_start_untrusted(encode_logging_start(start)) == start


def start(page_size: int, num_ranges: int, *some: tuple[int, int]) -> bytes:
    head = struct.pack("<QII", page_size, num_ranges, 0)
    return head + b"".join(struct.pack("<QQ", *one) for one in some)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "payload of 0 bytes, 16 are needed"),
        (bytes(15), "payload of 15 bytes"),
        (start(0, 0), "page size 0,"),
        (start(3, 0), "page size 3,"),
        (start(4096, 2, (0, 1)), "of 2 ranges has 32 bytes"),
        (start(4096, 0, (0, 1)), "of 0 ranges has 32 bytes"),
        (start(4096, 0xFFFFFFFF), "of 4294967295 ranges has 16 bytes"),
        (start(4096, 1, (0, 0)), "0x0 bytes at 0x0 is empty"),
        (start(4096, 2, (0, 1), (U64_END - 1, 2)), "passes 2\\*\\*64"),
    ],
)
def test_bad_start(data: bytes, says: str) -> None:
    with pytest.raises(ClientError, match=says) as caught:
        decode_logging_start_untrusted(data)
    assert caught.value.errno == errno.EINVAL


REPORT = LoggingReport(0x100000, 65 * 4096, 4096)


def test_report_round_trip() -> None:
    data = encode_logging_report_request(REPORT)
    assert data == struct.pack("<QQQ", 0x100000, 65 * 4096, 4096)
    assert decode_logging_report_untrusted(data) == REPORT
    reply = encode_logging_report_reply(REPORT, bytes(range(16)))
    assert decode_logging_report_reply_untrusted(reply, REPORT) == bytes(range(16))
    assert logging_report_reply_size(REPORT) == len(reply)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "payload of 0 bytes, 24 are needed"),
        (bytes(23), "payload of 23 bytes"),
        (struct.pack("<QQQ", 0, 4096, 0), "page size 0,"),
        (struct.pack("<QQQ", 0, 4096, 6), "page size 6,"),
        (struct.pack("<QQQ", 0, 1 << 62, 4096), "ask for less"),
        (struct.pack("<QQQ", 0, 0, 4096), "is empty"),
        (struct.pack("<QQQ", U64_END - 1, 2, 4096), "passes 2\\*\\*64"),
    ],
)
def test_bad_report(data: bytes, says: str) -> None:
    with pytest.raises(ClientError, match=says) as caught:
        decode_logging_report_untrusted(data)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("length", "says"), [(23, "payload of 23"), (39, "not 16"), (41, "not 16")]
)
def test_bad_report_reply(length: int, says: str) -> None:
    with pytest.raises(ConnectionLost, match=says):
        decode_logging_report_reply_untrusted(bytes(length), REPORT)

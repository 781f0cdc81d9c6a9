from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.errors import ClientError, ConnectionLost
from vfio_user_virtio.protocol.region_io_fds import (
    IoFd,
    IoFdType,
    RegionIoFdsReply,
    RegionIoFdsRequest,
    decode_region_io_fds_reply_untrusted,
    decode_region_io_fds_request_untrusted,
    encode_region_io_fds_reply,
    encode_region_io_fds_request,
)

ENTRIES = [
    IoFd(0x3000, 4, 0, IoFdType.IOEVENTFD, flags=1, match=7),
    IoFd(0x4000, 4096, 1, IoFdType.IOREGIONFD, match=1 << 63),
]


@given(st.integers(0, 0xFFFFFFFF), st.integers(16, 0xFFFFFFFF))
def test_request_round_trip(index: int, argsz: int) -> None:
    payload = encode_region_io_fds_request(index, argsz)
    assert decode_region_io_fds_request_untrusted(payload) == RegionIoFdsRequest(index, argsz)


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (bytes(15), "payload of 15 bytes"),
        (struct.pack("<IIII", 15, 0, 0, 0), "argsz 15"),
        (struct.pack("<IIII", 16, 1, 0, 0), "flags 0x1 and count 0, both must be 0"),
        (struct.pack("<IIII", 16, 0, 0, 1), "flags 0x0 and count 1, both must be 0"),
    ],
)
def test_bad_request(payload: bytes, says: str) -> None:
    with pytest.raises(ClientError, match=says) as caught:
        decode_region_io_fds_request_untrusted(payload)
    assert caught.value.errno == errno.EINVAL


def test_reply_round_trip() -> None:
    payload = encode_region_io_fds_reply(RegionIoFdsRequest(2, 96), ENTRIES)
    assert len(payload) == 96
    assert decode_region_io_fds_reply_untrusted(payload, 2) == RegionIoFdsReply(
        96, 2, tuple(ENTRIES)
    )


def test_reply_that_exceeds_argsz_has_no_entries() -> None:
    payload = encode_region_io_fds_reply(RegionIoFdsRequest(2, 95), ENTRIES)
    assert len(payload) == 16
    assert decode_region_io_fds_reply_untrusted(payload, 0) == RegionIoFdsReply(96, 2, ())


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (bytes(15), "payload of 15 bytes"),
        (struct.pack("<IIII", 16, 0, 0, 1) + bytes(39), "counts 1 entries in 55 bytes"),
        (struct.pack("<IIII", 16, 0, 0, 0xFFFFFFFF), "counts 4294967295 entries"),
        (encode_region_io_fds_reply(RegionIoFdsRequest(0, 96), ENTRIES), "names fd 1 of 1"),
    ],
)
def test_bad_reply(payload: bytes, says: str) -> None:
    with pytest.raises(ConnectionLost, match=says):
        decode_region_io_fds_reply_untrusted(payload, 1)

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.device import RegionFlags, RegionInfo, SparseArea
from vfio_user_virtio.errors import ClientError, ConnectionLost
from vfio_user_virtio.protocol.region_info import (
    CAP_SPARSE_MMAP,
    CAP_TYPE,
    REGION_INFO,
    REGION_INFO_SIZE,
    RegionCapability,
    RegionInfoReply,
    RegionInfoRequest,
    decode_region_info_reply_untrusted,
    decode_region_info_request_untrusted,
    encode_region_info_reply,
    encode_region_info_request,
)

RW = RegionFlags.READ | RegionFlags.WRITE
MAPPED = RegionInfo(
    0x10000,
    RW | RegionFlags.MMAP,
    fd=33,
    fd_offset=0x20000,
    areas=(SparseArea(0x1000, 0x2000), SparseArea(0x8000, 0x8000)),
)
MAPPED_SIZE = REGION_INFO_SIZE + 16 + 2 * 16


@given(st.integers(0, 0xFFFFFFFF), st.integers(REGION_INFO_SIZE, 0xFFFFFFFF))
def test_request_round_trip(index: int, argsz: int) -> None:
    payload = encode_region_info_request(index, argsz)
    assert decode_region_info_request_untrusted(payload) == RegionInfoRequest(index, argsz)


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"", "payload of 0 bytes, 32 are needed"),
        (encode_region_info_request(0)[:31], "payload of 31 bytes"),
        (encode_region_info_request(0, 31), "argsz 31, at least 32"),
    ],
)
def test_bad_request(payload: bytes, says: str) -> None:
    with pytest.raises(ClientError, match=says) as caught:
        decode_region_info_request_untrusted(payload)
    assert caught.value.errno == errno.EINVAL


def test_plain_region() -> None:
    info = RegionInfo(4096, RW)
    payload, fds = encode_region_info_reply(RegionInfoRequest(7), info)
    assert (len(payload), fds) == (32, [])
    assert decode_region_info_reply_untrusted(payload) == RegionInfoReply(32, 7, info)


def test_absent_region() -> None:
    info = RegionInfo(0, RegionFlags(0))
    payload, _ = encode_region_info_reply(RegionInfoRequest(3), info)
    assert decode_region_info_reply_untrusted(payload).info == info


def test_whole_region_mapped_needs_no_capability() -> None:
    info = RegionInfo(4096, RW | RegionFlags.MMAP, fd=5)
    payload, fds = encode_region_info_reply(RegionInfoRequest(0), info)
    assert (len(payload), fds) == (32, [5])
    assert REGION_INFO.unpack(payload)[1] == 7


@pytest.mark.parametrize("argsz", [32, MAPPED_SIZE - 1])
def test_reply_that_exceeds_argsz_is_cut_and_claims_no_capabilities(argsz: int) -> None:
    payload, fds = encode_region_info_reply(RegionInfoRequest(0, argsz), MAPPED)
    assert REGION_INFO.unpack(payload) == (MAPPED_SIZE, 7, 0, 0, 0x10000, 0x20000)
    assert fds == []
    reply = decode_region_info_reply_untrusted(payload)
    assert reply.argsz == MAPPED_SIZE
    assert reply.info.areas == ()


def test_complete_reply() -> None:
    payload, fds = encode_region_info_reply(RegionInfoRequest(0, MAPPED_SIZE), MAPPED)
    assert fds == [33]
    assert len(payload) == MAPPED_SIZE
    assert REGION_INFO.unpack_from(payload) == (MAPPED_SIZE, 15, 0, 32, 0x10000, 0x20000)
    reply = decode_region_info_reply_untrusted(payload)
    assert reply.info == RegionInfo(MAPPED.size, MAPPED.flags, None, MAPPED.fd_offset, MAPPED.areas)


def test_the_device_cannot_claim_capabilities_it_has_not() -> None:
    info = RegionInfo(4096, RW | RegionFlags.CAPS)
    payload, _ = encode_region_info_reply(RegionInfoRequest(0), info)
    assert REGION_INFO.unpack(payload)[1] == RW


def test_chain_of_capabilities() -> None:
    kind = RegionCapability(CAP_TYPE, 1, struct.pack("<II", 3, 4))
    odd = RegionCapability(77, 2, b"odd")
    payload, _ = encode_region_info_reply(RegionInfoRequest(0, 4096), MAPPED, [kind, odd])
    reply = decode_region_info_reply_untrusted(payload)
    assert reply.info.areas == MAPPED.areas
    assert reply.capabilities == (kind, RegionCapability(77, 2, b"odd\0\0\0\0\0"))
    assert len(payload) == reply.argsz == MAPPED_SIZE + 16 + 16

    payload, _ = encode_region_info_reply(RegionInfoRequest(0, 4096), RegionInfo(1, RW), [odd])
    assert len(decode_region_info_reply_untrusted(payload).capabilities) == 1


def reply(cap_offset: int, chain: bytes, argsz: int = 4096) -> bytes:
    return REGION_INFO.pack(argsz, 15, 0, cap_offset, 4096, 0) + chain


SPARSE = struct.Struct("<HHIII")


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (bytes(31), "payload of 31 bytes"),
        (reply(0, b"", argsz=31), "argsz 31, not in 32…"),
        (reply(0, b"", argsz=0xFFFFFFFF), "argsz 4294967295, not in"),
        (reply(1, bytes(8)), "capability at 1, not between 32"),
        (reply(32, bytes(7)), "capability at 32, not between 32 and the end at 39"),
        (reply(33, bytes(8)), "capability at 33"),
        (reply(0xFFFFFFFF, bytes(8)), "capability at 4294967295"),
        (reply(32, struct.pack("<HHI", 9, 1, 32)), "capability at 32, not between 40"),
        (reply(32, struct.pack("<HHI", 9, 1, 39) + bytes(40)), "capability at 39"),
        (reply(32, struct.pack("<HHI", CAP_SPARSE_MMAP, 1, 0)), "has 0 bytes of data"),
        (reply(32, SPARSE.pack(1, 1, 0, 1, 0)), "1 sparse areas do not fit 8 bytes"),
        (reply(32, SPARSE.pack(1, 1, 0, 0xFFFFFFFF, 0)), "4294967295 sparse areas"),
    ],
)
def test_bad_reply(payload: bytes, says: str) -> None:
    with pytest.raises(ConnectionLost, match=says):
        decode_region_info_reply_untrusted(payload)


def test_no_areas_at_all() -> None:
    payload = reply(32, SPARSE.pack(1, 1, 0, 0, 0))
    assert decode_region_info_reply_untrusted(payload).info.areas == ()


@given(st.integers(0, 80), st.binary(max_size=64))
def test_any_chain(cap_offset: int, chain: bytes) -> None:
    try:
        found = decode_region_info_reply_untrusted(reply(cap_offset, chain))
    except ConnectionLost:
        return
    assert len(found.info.areas) * 16 + len(found.capabilities) * 8 <= len(chain)


u64 = st.integers(0, (1 << 64) - 1)


@given(
    u64,
    u64,
    st.lists(st.builds(SparseArea, u64, u64), max_size=4),
    st.lists(
        st.builds(
            RegionCapability,
            st.integers(2, 0xFFFF),
            st.integers(0, 0xFFFF),
            st.integers(0, 3).map(lambda n: b"8 bytes!" * n),
        ),
        max_size=3,
    ),
)
def test_reply_round_trip(
    size: int, offset: int, areas: list[SparseArea], others: list[RegionCapability]
) -> None:
    info = RegionInfo(size, RW | RegionFlags.MMAP, None, offset, tuple(areas))
    payload, _ = encode_region_info_reply(RegionInfoRequest(2, 0xFFFF), info, others)
    assert decode_region_info_reply_untrusted(payload) == RegionInfoReply(
        len(payload), 2, info, tuple(others)
    )

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.device import U64_END, DmaAccess, DmaMapping
from vfio_user_virtio.errors import ClientError, ConnectionLost
from vfio_user_virtio.limits import MAX_DATA_XFER_SIZE
from vfio_user_virtio.protocol.dma import (
    DmaUnmapRequest,
    decode_dma_map_request_untrusted,
    decode_dma_read_reply_untrusted,
    decode_dma_read_request_untrusted,
    decode_dma_unmap_reply_untrusted,
    decode_dma_unmap_request_untrusted,
    decode_dma_write_reply_untrusted,
    decode_dma_write_request_untrusted,
    encode_dma_map_request,
    encode_dma_read_reply,
    encode_dma_read_request,
    encode_dma_unmap_reply,
    encode_dma_unmap_request,
    encode_dma_write_reply,
    encode_dma_write_request,
)

RW = DmaAccess.READ | DmaAccess.WRITE
u64 = st.integers(0, U64_END - 1)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int]:
    iova = draw(u64)
    return iova, min(draw(st.integers(1, U64_END - iova)), U64_END - 1)


@given(
    ranges(),
    st.sampled_from([DmaAccess.READ, DmaAccess.WRITE, RW]),
    st.none() | st.integers(0, 1000),
    st.integers(0, (1 << 52) - 1),
)
def test_map_round_trip(
    extent: tuple[int, int], access: DmaAccess, fd: int | None, page: int
) -> None:
    mapping = DmaMapping(*extent, access, fd, page * 4096)
    fds = [] if fd is None else [fd]
    assert decode_dma_map_request_untrusted(encode_dma_map_request(mapping), fds) == mapping


def map_payload(
    argsz: int = 32, flags: int = 3, offset: int = 0, iova: int = 0, size: int = 4096
) -> bytes:
    return struct.pack("<IIQQQ", argsz, flags, offset, iova, size)


def test_map_may_end_at_the_end() -> None:
    payload = map_payload(iova=U64_END - 4096)
    assert decode_dma_map_request_untrusted(payload) == DmaMapping(U64_END - 4096, 4096, RW)


def test_offset_means_nothing_without_an_fd() -> None:
    assert decode_dma_map_request_untrusted(map_payload(offset=5)).offset == 5


@pytest.mark.parametrize(
    ("payload", "fds", "says"),
    [
        (b"", [], "payload of 0 bytes, 32 are needed"),
        (map_payload()[:31], [5], "payload of 31 bytes"),
        (map_payload(argsz=31), [], "argsz 31, at least 32"),
        (map_payload(flags=0), [], "flags 0x0"),
        (map_payload(flags=4), [], "flags 0x4"),
        (map_payload(flags=7), [], "flags 0x7"),
        (map_payload(flags=0x80000003), [], "flags 0x80000003"),
        (map_payload(size=0), [], "0x0 bytes at 0x0 is empty"),
        (map_payload(iova=U64_END - 4096, size=4097), [], "passes 2\\*\\*64"),
        (map_payload(iova=U64_END - 1, size=U64_END - 1), [], "passes 2\\*\\*64"),
        (map_payload(), [5, 6], "brings 2 file descriptors"),
        (map_payload(offset=1), [5], "offset 0x1, not a multiple of 4096"),
    ],
)
def test_bad_map(payload: bytes, fds: list[int], says: str) -> None:
    with pytest.raises(ClientError, match=says) as caught:
        decode_dma_map_request_untrusted(payload, fds)
    assert caught.value.errno == errno.EINVAL


@given(ranges())
def test_unmap_round_trip(extent: tuple[int, int]) -> None:
    request = DmaUnmapRequest(*extent)
    payload = encode_dma_unmap_request(request)
    assert decode_dma_unmap_request_untrusted(payload) == request
    reply = encode_dma_unmap_reply(request)
    assert reply == payload
    assert decode_dma_unmap_reply_untrusted(reply, request) == b""


def unmap_payload(
    argsz: int = 24, flags: int = 0, iova: int = 0, size: int = 4096, tail: bytes = b""
) -> bytes:
    return struct.pack("<IIQQ", argsz, flags, iova, size) + tail


@pytest.mark.parametrize(
    ("iova", "size"),
    [
        (0, 0x80000000),
        (0x800000000000, 0x800000000000),
        (0xFEF00000, 0xFFFFFFFF01100000),
    ],
)
def test_ladder_of_a_viommu(iova: int, size: int) -> None:
    request = decode_dma_unmap_request_untrusted(unmap_payload(iova=iova, size=size))
    assert request == DmaUnmapRequest(iova, size)


def test_unmap_everything() -> None:
    payload = unmap_payload(flags=2, size=0)
    request = decode_dma_unmap_request_untrusted(payload)
    assert request == DmaUnmapRequest(0, U64_END, everything=True)
    assert encode_dma_unmap_request(request) == payload
    assert encode_dma_unmap_reply(request) == payload


def test_unmap_with_dirty_bitmap() -> None:
    payload = unmap_payload(24 + 16 + 24, 1, size=65 * 4096, tail=struct.pack("<QQ", 4096, 24))
    request = decode_dma_unmap_request_untrusted(payload)
    assert request == DmaUnmapRequest(0, 65 * 4096, False, 4096, 24)
    assert encode_dma_unmap_request(request) == payload
    bitmap = b"\xff" * 8 + b"\1"
    reply = encode_dma_unmap_reply(request, bitmap)
    assert reply == payload + bitmap + bytes(15)
    assert decode_dma_unmap_reply_untrusted(reply, request) == bitmap + bytes(15)
    with pytest.raises(ConnectionLost, match="payload of 63 bytes, 64 were expected"):
        decode_dma_unmap_reply_untrusted(reply[:-1], request)


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"", "payload of 0 bytes, 24 are needed"),
        (bytes(4), "payload of 4 bytes"),
        (unmap_payload()[:23], "payload of 23 bytes"),
        (unmap_payload(argsz=23), "argsz 23, at least 24"),
        (unmap_payload(flags=2, iova=4096, size=0), "both must be 0"),
        (unmap_payload(flags=2), "both must be 0"),
        (unmap_payload(flags=3, size=0), "flags 0x3"),
        (unmap_payload(flags=4), "flags 0x4"),
        (unmap_payload(size=0), "is empty"),
        (unmap_payload(iova=1, size=U64_END - 1), None),
        (unmap_payload(iova=2, size=U64_END - 1), "passes 2\\*\\*64"),
        (unmap_payload(64, 1), "payload of 24 bytes, 40 are needed"),
        (unmap_payload(64, 1, tail=struct.pack("<QQ", 0, 8)), "page size 0"),
        (unmap_payload(64, 1, tail=struct.pack("<QQ", 4095, 8)), "page size 4095"),
        (unmap_payload(64, 1, tail=struct.pack("<QQ", 4096, 7)), "bitmap of 7 bytes; 8 are"),
        (unmap_payload(47, 1, tail=struct.pack("<QQ", 4096, 8)), "argsz 47, at least 48"),
        (unmap_payload(64, 1, size=1 << 62, tail=struct.pack("<QQ", 1, 8)), "ask for less"),
        (
            unmap_payload(0xFFFFFFFF, 1, tail=struct.pack("<QQ", 4096, MAX_DATA_XFER_SIZE + 1)),
            "is the limit",
        ),
    ],
)
def test_bad_unmap(payload: bytes, says: str | None) -> None:
    if says is None:
        decode_dma_unmap_request_untrusted(payload)
        return
    with pytest.raises(ClientError, match=says) as caught:
        decode_dma_unmap_request_untrusted(payload)
    assert caught.value.errno == errno.EINVAL


def test_bad_unmap_reply() -> None:
    with pytest.raises(ConnectionLost, match="the reply to DMA_UNMAP"):
        decode_dma_unmap_reply_untrusted(b"", DmaUnmapRequest(0, 4096))


@st.composite
def accesses(draw: st.DrawFn) -> tuple[int, bytes]:
    data = draw(st.binary(max_size=40))
    return draw(st.integers(0, U64_END - 1 - len(data))), data


@given(accesses())
def test_access_round_trip(access: tuple[int, bytes]) -> None:
    address, data = access
    count = len(data)
    read = encode_dma_read_request(address, count)
    assert decode_dma_read_request_untrusted(read) == (address, count)
    assert decode_dma_read_reply_untrusted(encode_dma_read_reply(address, data), count) == data
    write = encode_dma_write_request(address, memoryview(data))
    assert decode_dma_write_request_untrusted(write) == (address, count)
    assert write[16:] == data
    reply = encode_dma_write_reply(address, count)
    assert len(reply) == 16
    decode_dma_write_reply_untrusted(reply, count)


def access(address: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<QQ", address, count) + data


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"", errno.EINVAL),
        (bytes(15), errno.EINVAL),
        (bytes(17), errno.EINVAL),
        (access(0, 101), errno.E2BIG),
        (access(0, U64_END - 1), errno.E2BIG),
        (access(U64_END - 1, 2), errno.EINVAL),
    ],
)
def test_bad_read_request(payload: bytes, code: int) -> None:
    with pytest.raises(ClientError, match="DMA_READ") as caught:
        decode_dma_read_request_untrusted(payload, 100)
    assert caught.value.errno == code


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"", errno.EINVAL),
        (bytes(15), errno.EINVAL),
        (access(0, 101, bytes(101)), errno.E2BIG),
        (access(0, 4, bytes(3)), errno.E2BIG),
        (access(0, 4, bytes(5)), errno.EINVAL),
        (access(U64_END - 1, 2, bytes(2)), errno.EINVAL),
    ],
)
def test_bad_write_request(payload: bytes, code: int) -> None:
    with pytest.raises(ClientError, match="DMA_WRITE") as caught:
        decode_dma_write_request_untrusted(payload, 100)
    assert caught.value.errno == code


@pytest.mark.parametrize(
    "payload", [b"", access(0, 4, bytes(3)), access(0, 3, bytes(4)), access(0, 4, bytes(5))]
)
def test_bad_read_reply(payload: bytes) -> None:
    with pytest.raises(ConnectionLost, match="the reply to DMA_READ"):
        decode_dma_read_reply_untrusted(payload, 4)


@pytest.mark.parametrize("payload", [b"", struct.pack("<QI", 0, 4), access(0, 3)])
def test_bad_write_reply(payload: bytes) -> None:
    with pytest.raises(ConnectionLost, match="the reply to DMA_WRITE"):
        decode_dma_write_reply_untrusted(payload, 4)

"""Frames of the transfer stream: golden bytes, round trips, and everything that is refused."""

from __future__ import annotations

import itertools
import os
import struct
import zlib
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.migration.golden_frames import ALL_FLAGS, FRAMES, NAMES, TRANSFER, golden_frame
from vfio_user_virtio.errors import ConnectionLost
from vfio_user_virtio.limits import MAX_TRANSFER_PAYLOAD, MAX_TRANSFER_TEXT, MAX_ZERO_RUN
from vfio_user_virtio.migration.transfer_frames import (
    FRAME_HEADER,
    FRAME_HEADER_SIZE,
    Abort,
    Ack,
    DeviceFacts,
    End,
    Frame,
    Hello,
    Kind,
    Options,
    Pages,
    Run,
    Stage,
    State,
    Sync,
    ZeroPages,
    decode_frame_header_untrusted,
    decode_frame_untrusted,
    encode_frame,
    encode_frame_header,
)
from vfio_user_virtio.protocol.migration import MigrationFlags

PAGE: Final = 4096
u64 = st.integers(0, (1 << 64) - 1)
page_numbers = st.integers(0, (1 << 52) - 1 - (MAX_ZERO_RUN // PAGE))
texts = st.text(st.characters(codec="utf-8"), max_size=40)
frames: st.SearchStrategy[Frame] = st.one_of(
    st.builds(
        Hello, st.binary(min_size=16, max_size=16), st.sampled_from([Options(0), Options.ONE_WAY])
    ),
    st.builds(
        DeviceFacts,
        st.integers(0, 7).map(MigrationFlags),
        st.none() | st.integers(0, 0xFFFF_FFFE),
        texts,
    ),
    st.builds(State, st.binary(min_size=1, max_size=60)),
    st.builds(
        Pages,
        page_numbers.map(PAGE.__mul__),
        st.sampled_from([b"\0" * PAGE, b"\xff" * 3 * PAGE, bytes(range(256)) * 16]),
    ),
    st.builds(
        ZeroPages,
        page_numbers.map(PAGE.__mul__),
        st.integers(1, MAX_ZERO_RUN // PAGE).map(PAGE.__mul__),
    ),
    st.builds(Sync),
    st.builds(End, u64, u64, u64),
    st.builds(Run),
    st.builds(Abort, texts, st.integers(os.EX_USAGE, os.EX_CONFIG)),
    st.builds(Ack, st.sampled_from(Stage), st.integers(0, 0xFFFF_FFFF)),
)


def decoded(data: bytes, sequence: int) -> Frame | None:
    header = decode_frame_header_untrusted(data, sequence)
    payload = data[FRAME_HEADER_SIZE:]
    assert len(payload) == header.size
    return decode_frame_untrusted(header, payload)


def refusal(kind: int, payload: bytes) -> str:
    """What is said to a frame that is whole, and yet wrong."""
    with pytest.raises(ConnectionLost) as caught:
        decoded(encode_frame_header(kind, payload, 0) + payload, 0)
    return str(caught.value)


@pytest.mark.parametrize("name", FRAMES)
def test_golden_frames_both_ways(name: str) -> None:
    data = golden_frame(name)
    sequence = FRAME_HEADER.unpack_from(data)[3]
    assert decoded(data, sequence) == FRAMES[name]
    assert encode_frame(FRAMES[name], sequence) == data


def test_every_kind_has_a_golden_frame() -> None:
    kinds = {FRAME_HEADER.unpack_from(golden_frame(name))[0] for name in NAMES}
    assert set(Kind) < kinds
    assert set(NAMES) - set(FRAMES) == {"may_be_skipped", "unknown"}


def test_kinds_that_nobody_knows() -> None:
    assert decoded(golden_frame("may_be_skipped"), 9) is None
    with pytest.raises(ConnectionLost, match=r"frame 9 is of kind 28673.*same version"):
        decoded(golden_frame("unknown"), 9)


@given(frames, st.integers(0, 0xFFFF_FFFF))
def test_what_is_written_is_read(frame: Frame, sequence: int) -> None:
    assert decoded(encode_frame(frame, sequence), sequence) == frame


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"pages"}))
def test_any_bit_that_flips_is_found(name: str) -> None:
    data = golden_frame(name)
    sequence = FRAME_HEADER.unpack_from(data)[3]
    for position, bit in itertools.product(range(len(data)), range(8)):
        broken = bytearray(data)
        broken[position] ^= 1 << bit
        with pytest.raises(ConnectionLost, match="wrong checksum"):
            decoded(bytes(broken), sequence)


def test_headers_that_are_refused_with_the_right_checksum() -> None:
    def header(kind: int, reserved: int, size: int, sequence: int) -> bytes:
        fields = struct.pack("<HHIII", kind, reserved, size, sequence, 0)
        return fields + struct.pack("<I", zlib.crc32(fields))

    with pytest.raises(ConnectionLost, match="frame 3 came where frame 2 was due"):
        decode_frame_header_untrusted(header(3, 0, 1, 3), 2)
    with pytest.raises(ConnectionLost, match="reserved field of frame 2 is 0x1"):
        decode_frame_header_untrusted(header(3, 1, 1, 2), 2)
    with pytest.raises(
        ConnectionLost, match=f"has 4294967295 bytes; at most {MAX_TRANSFER_PAYLOAD}"
    ):
        decode_frame_header_untrusted(header(3, 0, 0xFFFF_FFFF, 2), 2)
    decode_frame_header_untrusted(header(3, 0, MAX_TRANSFER_PAYLOAD, 2), 2)


@pytest.mark.parametrize(
    ("kind", "payload", "problem"),
    [
        (Kind.HELLO, bytes(23), "HELLO has 23 bytes, not at least 24"),
        (Kind.HELLO, struct.pack("<HHI16s", 2, 0, 0, TRANSFER), "speaks version 2 of"),
        (Kind.HELLO, struct.pack("<HHI16s", 1, 0, 2, TRANSFER), "has options 0x2, of which"),
        (Kind.HELLO, struct.pack("<HHI16s", 1, 1, 0, TRANSFER), "has options 0x0, of which"),
        (Kind.DEVICE, bytes(11), "DEVICE has 11 bytes"),
        (Kind.DEVICE, bytes(12 + MAX_TRANSFER_TEXT + 1), "DEVICE has 4109 bytes"),
        (Kind.DEVICE, bytes(12) + b"\xff", "the text of DEVICE is not UTF-8"),
        (Kind.STATE, b"", "STATE has 0 bytes, not at least 1"),
        (Kind.PAGES, bytes(7), "PAGES has 7 bytes"),
        (Kind.PAGES, bytes(8), "PAGES has 8 bytes, not 8 and whole pages of 4096"),
        (Kind.PAGES, bytes(8 + PAGE + 1), "PAGES has 4105 bytes"),
        (Kind.PAGES, struct.pack("<Q", 1) + bytes(PAGE), "0x1000 bytes of guest memory at 0x1,"),
        (
            Kind.PAGES,
            struct.pack("<Q", (1 << 64) - PAGE) + bytes(2 * PAGE),
            "at 0xfffffffffffff000, which is no place",
        ),
        (Kind.ZERO_PAGES, bytes(15), "ZERO_PAGES has 15 bytes, not 16"),
        (Kind.ZERO_PAGES, struct.pack("<QQ", 0, 0), "0x0 bytes of zero pages"),
        (Kind.ZERO_PAGES, struct.pack("<QQ", 0, 100), "0x64 bytes of zero pages"),
        (Kind.ZERO_PAGES, struct.pack("<QQ", 0, MAX_ZERO_RUN + PAGE), "at most 0x40000000"),
        (Kind.ZERO_PAGES, struct.pack("<QQ", 8, PAGE), "at 0x8, which is no place for pages"),
        (Kind.SYNC, b"x", "SYNC has 1 bytes, not 0"),
        (Kind.END, bytes(23), "END has 23 bytes, not 24"),
        (Kind.RUN, b"x", "RUN has 1 bytes, not 0"),
        (Kind.ABORT, bytes(3), "ABORT has 3 bytes"),
        (Kind.ABORT, bytes(4 + MAX_TRANSFER_TEXT + 1), "ABORT has 4101 bytes"),
        (Kind.ABORT, bytes(4) + b"\xc3", "the text of ABORT is not UTF-8"),
        (Kind.ACK, bytes(7), "ACK has 7 bytes, not 8"),
        (Kind.ACK, struct.pack("<II", 5, 0), "acknowledgement of stage 5, which is unknown"),
    ],
)
def test_payloads_that_are_refused(kind: Kind, payload: bytes, problem: str) -> None:
    assert problem in refusal(kind, payload)


def test_a_newer_hello_may_be_longer() -> None:
    payload = struct.pack("<HHI16s", 1, 0, 0, TRANSFER) + b"more"
    assert decoded(encode_frame_header(1, payload, 0) + payload, 0) == Hello(TRANSFER)


def test_what_a_newer_device_offers_is_left_out() -> None:
    payload = struct.pack("<QI", (1 << 63) | ALL_FLAGS, 1)
    assert decoded(encode_frame_header(2, payload, 0) + payload, 0) == DeviceFacts(ALL_FLAGS, 1, "")


def test_an_exit_code_that_is_none_of_sysexits() -> None:
    payload = struct.pack("<I", 0) + b"why"
    assert decoded(encode_frame_header(9, payload, 0) + payload, 0) == Abort("why", os.EX_IOERR)


def test_texts_are_cut_between_characters() -> None:
    data = encode_frame(Abort("€" * MAX_TRANSFER_TEXT), 0)
    assert decoded(data, 0) == Abort("€" * (MAX_TRANSFER_TEXT // 3))


def test_nothing_is_written_that_nobody_would_read() -> None:
    encode_frame(Pages(0, bytes(1 << 20)), 0)
    with pytest.raises(ValueError, match="at most"):
        encode_frame(Pages(0, bytes((1 << 20) + PAGE)), 0)

"""The quick sum against the plain one of RFC 1071."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from vfio_user_virtio.virtio.checksum import (
    ipv4_checksum,
    transport_checksum,
    words_sum,
)


def plain_sum(data: bytes) -> int:
    """RFC 1071, section 4.1, word by word with end-around carry."""
    total = 0
    for position in range(0, len(data), 2):
        total += int.from_bytes(data[position : position + 2].ljust(2, b"\0"), "big")
        total = (total & 0xFFFF) + (total >> 16)
    return total


@given(st.binary(max_size=300))
@example(b"")
@example(b"\xff\xff")
@example(b"\xff\xff\xff\xff\x00")
@example(b"\x12")
def test_a_message_with_its_checksum_adds_up(data: bytes) -> None:
    total = words_sum(data)
    assert total % 0xFFFF == plain_sum(data) % 0xFFFF
    even = data if len(data) % 2 == 0 else data + b"\0"
    for checksum in (transport_checksum(total), ipv4_checksum(total)):
        checked = plain_sum(even + checksum.to_bytes(2, "big"))
        assert checked == 0xFFFF or not any(even)


def test_rfc_1071_example() -> None:
    assert words_sum(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2


def test_zero_is_what_each_protocol_says() -> None:
    assert transport_checksum(0xFFFF) == 0xFFFF
    assert ipv4_checksum(0xFFFF) == 0
    assert ipv4_checksum(0x1234) == 0xFFFF - 0x1234

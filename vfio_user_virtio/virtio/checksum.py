"""The Internet checksum, quick enough in Python to finish frames with.

A ones' complement sum of 16-bit words is the number that those words spell, modulo 65,535, since
2^16 ≡ 1; so one `int.from_bytes` and one remainder do it.  Measured on CPython 3.11 for 1,448
bytes: 2.3 µs, against 9.6 µs for a sum over 16-bit items and 5.4 µs over 64-bit ones.

Source: RFC 1071; RFC 768 for the rule that a transport checksum of 0 travels as 0xffff.
"""

from __future__ import annotations

from typing import Final

ONES: Final = 0xFFFF


def words_sum(data: bytes | bytearray | memoryview) -> int:
    """Sum of the big-endian 16-bit words of `data`, modulo 65,535; an odd end is padded with 0."""
    total = int.from_bytes(data, "big") % ONES
    return total << 8 if len(data) & 1 else total


def transport_checksum(total: int) -> int:
    """Checksum field of TCP or UDP over words that add up to `total`: 1 … 0xffff, never 0."""
    return ONES - total % ONES


def ipv4_checksum(total: int) -> int:
    """Checksum field of an IPv4 header whose other words add up to `total`: 0 … 0xfffe."""
    return (ONES - total % ONES) % ONES

"""Bits by the thousand, at the speed of C: setting runs, and changing how much one bit stands for.

Why: a dirty bitmap has a bit for each page, a client may ask for pages of another size than the log
has, and other sessions wait meanwhile; a loop over a million bits takes a second, these 2 ms.

Bit k of a ``bytearray`` is bit k % 8 of byte k // 8, and bit k of an ``int`` is worth 2^k, so that
little-endian bytes and numbers agree.

`coarsen` and `refine` halve and double by way of hexadecimal digits: two neighbours are or-ed, and
a byte then has four bits that count, a digit; or a digit becomes a byte.  Both are one
`bytes.translate`.
"""

from __future__ import annotations

from typing import Final

_DIGITS: Final = b"0123456789abcdef"
_HALVED: Final = bytes(
    _DIGITS[sum((byte >> 2 * bit & 1) << bit for bit in range(4))] for byte in range(256)
)
"""For each byte the digit that its bits 0, 2, 4 and 6 make."""
_DOUBLED: Final = bytes.maketrans(
    _DIGITS,
    bytes(sum((digit >> bit & 1) * 3 << 2 * bit for bit in range(4)) for digit in range(16)),
)
"""For each digit the byte that has every bit of it twice."""


def set_bits(bits: bytearray, start: int, end: int) -> None:
    """Set bits start … end - 1; start < end."""
    first, last = start >> 3, end - 1 >> 3
    head = 0xFF << (start & 7) & 0xFF
    tail = 0xFF >> (-end & 7)
    if first == last:
        bits[first] |= head & tail
    else:
        bits[first] |= head
        bits[first + 1 : last] = b"\xff" * (last - first - 1)
        bits[last] |= tail


def or_bits(bits: bytearray, start: int, value: int) -> None:
    """Set those bits of `bits`, counted from `start`, that are set in `value`; they must fit."""
    shifted = value << (start & 7)
    first = start >> 3
    end = first + (shifted.bit_length() + 7 >> 3)
    merged = int.from_bytes(bits[first:end], "little") | shifted
    bits[first:end] = merged.to_bytes(end - first, "little")


def coarsen(value: int, steps: int) -> int:
    """One bit for every 2^steps bits of `value`, counted from bit 0: is one of them set?"""
    for _ in range(steps):
        value |= value >> 1
        digits = value.to_bytes(value.bit_length() + 7 >> 3, "big").translate(_HALVED)
        value = int(digits or b"0", 16)
    return value


def refine(value: int, steps: int) -> int:
    """2^steps bits for every bit of `value`, all like it."""
    for _ in range(steps):
        value = int.from_bytes(f"{value:x}".encode().translate(_DOUBLED), "big")
    return value

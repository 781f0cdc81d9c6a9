"""Runs of set bits in a dirty bitmap, each of which the library is told in one call."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_SET_BYTES: Final = re.compile(rb"[^\0]+")
_PIECE: Final = 64
"""Bytes that are looked at as one number; numbers that were longer would cost their square."""


def runs(bitmap: bytes) -> Iterator[tuple[int, int]]:
    """First and one past the last bit of each run, in order; runs may touch where pieces do.

    Bit k of the bitmap is bit k % 8 of byte k // 8.
    """
    for match in _SET_BYTES.finditer(bitmap):
        for start in range(match.start(), match.end(), _PIECE):
            value = int.from_bytes(bitmap[start : min(start + _PIECE, match.end())], "little")
            base = start * 8
            while value:
                zeroes = (value & -value).bit_length() - 1
                value >>= zeroes
                ones = (~value & value + 1).bit_length() - 1
                value >>= ones
                base += zeroes
                yield base, base + ones
                base += ones

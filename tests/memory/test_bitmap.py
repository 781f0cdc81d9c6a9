"""Bitmap arithmetic against strings of 0 and 1."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.memory.bitmap import coarsen, or_bits, refine, set_bits

NUMBERS = st.integers(0, 1 << 70) | st.binary(max_size=300).map(
    lambda data: int.from_bytes(data, "little")
)


def text(value: int) -> str:
    """Bit 0 first."""
    return f"{value:b}"[::-1]


def number(bits: str) -> int:
    return int(bits[::-1] or "0", 2)


def as_number(bits: bytearray) -> int:
    return int.from_bytes(bits, "little")


@given(NUMBERS, st.integers(0, 14))
def test_coarsen(value: int, steps: int) -> None:
    bits, size = text(value), 1 << steps
    groups = (bits[start : start + size] for start in range(0, len(bits), size))
    assert coarsen(value, steps) == number("".join("01"["1" in group] for group in groups))


@given(NUMBERS, st.integers(0, 7))
def test_refine(value: int, steps: int) -> None:
    refined = refine(value, steps)
    assert refined == number("".join(bit * (1 << steps) for bit in text(value)))
    assert coarsen(refined, steps) == value


@given(st.binary(min_size=1, max_size=40), st.data())
def test_set_bits(before: bytes, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 8 * len(before) - 1))
    end = data.draw(st.integers(start + 1, 8 * len(before)))
    bits = bytearray(before)
    set_bits(bits, start, end)
    assert as_number(bits) == as_number(bytearray(before)) | (1 << end) - (1 << start)
    assert len(bits) == len(before)


@given(st.binary(max_size=40), st.data())
def test_or_bits(before: bytes, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 8 * len(before)))
    value = data.draw(st.integers(0, (1 << 8 * len(before) - start) - 1))
    bits = bytearray(before)
    or_bits(bits, start, value)
    assert as_number(bits) == as_number(bytearray(before)) | value << start
    assert len(bits) == len(before)

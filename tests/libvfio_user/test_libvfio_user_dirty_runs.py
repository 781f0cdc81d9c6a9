"""Runs of dirty pages: together they are exactly the bits that are set."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.libvfio_user.dirty_runs import runs


def test_runs_in_and_across_bytes() -> None:
    assert list(runs(b"")) == list(runs(bytes(100))) == []
    assert list(runs(bytes([0, 0b0110_0001, 0x80, 0x01]))) == [(8, 9), (13, 15), (23, 25)]
    assert list(runs(b"\xff" * 64)) == [(0, 512)]
    assert list(runs(b"\xff" * 65)) == [(0, 512), (512, 520)]


@given(st.binary(max_size=200) | st.lists(st.sampled_from([0, 0xFF, 0x80, 1])).map(bytes))
def test_exactly_the_bits_that_are_set(bitmap: bytes) -> None:
    found = [bit for start, end in runs(bitmap) for bit in range(start, end)]
    assert found == [bit for bit in range(len(bitmap) * 8) if bitmap[bit >> 3] >> (bit & 7) & 1]

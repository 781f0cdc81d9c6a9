from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.protocol.dirty_bitmap import bitmap_size_untrusted


@pytest.mark.parametrize(
    ("length", "page_size", "size"),
    [(1, 1, 8), (64, 1, 8), (65, 1, 16), (4097, 4096, 8), (1 << 35, 4096, 1 << 20)],
)
def test_sizes(length: int, page_size: int, size: int) -> None:
    assert bitmap_size_untrusted(length, page_size, "it") == size


@pytest.mark.parametrize(
    ("length", "page_size", "says"),
    [
        (1, 0, "page size 0,"),
        (1, -4096, "page size -4096"),
        (1, 3, "page size 3"),
        ((1 << 35) + 1, 4096, "a bitmap of 1048584 bytes, at most 1048576"),
        (1 << 62, 1, "ask for less"),
    ],
)
def test_refusals(length: int, page_size: int, says: str) -> None:
    with pytest.raises(ClientError, match=says):
        bitmap_size_untrusted(length, page_size, "it")


@given(st.integers(1, 1 << 20), st.integers(0, 20))
def test_a_bit_for_every_page_and_less_than_a_word_more(length: int, shift: int) -> None:
    bits = 8 * bitmap_size_untrusted(length, 1 << shift, "it")
    pages = len(range(0, length, 1 << shift))
    assert pages <= bits < pages + 64
    assert bits % 64 == 0

"""The token bucket: never more than burst + rate · t + one frame, and never less than the rate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.backends.software.rate_limit import TokenBucket


@given(
    rate=st.integers(64_000, 10_000_000),
    burst=st.integers(1, 100_000),
    frames=st.lists(st.tuples(st.integers(14, 65_589), st.floats(0, 0.5)), max_size=60),
)
def test_what_passes_is_bounded(rate: int, burst: int, frames: list[tuple[int, float]]) -> None:
    bucket = TokenBucket(rate, burst)
    now = passed = 0.0
    largest = 0
    for size, pause in frames:
        now += pause
        wait = bucket.take(size, now)
        if wait:
            assert bucket.take(size, now) == wait
            now += wait * 1.000001
            assert bucket.take(size, now) == 0
        passed += size
        largest = max(largest, size)
        assert passed <= burst + rate / 8 * now + largest + 1


@given(
    rate=st.integers(64_000, 10_000_000),
    sizes=st.lists(st.integers(14, 65_589), min_size=1, max_size=60),
)
def test_a_sender_that_always_has_something_gets_its_rate(rate: int, sizes: list[int]) -> None:
    bucket = TokenBucket(rate, 1_500)
    now = 0.0
    for size in sizes:
        while wait := bucket.take(size, now):
            now += max(wait, 1e-9)
    assert now <= sum(sizes) / (rate / 8) * 1.0001 + 1e-6


def test_a_pause_saves_up_no_more_than_the_burst() -> None:
    bucket = TokenBucket(8_000.0, 1_000.0)
    assert bucket.take(1_500, 0.0) == 0
    assert bucket.take(1, 0.0) == pytest.approx(0.5)
    assert bucket.take(1_000, 1e9) == 0
    assert bucket.tokens == 0


def test_a_clock_that_stands_still_or_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(8_000.0, 1_000.0)
    assert bucket.take(2_000, 10.0) == 0
    assert bucket.take(1, 10.0) == 1.0
    assert bucket.take(1, 5.0) == 1.0


def test_give_back() -> None:
    bucket = TokenBucket(8_000.0, 1_000.0)
    bucket.take(600, 0.0)
    bucket.give_back(600)
    bucket.give_back(600)
    assert bucket.tokens == 1_000.0


def test_default_burst() -> None:
    assert TokenBucket.of(1e9).burst == 1.25e6
    assert TokenBucket.of(64_000).burst == 1_500
    assert TokenBucket.of(64_000, 9_000).burst == 9_000


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (-1, 1), (1, 0)])
def test_nonsense_is_refused(rate: float, burst: float) -> None:
    with pytest.raises(ValueError, match="must be > 0"):
        TokenBucket(rate, burst)

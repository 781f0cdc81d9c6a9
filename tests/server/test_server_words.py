"""Durations, sizes and rates as people read them."""

from __future__ import annotations

import pytest

from vfio_user_virtio_server.words import amount, duration, rate


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0"),
        (1, "1 s"),
        (12.345, "12.3 s"),
        (1234.5, "1,234 s"),
        (0.9996, "1 s"),
        (0.5, "500 ms"),
        (0.0046, "4.6 ms"),
        (0.000_12, "120 µs"),
        (3e-8, "0.03 µs"),
        (-0.002, "-2 ms"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rates() -> None:
    assert [rate(value) for value in (5, 1500, 2.5e6, 1.2e9)] == [
        "5 B/s",
        "1.5 kB/s",
        "2.5 MB/s",
        "1.2 GB/s",
    ]


def test_sizes() -> None:
    assert [amount(value) for value in (0, 268_435_456)] == ["0 B", "268 MB"]

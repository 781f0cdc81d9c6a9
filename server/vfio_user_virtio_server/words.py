"""Durations, sizes and rates for people, to three digits."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """``1.25 s``, ``3.4 ms``, ``120 µs``; three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= size * 0.9995 or unit == "µs":
            return f"{_digits(seconds / size)} {unit}" if seconds else "0"
    raise AssertionError("the last unit takes everything")


def rate(bytes_per_second: float) -> str:
    return f"{amount(bytes_per_second)}/s"


def amount(byte_count: float) -> str:
    """``1.2 GB``; three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if byte_count >= size:
            return f"{_digits(byte_count / size)} {unit}"
    return f"{_digits(byte_count)} B"


def _digits(value: float) -> str:
    places = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    text = f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text

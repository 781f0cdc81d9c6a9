"""The phases of a migration as plain data: all that is told of it, or drawn, is made of them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import Iterator


@attrs.define
class Span:
    """A phase: when it began, in seconds of any clock, how long it took, and what moved in it.

    `down`: the guest, or its device, did not run meanwhile.  `undone`: in a word, why it was not
    done.  `note`: a few words beside it.
    """

    name: str
    start: float
    seconds: float = 0.0
    byte_count: int = 0
    page_count: int = 0
    down: bool = False
    undone: str = ""
    note: str = ""

    @property
    def end(self) -> float:
        return self.start + self.seconds


@contextlib.contextmanager
def timed(spans: list[Span], name: str, *, down: bool) -> Iterator[Span]:
    """A further one of `spans`, by trio's clock, for as long as this lasts."""
    span = Span(name, trio.current_time(), down=down)
    spans.append(span)
    try:
        yield span
    except BaseException as error:
        span.undone = "cancelled" if isinstance(error, trio.Cancelled) else "failed"
        raise
    finally:
        span.seconds = trio.current_time() - span.start

"""What a benchmark says: a figure is one quantity, measured side by side on ours and on its peer.

A figure has columns, one per contender; all but one are engines of ours (`NATIVE`, and where the
library is installed `LIBVFIO_USER`), that one is the peer.  Sample k of every column was taken in
the same short stretch of time, so the ratio is the median of the samples' own ratios: what disturbs
the machine for longer than a sample disturbs all sides and cancels out.  Comparing runs, or one
side's best with the other's, was rejected: on two shared cores the same measurement differs by tens
of per cent from one minute to the next.
"""

from __future__ import annotations

import enum
import statistics
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import TypeAlias

NATIVE: Final = "native"
"""The column of the engine in trio; another engine is another column."""

LIBVFIO_USER: Final = "libvfio-user"
"""The column of the engine on libvfio-user, which has no aims: it is not there to be quick."""


class Better(enum.Enum):
    LESS = "less"
    MORE = "more"


@attrs.frozen
class Aim:
    """`limit` is the worst value that meets the aim: of the ratio to the peer, or of the median."""

    limit: float
    of_ratio: bool


@attrs.frozen
class Figure:
    """One quantity.  `columns` maps a contender to its samples, in `unit`."""

    name: str
    unit: str
    better: Better
    columns: Mapping[str, Sequence[float]]
    peer: str | None = None
    aim: Aim | None = None

    @property
    def engines(self) -> list[str]:
        return [column for column in self.columns if column != self.peer]

    def median(self, column: str) -> float:
        return statistics.median(self.columns[column])

    def ratio(self, engine: str) -> float | None:
        """How many times the peer's value ours is; None without a peer, or where it is zero."""
        if self.peer is None or not all(self.columns[self.peer]):
            return None
        pairs = zip(self.columns[engine], self.columns[self.peer], strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    def meets_aim(self, engine: str) -> bool | None:
        """None if there is no aim, or nothing to hold against it."""
        if self.aim is None or engine == LIBVFIO_USER:
            return None
        value = self.ratio(engine) if self.aim.of_ratio else self.median(engine)
        if value is None:
            return None
        return value <= self.aim.limit if self.better is Better.LESS else value >= self.aim.limit


Publish: TypeAlias = "Callable[[Figure], None]"
"""Takes each figure as soon as it is known."""


def at_most(limit: float, *, of_ratio: bool = False) -> Aim:
    """An aim for figures of which less is better."""
    return Aim(limit, of_ratio)


def at_least(limit: float, *, of_ratio: bool = False) -> Aim:
    """An aim for figures of which more is better."""
    return Aim(limit, of_ratio)

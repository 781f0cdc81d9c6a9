"""A migration as a picture: a time line of its phases, what moved in them, and the guest's packets.

From plain data to one file that needs nothing else, an SVG or an HTML page around it: to be sent
with a bug report, or kept beside a run of the tests.  It knows nothing of how the guest was moved,
so every command that moves something can use it.

Two scales, because the phases that matter are the shortest: all of it, and below it the time in
which no device ran, as wide as the page.  Bars too short to be seen are drawn a pixel wide, and
each row says its length in words.

Rejected: a library for charts (matplotlib and its kind take longer to import than a guest to move),
and scripts in the page (it is opened where scripts are not allowed: mail, CI artefacts).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server.drawing import INK, Drawing, escaped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from vfio_user_virtio_server.spans import Span

SUFFIXES: Final = (".html", ".svg")

_WIDTH: Final = 960
_LEFT: Final = 130
_RIGHT: Final = 690
"""Where time begins and ends; what is moved stands right of it."""
_ROW: Final = 24
_BAR: Final = 14
_PINGS: Final = 64
"""Height of the lane of packets."""
_MAX_PINGS: Final = 5_000
"""Packets that are drawn one by one; of more, the worst of each group."""

_RUNS: Final = "#4878a8"
_DOWN: Final = "#d1603d"
_BAND: Final = "#fbe9e3"
_ANSWERED: Final = "#3f8f5b"
_LOST: Final = "#b3202c"
_FAINT: Final = "#6b7785"
_GRID: Final = "#e3e7ec"


@attrs.frozen
class Ping:
    """A packet of the guest: when it was sent and answered (None: never), by the spans' clock."""

    sent: float
    answered: float | None


@attrs.frozen
class Report:
    """What is drawn.  `facts`: lines of the header, by name."""

    title: str
    spans: Sequence[Span]
    pings: Sequence[Ping] = ()
    facts: Mapping[str, str] = attrs.field(factory=dict)

    @property
    def start(self) -> float:
        times = [span.start for span in self.spans] + [ping.sent for ping in self.pings]
        return min(times, default=0.0)

    @property
    def end(self) -> float:
        times = [span.end for span in self.spans] + [ping.sent for ping in self.pings]
        return max(times, default=0.0)

    @property
    def down(self) -> tuple[float, float] | None:
        """From when to when nothing ran; None if something always did."""
        spans = [span for span in self.spans if span.down]
        if not spans:
            return None
        return min(span.start for span in spans), max(span.end for span in spans)


def check_path(text: str) -> str:
    """A file that `write` takes.  Raises ValueError."""
    if not text.endswith(SUFFIXES):
        raise ValueError(f"{text!r} is no report; its name ends in {' or '.join(SUFFIXES)}")
    return text


def make(path: str) -> None:
    """Make an empty file at `path`, to fail before anything is done.  Raises HostError."""
    try:
        Path(path).touch()
    except OSError as error:
        raise _unwritable(path, error) from None


def write(path: str, report: Report) -> None:
    """Make the file at `path`, in the form that its name asks for.  Raises HostError."""
    text = svg(report) if path.endswith(".svg") else page(report)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: str, error: OSError) -> HostError:
    return HostError(
        f"cannot write the report to {path}: {error.strerror}", exit_code=os.EX_CANTCREAT
    )


def page(report: Report) -> str:
    """An HTML page: the picture, and the phases as a table."""
    rows = "".join(
        f"<tr{_DOWN_ROW if span.down else ''}><th>{escaped(span.name)}</th>"
        f"<td>{duration(span.start - report.start)}</td><td>{duration(span.seconds)}</td>"
        f"<td>{span.byte_count:,}</td><td>{span.page_count:,}</td></tr>"
        for span in report.spans
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escaped(report.title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{svg(report)}\n<table><thead><tr><th>phase</th><td>from</td><td>for</td>"
        f"<td>bytes</td><td>pages</td></tr></thead><tbody>{rows}</tbody></table>\n</body></html>\n"
    )


_DOWN_ROW: Final = ' class="down"'
_STYLE: Final = (
    f"body{{font:14px sans-serif;color:{INK};background:#fff;max-width:{_WIDTH}px;"
    "margin:2em auto}svg{width:100%;height:auto}"
    "table{border-collapse:collapse;margin-top:1em}"
    "th{text-align:left;font-weight:normal}td{text-align:right}"
    f"th,td{{padding:.2em 1.2em .2em 0;border-bottom:1px solid {_GRID}}}"
    f"thead th,thead td{{color:{_FAINT}}}.down th{{color:{_DOWN}}}"
)


def svg(report: Report) -> str:
    """The picture alone."""
    drawing = Drawing(_WIDTH)
    drawing.text(0, 20, report.title, size=18)
    drawing.y = 44
    for name, value in [*report.facts.items(), *_summary(report)]:
        drawing.text(0, drawing.y, name, colour=_FAINT)
        drawing.text(_LEFT, drawing.y, value)
        drawing.y += 19
    drawing.y += 12
    _panel(drawing, report, report.start, report.end, list(report.spans))
    down = report.down
    if down is not None:
        drawing.y += 40
        drawing.text(0, drawing.y, "While nothing ran", size=15)
        drawing.y += 16
        margin = (down[1] - down[0]) * 0.04
        inside = [span for span in report.spans if span.down]
        _panel(drawing, report, down[0] - margin, down[1] + margin, inside, zero=down[0])
    return drawing.done()


def _summary(report: Report) -> Iterator[tuple[str, str]]:
    yield "in all", duration(report.end - report.start)
    down = report.down
    if down is not None:
        yield "downtime", duration(down[1] - down[0])
    byte_count = sum(span.byte_count for span in report.spans)
    pages = sum(span.page_count for span in report.spans)
    moved = f"{byte_count:,} bytes" + (f" and {pages:,} pages" if pages else "")
    busy = sum(span.seconds for span in report.spans if span.byte_count or span.page_count)
    if busy > 0:
        moved += f", {rate((byte_count + 4096 * pages) / busy)} in the phases that moved them"
    yield "moved", moved
    if report.pings:
        answered = [p.answered - p.sent for p in report.pings if p.answered is not None]
        lost = len(report.pings) - len(answered)
        slowest = f", the slowest after {duration(max(answered))}" if answered else ""
        yield "packets", f"{len(report.pings):,} sent, {lost:,} unanswered{slowest}"


def _panel(
    drawing: Drawing,
    report: Report,
    start: float,
    end: float,
    spans: list[Span],
    *,
    zero: float | None = None,
) -> None:
    """Rows of phases, a lane of packets and an axis; its zero is at `zero`, or where it starts."""
    length = max(end - start, 1e-9)

    def x(time: float) -> float:
        return _LEFT + (min(max(time, start), end) - start) / length * (_RIGHT - _LEFT)

    pings = [ping for ping in report.pings if start <= ping.sent <= end]
    top = drawing.y
    bottom = top + _ROW * len(spans) + (_PINGS if pings else 0)
    if report.down is not None:
        left, right = x(report.down[0]), x(report.down[1])
        drawing.box(left, top, max(right - left, 1), bottom - top, _BAND)
    origin = start if zero is None else zero
    for tick in ticks(start - origin, end - origin):
        drawing.line(x(tick + origin), top, x(tick + origin), bottom, _GRID)
        drawing.text(x(tick + origin), bottom + 16, duration(tick), _FAINT, "middle", 11)
    for span in spans:
        middle = drawing.y + _ROW / 2
        drawing.text(0, middle + 4, span.name)
        width = max(x(span.end) - x(span.start), 1)
        colour = _DOWN if span.down else _RUNS
        drawing.box(x(span.start), middle - _BAR / 2, width, _BAR, colour)
        drawing.text(_RIGHT + 14, middle + 4, _moved(span), size=12)
        drawing.y += _ROW
    if pings:
        _lane(drawing, pings, x)
    drawing.line(_LEFT, bottom, _RIGHT, bottom, _FAINT)
    drawing.y = bottom + 20


def _moved(span: Span) -> str:
    said = [duration(span.seconds)]
    if span.byte_count:
        said.append(f"{span.byte_count:,} bytes")
    if span.page_count:
        said.append(f"{span.page_count:,} pages")
    return ", ".join(said)


def _lane(drawing: Drawing, pings: list[Ping], x: Callable[[float], float]) -> None:
    """A dot for each answer, as high as it took long; a cross for each that never came."""
    shown = list(_thinned(pings))
    took = [ping.answered - ping.sent for ping in shown if ping.answered is not None]
    most = max(took, default=0.0)
    top, room = drawing.y + 8, _PINGS - 16
    drawing.text(0, top + room / 2 + 4, "packets")
    drawing.text(_RIGHT + 14, top + 6, f"{duration(most)} round trip", _FAINT, size=11)
    drawing.text(_RIGHT + 14, top + room + 4, "0", _FAINT, size=11)
    for ping in shown:
        if ping.answered is None:
            drawing.cross(x(ping.sent), top, _LOST)
        else:
            high = (ping.answered - ping.sent) / most * room if most > 0 else 0
            drawing.dot(x(ping.sent), top + room - high, _ANSWERED)
    drawing.y += _PINGS


def _thinned(pings: list[Ping]) -> Iterator[Ping]:
    """All of them; of too many, the unanswered ones and the slowest of each group."""
    group = -(-len(pings) // _MAX_PINGS)
    for first in range(0, len(pings), group):
        some = pings[first : first + group]
        yield max(some, key=_took)


def _took(ping: Ping) -> float:
    return float("inf") if ping.answered is None else ping.answered - ping.sent


# --- words and numbers --------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """``1.25 s``, ``3.4 ms``, ``120 µs``; three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= size * 0.9995 or unit == "µs":
            return f"{_digits(seconds / size)} {unit}" if seconds else "0"
    raise AssertionError("the last unit takes everything")


def rate(bytes_per_second: float) -> str:
    for unit, size in (("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3)):
        if bytes_per_second >= size:
            return f"{_digits(bytes_per_second / size)} {unit}"
    return f"{_digits(bytes_per_second)} B/s"


def _digits(value: float) -> str:
    places = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    text = f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def ticks(start: float, end: float) -> list[float]:
    """Up to nine round numbers from `start` to `end`."""
    length = end - start
    if length <= 0:
        return []
    step = 1e-9
    while length / step > 8:
        for factor in (2.0, 2.5, 2.0):
            step *= factor
            if length / step <= 8:
                break
    first = -(-start // step)
    count = int((end - first * step) / step * (1 + 1e-12) + 1e-9)
    return [round((first + number) * step, 12) for number in range(count + 1)]

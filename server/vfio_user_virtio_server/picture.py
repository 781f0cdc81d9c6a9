"""A report as a picture: the phases as bars on a time line, memory and packets as lanes below them.

Two scales, because the phases that matter are the shortest: all of it, and below it the time in
which no device ran, as wide as the page.  Bars too short to be seen are drawn a pixel wide, and
each row says its length in words.  What failed is drawn as far as it came, with why above it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vfio_user_virtio.limits import PAGE_SIZE
from vfio_user_virtio_server.drawing import INK, Drawing, escaped
from vfio_user_virtio_server.pings import Answers
from vfio_user_virtio_server.words import amount, duration, rate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfio_user_virtio_server.pings import Ping
    from vfio_user_virtio_server.report import Report
    from vfio_user_virtio_server.spans import Span

_WIDTH: Final = 1040
_LEFT: Final = 160
_RIGHT: Final = 750
"""Where time begins and ends; what is moved stands right of it."""
_ROW: Final = 24
_BAR: Final = 14
_LANE: Final = 64
"""Height of the lane of packets, and of that of memory."""
_MAX_PINGS: Final = 5_000
"""Packets that are drawn one by one; of more, the worst of each group."""
_MAX_POINTS: Final = 2_000
"""Points of a curve."""

_RUNS: Final = "#4878a8"
_DOWN: Final = "#d1603d"
_BAND: Final = "#fbe9e3"
_ANSWERED: Final = "#3f8f5b"
_LOST: Final = "#b3202c"
_FAINT: Final = "#6b7785"
_GRID: Final = "#e3e7ec"


def page(report: Report) -> str:
    """An HTML page: the picture, and the phases as a table."""
    rows = "".join(
        f"<tr{_row(span)}><th>{escaped(span.name)}</th>"
        f"<td>{duration(span.start - report.zero)}</td><td>{duration(span.seconds)}</td>"
        f"<td>{span.byte_count:,}</td><td>{span.page_count:,}</td>"
        f"<td>{escaped('; '.join(_beside(span)))}</td></tr>"
        for span in report.spans
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escaped(report.title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{svg(report)}\n<table><thead><tr><th>phase</th><td>from</td><td>for</td>"
        "<td>bytes</td><td>pages</td><td></td></tr></thead>"
        f"<tbody>{rows}</tbody></table>\n</body></html>\n"
    )


def _row(span: Span) -> str:
    return ' class="undone"' if span.undone else ' class="down"' if span.down else ""


_STYLE: Final = (
    f"body{{font:14px sans-serif;color:{INK};background:#fff;max-width:{_WIDTH}px;"
    "margin:2em auto}svg{width:100%;height:auto}"
    "table{border-collapse:collapse;margin-top:1em}"
    "th{text-align:left;font-weight:normal}td{text-align:right}"
    f"th,td{{padding:.2em 1.2em .2em 0;border-bottom:1px solid {_GRID}}}"
    f"thead th,thead td{{color:{_FAINT}}}.down th{{color:{_DOWN}}}"
    f".undone{{color:{_LOST}}}"
)


def svg(report: Report) -> str:
    """The picture alone."""
    drawing = Drawing(_WIDTH)
    drawing.y = 20
    drawing.paragraph(0, report.title, _WIDTH, size=18)
    if report.failure:
        drawing.paragraph(0, report.failure, _WIDTH, _LOST)
        drawing.y += 4
    for name, value in [*report.facts.items(), *_summary(report)]:
        drawing.text(0, drawing.y, name, colour=_FAINT)
        drawing.paragraph(_LEFT, value, _WIDTH - _LEFT)
    if report.spans:
        drawing.y += 4
        _legend(drawing, report)
        _panel(drawing, report, report.start, report.end, list(report.spans), report.zero)
    down = report.down
    if report.spans and down is not None:
        drawing.y += 40
        drawing.text(0, drawing.y, "While nothing ran", size=15)
        drawing.y += 16
        margin = (down[1] - down[0]) * 0.04
        inside = [span for span in report.spans if span.down]
        _panel(drawing, report, down[0] - margin, down[1] + margin, inside, down[0])
    return drawing.done()


def _summary(report: Report) -> Iterator[tuple[str, str]]:
    if not report.spans:
        return
    yield "in all", duration(max(span.end for span in report.spans) - report.zero)
    down = report.down
    if down is not None:
        yield "downtime", duration(down[1] - down[0])
    byte_count = sum(span.byte_count for span in report.spans)
    pages = sum(span.page_count for span in report.spans)
    moved = f"{byte_count:,} bytes" + (f" and {pages:,} pages" if pages else "")
    busy = sum(span.seconds for span in report.spans if span.byte_count or span.page_count)
    if busy > 0:
        moved += f", {rate((byte_count + PAGE_SIZE * pages) / busy)} in the phases that moved them"
    if byte_count or pages:
        yield "moved", moved
    if report.pings:
        yield "packets", str(Answers.of(report.pings))


def _legend(drawing: Drawing, report: Report) -> None:
    """What the colours mean, of those that are there."""
    x = float(_LEFT)
    for colour, meaning in _COLOURS.items():
        if any(_colour(span) == colour for span in report.spans):
            drawing.box(x, drawing.y - 9, 10, 10, colour)
            drawing.text(x + 16, drawing.y, meaning, _FAINT, size=12)
            x += 130
    drawing.y += 10


def _colour(span: Span) -> str:
    return _LOST if span.undone else _DOWN if span.down else _RUNS


_COLOURS: Final = {_RUNS: "it runs", _DOWN: "nothing runs", _LOST: "not done"}


def _panel(
    drawing: Drawing,
    report: Report,
    start: float,
    end: float,
    spans: list[Span],
    zero: float,
) -> None:
    """Rows of phases, lanes of memory and packets, and an axis from `start` to `end`."""
    length = max(end - start, 1e-9)

    def x(time: float) -> float:
        return _LEFT + (min(max(time, start), end) - start) / length * (_RIGHT - _LEFT)

    pings = [ping for ping in report.pings if start <= ping.sent <= end]
    left = [(x(time), size) for time, size in report.left if start <= time <= end]
    top = drawing.y
    bottom = top + _ROW * len(spans) + _LANE * (bool(pings) + (len(left) > 1))
    if report.down is not None:
        band, width = x(report.down[0]), x(report.down[1]) - x(report.down[0])
        drawing.box(band, top, max(width, 1), bottom - top, _BAND)
    for tick in ticks(start - zero, end - zero):
        drawing.line(x(tick + zero), top, x(tick + zero), bottom, _GRID)
        drawing.text(x(tick + zero), bottom + 16, duration(tick), _FAINT, "middle", 11)
    for span in spans:
        middle = drawing.y + _ROW / 2
        drawing.text(0, middle + 4, span.name)
        width = max(x(span.end) - x(span.start), 1)
        drawing.box(x(span.start), middle - _BAR / 2, width, _BAR, _colour(span))
        words = _LOST if span.undone else INK
        drawing.text(_RIGHT + 14, middle + 4, _moved(span), words, size=12)
        drawing.y += _ROW
    if len(left) > 1:
        _memory(drawing, left)
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
    return ", ".join([*said, *_beside(span)])


def _beside(span: Span) -> list[str]:
    return [said for said in (span.undone, span.note) if said]


def _memory(drawing: Drawing, points: list[tuple[float, int]]) -> None:
    """How much was still to be sent."""
    every = -(-len(points) // _MAX_POINTS)
    shown = [*points[:-1:every], points[-1]]
    most = max(size for _, size in shown)
    top, room = drawing.y + 8, _LANE - 16
    drawing.text(0, top + room / 2 + 4, "memory left")
    drawing.text(_RIGHT + 14, top + 6, amount(most), _FAINT, size=11)
    drawing.text(_RIGHT + 14, top + room + 4, "0", _FAINT, size=11)
    scale = room / max(most, 1)
    drawing.curve([(x, top + room - size * scale) for x, size in shown], _RUNS)
    drawing.y += _LANE


def _lane(drawing: Drawing, pings: list[Ping], x: Callable[[float], float]) -> None:
    """A dot for each answer, as high as it took long; a cross for each that never came."""
    shown = list(_thinned(pings))
    took = [ping.answered - ping.sent for ping in shown if ping.answered is not None]
    most = max(took, default=0.0)
    top, room = drawing.y + 8, _LANE - 16
    drawing.text(0, top + room / 2 + 4, "packets")
    lost = len(shown) - len(took)
    said = f"{duration(most)} round trip" + ("; \N{MULTIPLICATION SIGN} no answer" if lost else "")
    drawing.text(_RIGHT + 14, top + 6, said, _FAINT, size=11)
    drawing.text(_RIGHT + 14, top + room + 4, "0", _FAINT, size=11)
    for ping in shown:
        if ping.answered is None:
            drawing.cross(x(ping.sent), top, _LOST)
        else:
            high = (ping.answered - ping.sent) / most * room if most > 0 else 0
            drawing.dot(x(ping.sent), top + room - high, _ANSWERED)
    drawing.y += _LANE


def _thinned(pings: list[Ping]) -> Iterator[Ping]:
    """All of them; of too many, the unanswered ones and the slowest of each group."""
    group = -(-len(pings) // _MAX_PINGS)
    for first in range(0, len(pings), group):
        some = pings[first : first + group]
        yield max(some, key=_took)


def _took(ping: Ping) -> float:
    return float("inf") if ping.answered is None else ping.answered - ping.sent


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

"""The report: what is drawn is what was told, at the right place, and it is well formed."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server import report
from vfio_user_virtio_server.report import Ping, Report
from vfio_user_virtio_server.spans import Span

if TYPE_CHECKING:
    from pathlib import Path

SVG: Final = "{http://www.w3.org/2000/svg}"
SPANS: Final = [
    Span("prepare", 100.0, 1.0),
    Span("pre-copy", 101.0, 2.0, 4_000_000),
    Span("stop", 103.0, 0.25, down=True),
    Span("copy", 103.25, 0.5, 1_000, 256, down=True),
    Span("finish", 103.75, 0.25),
]
PINGS: Final = [
    Ping(100.0, 100.002),
    Ping(102.0, 102.001),
    Ping(103.5, None),
    Ping(103.7, 103.9),
]
WHOLE: Final = Report("a to b", SPANS, PINGS, {"source": "QEMU <11> & co"})


def texts(root: ET.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def boxes(root: ET.Element, colour: str) -> list[tuple[float, float]]:
    """From and to, across, in pixels."""
    found = [one.attrib for one in root.iter(f"{SVG}rect") if one.attrib["fill"] == colour]
    return [(float(one["x"]), float(one["x"]) + float(one["width"])) for one in found]


def test_what_is_said() -> None:
    said = texts(ET.fromstring(report.svg(WHOLE)))
    assert said[0] == "a to b"
    assert "QEMU <11> & co" in said
    assert said[said.index("in all") + 1] == "4 s"
    assert said[said.index("downtime") + 1] == "750 ms"
    moved = said[said.index("moved") + 1]
    assert moved == "4,001,000 bytes and 256 pages, 2.02 MB/s in the phases that moved them"
    packets = said[said.index("packets") + 1]
    assert packets == "4 sent, 1 unanswered, the slowest after 200 ms"
    assert said.count("500 ms, 1,000 bytes, 256 pages") == 2, "in both panels"
    assert said.count("2 s, 4,000,000 bytes") == 1
    assert "While nothing ran" in said


def test_where_it_is_drawn() -> None:
    root = ET.fromstring(report.svg(WHOLE))
    runs, down = boxes(root, report._RUNS), boxes(root, report._DOWN)
    left, right = report._LEFT, report._RIGHT
    length = right - left
    assert runs[0] == pytest.approx((left, left + length / 4), abs=0.1)
    assert runs[1] == pytest.approx((left + length / 4, left + length * 3 / 4), abs=0.1)
    assert runs[2] == pytest.approx((left + length * 15 / 16, right), abs=0.1)
    assert len(down) == 4, "two phases in two panels"
    assert down[0][1] - down[0][0] == pytest.approx(length / 16, abs=0.1)
    assert down[3][1] - down[3][0] == pytest.approx(2 * (down[2][1] - down[2][0]), abs=0.1)
    band = boxes(root, report._BAND)[0]
    assert band == pytest.approx((down[0][0], down[1][1]), abs=0.1)
    dots = [float(one.attrib["cx"]) for one in root.iter(f"{SVG}circle")]
    assert dots[:2] == pytest.approx([left, left + length / 2], abs=0.1)
    crosses = [one.attrib for one in root.iter(f"{SVG}path")]
    assert len(crosses) == 2
    assert all(one["stroke"] == report._LOST for one in crosses)


def test_a_page_has_the_picture_and_a_table() -> None:
    page = report.page(WHOLE)
    assert page.startswith("<!DOCTYPE html>")
    assert report.svg(WHOLE) in page
    (row,) = re.findall(r'<tr class="down"><th>copy</th>(.*?)</tr>', page)
    assert re.findall(r"<td>(.*?)</td>", row) == ["3.25 s", "500 ms", "1,000", "256"]
    assert not re.search(r"(src|href)=|url\(|<script", page), "it needs nothing else"


def test_nothing_stopped_and_nothing_there() -> None:
    said = texts(ET.fromstring(report.svg(Report("x", SPANS[:2]))))
    assert "While nothing ran" not in said
    assert "downtime" not in said
    ET.fromstring(report.svg(Report("nothing at all", [])))
    ET.fromstring(report.svg(Report("no time", [Span("at once", 5.0, down=True)])))


def test_of_many_packets_the_worst_are_kept() -> None:
    pings = [Ping(n / 1000, n / 1000 + 0.001) for n in range(40_000)]
    pings[20_001] = Ping(20.001, None)
    pings[30_001] = Ping(30.001, 30.501)
    root = ET.fromstring(report.svg(Report("x", [Span("all", 0.0, 40.0)], pings)))
    assert len(list(root.iter(f"{SVG}circle"))) == report._MAX_PINGS - 1
    assert len(list(root.iter(f"{SVG}path"))) == 1
    assert "40,000 sent, 1 unanswered, the slowest after 500 ms" in texts(root)


names = st.text(max_size=10)
times = st.floats(0, 1e6)


@given(
    names,
    st.lists(st.builds(Span, names, times, times, st.integers(0, 1 << 60), down=st.booleans())),
    st.lists(st.builds(Ping, times, st.none() | times), max_size=5),
)
def test_it_is_well_formed_whatever_it_is_told(
    title: str, spans: list[Span], pings: list[Ping]
) -> None:
    drawn = Report(title, spans, pings)
    root = ET.fromstring(report.svg(drawn))
    shapes = [*root.iter(f"{SVG}circle"), *root.iter(f"{SVG}line"), *root.iter(f"{SVG}rect")]
    for shape in shapes:
        for name, value in shape.attrib.items():
            if name in ("cx", "x", "x1", "x2"):
                assert -16 <= float(value) <= report._WIDTH + 16


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
    assert report.duration(seconds) == text


def test_rates() -> None:
    assert [report.rate(value) for value in (5, 1500, 2.5e6, 1.2e9)] == [
        "5 B/s",
        "1.5 kB/s",
        "2.5 MB/s",
        "1.2 GB/s",
    ]


@given(st.floats(-1e5, 1e5), st.floats(1e-6, 1e5))
def test_ticks_are_inside_and_few(start: float, length: float) -> None:
    found = report.ticks(start, start + length)
    assert 2 <= len(found) <= 9
    slack = length * 1e-6 + 1e-9
    assert start - slack <= found[0]
    assert found[-1] <= start + length + slack


def test_files(tmp_path: Path) -> None:
    report.write(str(tmp_path / "r.svg"), WHOLE)
    assert (tmp_path / "r.svg").read_text().startswith("<svg ")
    report.write(str(tmp_path / "r.html"), WHOLE)
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE")
    report.make(str(tmp_path / "r.html"))
    assert (tmp_path / "r.html").stat().st_size
    for attempt in (report.make, lambda path: report.write(path, WHOLE)):
        with pytest.raises(HostError, match="cannot write the report to /nonexistent") as caught:
            attempt("/nonexistent/r.svg")
        assert caught.value.exit_code == os.EX_CANTCREAT
    assert report.check_path("a.svg") == "a.svg"
    with pytest.raises(ValueError, match=r"ends in \.html or \.svg"):
        report.check_path("a.png")

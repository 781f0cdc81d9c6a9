"""The picture: what is drawn is what was told, at the right place, and it is well formed."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio_server import picture
from vfio_user_virtio_server.pings import Ping
from vfio_user_virtio_server.report import Report
from vfio_user_virtio_server.spans import Span

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
    """From and to, across, in pixels; not those that say what colours mean."""
    found = [one.attrib for one in root.iter(f"{SVG}rect") if one.attrib["fill"] == colour]
    return [
        (float(one["x"]), float(one["x"]) + float(one["width"]))
        for one in found
        if float(one["height"]) > 10
    ]


def test_what_is_said() -> None:
    said = texts(ET.fromstring(picture.svg(WHOLE)))
    assert said[0] == "a to b"
    assert "QEMU <11> & co" in said
    assert said[said.index("in all") + 1] == "4 s"
    assert said[said.index("downtime") + 1] == "750 ms"
    moved = said[said.index("moved") + 1]
    assert moved == "4,001,000 bytes and 256 pages, 2.02 MB/s in the phases that moved them"
    packets = said[said.index("packets") + 1]
    assert packets == "4 sent, 1 unanswered, the slowest after 200 ms; no answer for 2 s at most"
    assert said.count("500 ms, 1,000 bytes, 256 pages") == 2, "in both panels"
    assert said.count("2 s, 4,000,000 bytes") == 1
    assert "While nothing ran" in said


def test_where_it_is_drawn() -> None:
    root = ET.fromstring(picture.svg(WHOLE))
    runs, down = boxes(root, picture._RUNS), boxes(root, picture._DOWN)
    left, right = picture._LEFT, picture._RIGHT
    length = right - left
    assert runs[0] == pytest.approx((left, left + length / 4), abs=0.1)
    assert runs[1] == pytest.approx((left + length / 4, left + length * 3 / 4), abs=0.1)
    assert runs[2] == pytest.approx((left + length * 15 / 16, right), abs=0.1)
    assert len(down) == 4, "two phases in two panels"
    assert down[0][1] - down[0][0] == pytest.approx(length / 16, abs=0.1)
    assert down[3][1] - down[3][0] == pytest.approx(2 * (down[2][1] - down[2][0]), abs=0.1)
    band = boxes(root, picture._BAND)[0]
    assert band == pytest.approx((down[0][0], down[1][1]), abs=0.1)
    dots = [float(one.attrib["cx"]) for one in root.iter(f"{SVG}circle")]
    assert dots[:2] == pytest.approx([left, left + length / 2], abs=0.1)
    crosses = [one.attrib for one in root.iter(f"{SVG}path")]
    assert len(crosses) == 2
    assert all(one["stroke"] == picture._LOST for one in crosses)


def test_a_page_has_the_picture_and_a_table() -> None:
    page = picture.page(WHOLE)
    assert page.startswith("<!DOCTYPE html>")
    assert picture.svg(WHOLE) in page
    (row,) = re.findall(r'<tr class="down"><th>copy</th>(.*?)</tr>', page)
    assert re.findall(r"<td>(.*?)</td>", row) == ["3.25 s", "500 ms", "1,000", "256", ""]
    assert not re.search(r"(src|href)=|url\(|<script", page), "it needs nothing else"


def test_nothing_stopped_and_nothing_there() -> None:
    said = texts(ET.fromstring(picture.svg(Report("x", SPANS[:2]))))
    assert "While nothing ran" not in said
    assert "downtime" not in said
    ET.fromstring(picture.svg(Report("nothing at all", [])))
    ET.fromstring(picture.svg(Report("no time", [Span("at once", 5.0, down=True)])))


def test_of_many_packets_the_worst_are_kept() -> None:
    pings = [Ping(n / 1000, n / 1000 + 0.001) for n in range(40_000)]
    pings[20_001] = Ping(20.001, None)
    pings[30_001] = Ping(30.001, 30.501)
    root = ET.fromstring(picture.svg(Report("x", [Span("all", 0.0, 40.0)], pings)))
    assert len(list(root.iter(f"{SVG}circle"))) == picture._MAX_PINGS - 1
    assert len(list(root.iter(f"{SVG}path"))) == 1
    (said,) = [text for text in texts(root) if text.startswith("40,000 sent, 1 unanswered")]
    assert "the slowest after 500 ms" in said


def test_what_failed_is_drawn_as_far_as_it_came() -> None:
    why = "copy: it is no longer there; " + "and so on " * 30
    spans = [*SPANS[:3], Span("copy", 103.25, 0.5, down=True, undone="failed", note="of two")]
    spans.append(Span("undo stop", 103.75, 0.25, down=True))
    root = ET.fromstring(picture.svg(Report("a to b", spans, failure=why)))
    said = texts(root)
    assert " ".join(said[1:5]).startswith(why.strip()), "in several lines"
    assert said.count("500 ms, failed, of two") == 2
    left, right = picture._LEFT, picture._RIGHT
    assert boxes(root, picture._LOST)[0] == pytest.approx(
        (left + (right - left) * 3.25 / 4, left + (right - left) * 3.75 / 4), abs=0.1
    )
    assert {"it runs", "nothing runs", "not done"} <= set(said)
    page = picture.page(Report("a to b", spans))
    (row,) = re.findall(r'<tr class="undone"><th>copy</th>(.*?)</tr>', page)
    assert "<td>failed; of two</td>" in row
    assert "not done" not in texts(ET.fromstring(picture.svg(WHOLE)))


def test_only_why_it_was_not_begun() -> None:
    said = texts(ET.fromstring(picture.svg(Report("a to b", [], failure="no"))))
    assert said == ["a to b", "no"]


def test_memory_that_is_left() -> None:
    points = [(101.0 + n / 1000, 2_000_000 - 1000 * n) for n in range(1901)]
    root = ET.fromstring(picture.svg(Report("x", SPANS, left=points)))
    (curve,) = root.iter(f"{SVG}polyline")
    drawn = [tuple(map(float, one.split(","))) for one in curve.attrib["points"].split()]
    left, right = picture._LEFT, picture._RIGHT
    assert drawn[0][0] == pytest.approx(left + (right - left) / 4, abs=0.1)
    assert drawn[-1][0] == pytest.approx(left + (right - left) * 2.9 / 4, abs=0.1)
    assert drawn[-1][1] - drawn[0][1] == pytest.approx((picture._LANE - 16) * 0.95, abs=0.1)
    assert "2 MB" in texts(root)
    many = [(101.0 + n / 10_000, 1) for n in range(19_000)]
    root = ET.fromstring(picture.svg(Report("x", SPANS, left=many)))
    (curve,) = root.iter(f"{SVG}polyline")
    assert len(curve.attrib["points"].split()) <= picture._MAX_POINTS + 1


def test_what_is_known_better_than_by_the_phases() -> None:
    root = ET.fromstring(picture.svg(Report("x", SPANS, stopped=(102.0, 104.0))))
    left, right = picture._LEFT, picture._RIGHT
    assert boxes(root, picture._BAND)[0] == pytest.approx(((left + right) / 2, right), abs=0.1)
    said = texts(root)
    assert said[said.index("downtime") + 1] == "2 s"


def test_words_stay_on_the_page() -> None:
    long = "/a/long/path" * 20
    root = ET.fromstring(picture.svg(Report(long, SPANS, facts={"source": long})))
    for text in texts(root):
        assert len(text) < 140


names = st.text(max_size=10)
times = st.floats(0, 1e6)


@given(
    names,
    st.lists(
        st.builds(
            Span,
            names,
            times,
            times,
            st.integers(0, 1 << 60),
            down=st.booleans(),
            undone=names,
            note=names,
        )
    ),
    st.lists(st.builds(Ping, times, st.none() | times), max_size=5),
    st.lists(st.tuples(times, st.integers(0, 1 << 60)), max_size=5),
)
def test_it_is_well_formed_whatever_it_is_told(
    title: str, spans: list[Span], pings: list[Ping], left: list[tuple[float, int]]
) -> None:
    drawn = Report(title, spans, pings, {title: title}, title, left)
    root = ET.fromstring(picture.svg(drawn))
    shapes = [*root.iter(f"{SVG}circle"), *root.iter(f"{SVG}line"), *root.iter(f"{SVG}rect")]
    for shape in shapes:
        for name, value in shape.attrib.items():
            if name in ("cx", "x", "x1", "x2"):
                assert -16 <= float(value) <= picture._WIDTH + 16


@given(st.floats(-1e5, 1e5), st.floats(1e-6, 1e5))
def test_ticks_are_inside_and_few(start: float, length: float) -> None:
    found = picture.ticks(start, start + length)
    assert 2 <= len(found) <= 9
    slack = length * 1e-6 + 1e-9
    assert start - slack <= found[0]
    assert found[-1] <= start + length + slack

"""Each benchmark runs, in a form that proves no more than that.  No time is asserted."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from tests.bench import __main__ as bench
from tests.bench.contenders import ECHO
from tests.bench.effort import TINY
from tests.bench.figures import NATIVE, Better, Figure, at_least, at_most
from tests.bench.inside import publish_all, tell
from tests.bench.report import TIMES, document, table, write_json

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed

NEED_GUEST = ("guest", "migrate-vm")
NEED_INNER_HOST = [name for name in bench.BENCHMARKS if name.startswith("physical-")]


def check(figures: list[Figure]) -> None:
    assert figures
    for figure in figures:
        assert NATIVE in figure.columns
        assert all(figure.columns.values())
        assert len({len(samples) for samples in figure.columns.values()}) == 1
        assert figure.name in table(figures)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in bench.BENCHMARKS if name not in (*NEED_GUEST, *NEED_INNER_HOST)]
)
async def test_benchmark_runs(name: str, namespaces: None) -> None:
    check(await bench.measure([name], TINY))


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("name", NEED_GUEST)
async def test_guest_benchmark_runs(name: str, bed: Bed, namespaces: None) -> None:
    figures = await bench.measure([name], TINY)
    check(figures)
    busy = [figure for figure in figures if figure.peer]
    assert all(
        value > 0 for figure in busy for column in figure.columns.values() for value in column
    )


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("name", NEED_INNER_HOST)
async def test_inner_host_benchmark_runs(bed: Bed, name: str) -> None:
    check(await bench.measure([name], TINY))


def test_ratio_is_the_median_of_the_pairs() -> None:
    """A disturbance that both sides of a pair see does not show."""
    columns = {NATIVE: [10.0, 30.0, 11.0], ECHO: [5.0, 15.0, 11.0]}
    figure = Figure("f", "µs", Better.LESS, columns, ECHO, at_most(2, of_ratio=True))
    assert figure.ratio(NATIVE) == 2
    assert figure.meets_aim(NATIVE) is True
    assert figure.median(NATIVE) == 11


def test_figures_come_out_of_an_inner_host(capsys: pytest.CaptureFixture[str]) -> None:
    columns = {NATIVE: [10.0], ECHO: [8.0]}
    told = [
        Figure("f", "packets/s", Better.MORE, columns, ECHO, at_least(1.2, of_ratio=True)),
        Figure("g", "µs", Better.LESS, {NATIVE: [1.0]}),
    ]
    for figure in told:
        tell(figure)
    found: list[Figure] = []
    publish_all("something else\n" + capsys.readouterr().out, found.append)
    assert found == told


def test_aims() -> None:
    columns = {NATIVE: [10.0], "another": [8.0], ECHO: [8.0]}
    more = Figure("f", "packets/s", Better.MORE, columns, ECHO, at_least(1.2, of_ratio=True))
    assert [more.meets_aim(engine) for engine in more.engines] == [True, False]
    less = Figure("f", "ms", Better.LESS, columns, ECHO, at_most(9))
    assert [less.meets_aim(engine) for engine in less.engines] == [False, True]


def test_no_ratio_to_nothing() -> None:
    figure = Figure("f", "", Better.LESS, {NATIVE: [1.0], ECHO: [0.0]}, ECHO, at_most(0))
    assert figure.ratio(NATIVE) is None
    assert figure.meets_aim(NATIVE) is False


def test_a_further_engine_is_a_further_column(tmp_path: Path) -> None:
    both = {NATIVE: [2.0], "another": [1.0], ECHO: [1.0]}
    figures = [
        Figure("both", "µs", Better.LESS, both, ECHO, at_most(1.5, of_ratio=True)),
        Figure("one", "KiB", Better.LESS, {NATIVE: [1234.0]}, aim=at_most(2000)),
    ]
    head, _, first, second = table(figures).replace(TIMES, "x").splitlines()
    assert re.split(" {2,}", head.strip())[1:] == [
        *(NATIVE, "another", "peer", "aim"),
        *(f"aim, {NATIVE}", "aim, another"),
    ]
    assert re.split(" {2,}", first)[2:] == [
        *("2 (2.00 x)", "1 (1.00 x)", "1", "trio echo", "≤ 1.5 x"),
        *("missed", "met"),
    ]
    assert second.split() == ["one", "KiB", "1,234", "≤", "2000", "met"]
    path = tmp_path / "figures.json"
    write_json(path, figures, TINY)
    written = json.loads(path.read_text())
    assert written["figures"] == document(figures, TINY)["figures"]
    assert written["figures"][0]["columns"]["another"]["ratio"] == 1

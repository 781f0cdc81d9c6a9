"""Figures as a table for people and as JSON for programs."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from tests.bench.figures import Better

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.effort import Effort
    from tests.bench.figures import Figure

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

TIMES: Final = "\N{MULTIPLICATION SIGN}"
_VERDICTS: Final = {None: "", True: "met", False: "missed"}


def table(figures: Sequence[Figure]) -> str:
    """One line per figure; one column per engine, with its ratio to the peer."""
    engines = list(dict.fromkeys(engine for figure in figures for engine in figure.engines))
    rows = [["", "unit", *engines, "peer", "", "aim", *(f"aim, {name}" for name in engines)]]
    for figure in figures:
        row = [figure.name, figure.unit]
        row += [value(figure, engine) for engine in engines]
        row += [number(figure.median(figure.peer)), figure.peer] if figure.peer else ["", ""]
        row.append(aim(figure))
        row += [
            _VERDICTS[figure.meets_aim(engine)] if engine in figure.columns else ""
            for engine in engines
        ]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def value(figure: Figure, engine: str) -> str:
    """The median and, where there is a peer, the ratio."""
    if engine not in figure.columns:
        return ""
    text = number(figure.median(engine))
    ratio = figure.ratio(engine)
    return text if ratio is None else f"{text} ({ratio:.2f} {TIMES})"


def aim(figure: Figure) -> str:
    if figure.aim is None:
        return ""
    sign = "≤" if figure.better is Better.LESS else "≥"
    return f"{sign} {figure.aim.limit:g}{f' {TIMES}' if figure.aim.of_ratio else ''}"


def number(value: float) -> str:
    """Three significant digits at least."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def document(figures: Sequence[Figure], effort: Effort) -> dict[str, Json]:
    """All figures with all their samples, and where and when they were taken."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "effort": effort.name,
        "pinned": effort.pinned,
        "machine": machine(),
        "figures": [_figure(figure) for figure in figures],
    }


def machine() -> dict[str, Json]:
    return {
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _figure(figure: Figure) -> dict[str, Json]:
    columns: dict[str, Json] = {}
    for name, samples in figure.columns.items():
        column: dict[str, Json] = {"median": figure.median(name), "samples": list(samples)}
        if name != figure.peer:
            column["ratio"] = figure.ratio(name)
            column["meets_aim"] = figure.meets_aim(name)
        columns[name] = column
    return {
        "name": figure.name,
        "unit": figure.unit,
        "better": figure.better.value,
        "peer": figure.peer,
        "aim": aim(figure) or None,
        "columns": columns,
    }


def write_json(path: Path, figures: Sequence[Figure], effort: Effort) -> None:
    path.write_text(json.dumps(document(figures, effort), indent=1, ensure_ascii=False) + "\n")

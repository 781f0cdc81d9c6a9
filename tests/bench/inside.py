"""Figures across the border of an inner host: what is measured inside is printed there as JSON, and
published outside."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

import attrs

from tests.bench.figures import Aim, Better, Figure

if TYPE_CHECKING:
    from tests.bench.figures import Publish

MARK: Final = "figure: "


def tell(figure: Figure) -> None:
    """To be used inside."""
    row = attrs.asdict(figure) | {"better": figure.better.value}
    print(MARK + json.dumps(row), flush=True)


def publish_all(output: str, publish: Publish) -> None:
    """Every figure that a program inside has printed."""
    for line in output.splitlines():
        if line.startswith(MARK):
            row = json.loads(line.removeprefix(MARK))
            aim = Aim(**row.pop("aim")) if row["aim"] else row.pop("aim")
            publish(Figure(better=Better(row.pop("better")), aim=aim, **row))

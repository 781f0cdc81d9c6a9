"""An SVG that is drawn from top to bottom: the few shapes that `report` is made of."""

from __future__ import annotations

import html
import textwrap
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

INK: Final = "#1d2733"

_LETTER: Final = 0.62
"""How wide a letter is on average, in sizes of the widest of the usual fonts."""
_LINE: Final = 1.45
"""From one line to the next, in sizes."""


class Drawing:
    """Shapes on a white page of `width`; it is as high as `y` has come.  Lengths are in pixels."""

    def __init__(self, width: int) -> None:
        self.y: float = 0
        self._width = width
        self._shapes: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        text: str,
        colour: str = INK,
        anchor: str = "start",
        size: int = 13,
    ) -> None:
        """`y` is the line that the letters stand on."""
        self._shapes.append(
            f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" '
            f'text-anchor="{anchor}">{escaped(text)}</text>'
        )

    def paragraph(
        self, x: float, text: str, width: float, colour: str = INK, size: int = 13
    ) -> None:
        """Lines of `width` at most, the first of them at `y`, which is then below the last."""
        letters = max(int(width / (size * _LETTER)), 1)
        for line in textwrap.wrap(text, letters, break_on_hyphens=False) or [""]:
            self.text(x, self.y, line, colour, size=size)
            self.y += size * _LINE

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self._shapes.append(
            f'<rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}" '
            f'fill="{colour}"/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str) -> None:
        self._shapes.append(
            f'<line x1="{x1:.2f}" y1="{y1:.1f}" x2="{x2:.2f}" y2="{y2:.1f}" stroke="{colour}"/>'
        )

    def curve(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        joined = " ".join(f"{x:.2f},{y:.1f}" for x, y in points)
        self._shapes.append(
            f'<polyline points="{joined}" stroke="{colour}" stroke-width="1.6" fill="none"/>'
        )

    def dot(self, x: float, y: float, colour: str) -> None:
        self._shapes.append(f'<circle cx="{x:.2f}" cy="{y:.1f}" r="2" fill="{colour}"/>')

    def cross(self, x: float, y: float, colour: str) -> None:
        self._shapes.append(
            f'<path d="M{x - 3:.2f} {y - 3:.1f}l6 6m0 -6l-6 6" stroke="{colour}" '
            'stroke-width="1.6" fill="none"/>'
        )

    def done(self) -> str:
        """The whole file."""
        height = round(self.y + 12)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self._width + 32}" '
            f'height="{height + 32}" viewBox="-16 -16 {self._width + 32} {height + 32}" '
            'font-family="sans-serif">\n'
            f'<rect x="-16" y="-16" width="{self._width + 32}" height="{height + 32}" '
            'fill="#fff"/>\n' + "\n".join(self._shapes) + "\n</svg>\n"
        )


def escaped(text: str) -> str:
    """Text for XML; what cannot be printed is replaced."""
    return html.escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))

"""One line on standard error that says how far it is, if that is a terminal; gone in the end."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Final

import trio

_REDRAW_SECONDS: Final = 0.1
_UNKNOWN_COLUMNS: Final = 1000
_CLEAR_LINE: Final = "\r\33[K"


class ProgressLine:
    """Drawn anew when the phase changes, and within one ten times a second at most."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty()
        self._shown = ""
        self._redraw_at = 0.0

    def show(self, phase: str, byte_count: int, page_bytes: int = 0) -> None:
        """The phase, and what has moved so far."""
        pages = f", {page_bytes >> 20:,} MiB of guest memory" if page_bytes else ""
        self.say(phase, f"{byte_count:,} bytes{pages}")

    def say(self, phase: str, words: str) -> None:
        """The phase, and anything else; as much as fits in the line."""
        now = trio.current_time()
        if not self._on or (phase == self._shown and now < self._redraw_at):
            return
        self._shown, self._redraw_at = phase, now + _REDRAW_SECONDS
        line = f"{phase}: {words}"[: _columns() - 1]
        self._write(f"{_CLEAR_LINE}{line}")

    def clear(self) -> None:
        if self._shown:
            self._write(_CLEAR_LINE)
            self._shown = ""

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def _columns() -> int:
    """How wide the terminal is, as far as it can be told."""
    with contextlib.suppress(OSError):
        return os.get_terminal_size(sys.stderr.fileno()).columns or _UNKNOWN_COLUMNS
    return _UNKNOWN_COLUMNS

"""An account of what happens: one line per event, with the time and who did it.

Plain lines in order of time, so that a terminal, a pipe and a log show the same thing.  Colour is
for terminals only, and for those who have not set NO_COLOR (no-color.org).
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import textwrap
import time
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DIM: Final = "\x1b[2m"
PLAIN: Final = "\x1b[0m"
COLOURS: Final = {"server": "\x1b[36m", "qemu": "\x1b[35m", "guest": "\x1b[33m", "wire": "\x1b[34m"}
GOOD: Final = "\x1b[32m"
BAD: Final = "\x1b[31m"
HEAD_WIDTH: Final = len("   0.0 s  server  ")
FOLLOW_SECONDS: Final = 0.03


class Account:
    """Tells on standard output; times are seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._coloured = terminal and not os.environ.get("NO_COLOR")
        self._width = shutil.get_terminal_size((100, 24)).columns
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # for terminals without arrows

    def tell(self, who: str, what: str) -> None:
        """One event, broken into lines that fit."""
        seconds = f"{time.monotonic() - self._start:6.1f} s"
        lines = textwrap.wrap(
            what,
            max(self._width - HEAD_WIDTH, 40),
            break_long_words=False,
            break_on_hyphens=False,
        )
        head = f"{self._paint(DIM, seconds)}  {self._paint(COLOURS.get(who, ''), f'{who:<7}')} "
        self._print(head + ("\n" + " " * HEAD_WIDTH).join(lines))

    def title(self, text: str) -> None:
        self._print(text + "\n")

    def gap(self) -> None:
        self._print("")

    def verdict(self, text: str, *, good: bool) -> None:
        self._print(self._paint(GOOD if good else BAD, text))

    @staticmethod
    def _print(text: str) -> None:
        try:
            print(text, flush=True)
        except BrokenPipeError:  # the reader has enough; what runs is to end in order all the same
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _paint(self, colour: str, text: str) -> str:
        return f"{colour}{text}{PLAIN}" if self._coloured and colour else text


class Follower:
    """Hands each line that is added to a file, which need not be there yet, to `take`."""

    def __init__(self, path: Path, take: Callable[[str], None]) -> None:
        self._path = path
        self._take = take
        self._offset = 0

    def catch_up(self) -> None:
        """What has been added since the last time, but for a line that is not yet whole."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        for line in whole.decode(errors="replace").splitlines():
            self._take(line)


async def follow(*followers: Follower) -> None:
    """Until cancelled.  A file cannot be waited for, so it is looked at now and then."""
    while True:
        for follower in followers:
            follower.catch_up()
        await trio.sleep(FOLLOW_SECONDS)


def server_line(account: Account) -> Callable[[str], None]:
    """Tells the lines of the server's log, without the time and level that they start with."""

    def take(line: str) -> None:
        _, _, rest = line.partition(" ")
        level, _, message = rest.partition(" ")
        account.tell("server", message if level == "info" else f"{level}: {message}")

    return take

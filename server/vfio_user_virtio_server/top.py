"""``vfio-user-virtio top``: the devices of a running server and what passes them, once a second.

Plain ANSI on the alternate screen; the terminal is as it was afterwards, however this ends.  Where
standard output is no terminal, one picture is printed, of one interval.

Rejected: curses, which wants a terminfo entry and brings no more than these five sequences.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import termios
import time
import tty
from typing import TYPE_CHECKING, Final

import trio

from vfio_user_virtio_server import log, status

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from vfio_user_virtio_server.status import Seen

INTERVAL: Final = 1.0

_ENTER: Final = "\x1b[?1049h\x1b[?25l"
_LEAVE: Final = "\x1b[?25h\x1b[?1049l"
_HOME: Final = "\x1b[H"
_CLEAR_LINE: Final = "\x1b[K"
_CLEAR_BELOW: Final = "\x1b[J"
_QUIT: Final = b"qQ\x03\x04"

_COLUMNS: Final = (
    f"{'DEVICE':16} {'CLIENT':>8} {'STATE':12} {'RX PPS':>9} {'RX BIT/S':>9} {'TX PPS':>9} "
    f"{'TX BIT/S':>9} {'INT/S':>8} {'DROPS':>8}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    status.add_control_path(parser)


def run(options: argparse.Namespace) -> int:
    trio.run(_watch, options.control_path)
    return os.EX_OK


async def _watch(path: str) -> None:
    async with status.connected(path) as control:
        before = await status.read(control)
        if not (sys.stdout.isatty() and sys.stdin.isatty()):
            await trio.sleep(INTERVAL)
            print(*picture(path, before, await status.read(control)), sep="\n")
            return
        with _terminal():
            while not await _asked_to_quit(INTERVAL):
                after = await status.read(control)
                _show(picture(path, before, after))
                before = after


def picture(path: str, before: Sequence[Seen], after: Sequence[Seen]) -> Iterator[str]:
    """A line for each device, with rates of what lies between the two."""
    yield f"{log.escape(path)}  {time.strftime('%H:%M:%S')}  devices: {len(after)}"
    yield ""
    yield _COLUMNS
    earlier = {seen.device.name: seen for seen in before}
    for seen in after:
        yield _line(earlier.get(seen.device.name, seen), seen)


def _line(before: Seen, after: Seen) -> str:
    device = after.device
    seconds = max(after.at - before.at, 1e-3)

    def rate(group: str, name: str) -> float:
        return (after.counter(group, name) - before.counter(group, name)) / seconds

    session, migration = device.session, device.migration
    client = "-" if session is None else str(session.process or "yes")
    state = "-" if migration is None else migration.state
    drops = sum(
        sum(counts.values()) for group, counts in after.counters.items() if group == "port_drops"
    )
    return (
        f"{log.escape(device.name)[:16]:16} {client:>8} {state:12} "
        f"{short(rate('port', 'frames_out')):>9} {short(8 * rate('port', 'bytes_out')):>9} "
        f"{short(rate('port', 'frames_in')):>9} {short(8 * rate('port', 'bytes_in')):>9} "
        f"{short(rate('interrupts', 'signalled')):>8} {short(drops):>8}"
    )


def short(number: float) -> str:
    """Three digits and k, M or G."""
    for unit in ("", "k", "M"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}G"


@contextlib.contextmanager
def _terminal() -> Iterator[None]:
    """The alternate screen, and keys as they are pressed."""
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        sys.stdout.write(_ENTER)
        sys.stdout.flush()
        yield
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _show(lines: Iterator[str]) -> None:
    width, height = shutil.get_terminal_size()
    shown = [line[:width] + _CLEAR_LINE for line in list(lines)[:height]]
    sys.stdout.write(_HOME + "\n".join(shown) + _CLEAR_BELOW)
    sys.stdout.flush()


async def _asked_to_quit(seconds: float) -> bool:
    """Whether somebody presses a key for that, so long."""
    with trio.move_on_after(seconds):
        while True:
            await trio.lowlevel.wait_readable(sys.stdin)
            key = os.read(sys.stdin.fileno(), 1)
            if not key or key in _QUIT:
                return True
    return False

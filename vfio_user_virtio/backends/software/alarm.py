"""One timer for one switch: nothing wakes up unless somebody waits.

The switch is synchronous and knows no event loop, but a member over its rate limit, or one that
waits for a port without room, must go on by itself some day.  A trio cancel scope whose deadline is
moved is the whole mechanism; while no deadline is set the task sleeps for ever.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable


class Alarm:
    """`set` is given to the `Switch`, `run` is started with `Switch.expired`."""

    def __init__(self) -> None:
        self._deadline = math.inf
        self._scope: trio.CancelScope | None = None

    def set(self, delay: float) -> None:
        """Go off in `delay` seconds at the latest.  For use inside a trio run."""
        deadline = trio.current_time() + delay
        if deadline < self._deadline:
            self._deadline = deadline
            if self._scope is not None:
                self._scope.deadline = deadline

    async def run(self, expired: Callable[[], None]) -> None:
        """Call `expired` each time the alarm goes off, until cancelled."""
        while True:
            with trio.CancelScope(deadline=self._deadline) as self._scope:
                await trio.sleep_forever()
            self._scope = None
            self._deadline = math.inf
            expired()

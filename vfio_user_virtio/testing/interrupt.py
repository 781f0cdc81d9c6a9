"""Interrupts of a device under test: eventfds that the device signals, waited for by trio tasks.

Several queues may share one interrupt (INTx, or fewer vectors than queues), and an eventfd has one
reader at a time, so an `Interrupt` counts what has come, and whoever waits says what it has seen.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Interrupt:
    """An eventfd to give to a device, and how often it was seen signalled (`count`).

    `acknowledge`, if any, is awaited for each before it counts: what a driver does about a level
    interrupt.  It says to the device that everything has been seen, so whoever began to wait while
    that was under way has to look again.
    """

    def __init__(self, acknowledge: Callable[[], Awaitable[None]] | None = None) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.count = 0
        self._acknowledge = acknowledge
        self._reading = False
        self._changed = trio.Event()

    def close(self) -> None:
        """Close the eventfd; nobody may be waiting."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def poll(self) -> bool:
        """Whether it was signalled since the last time somebody looked; does not wait."""
        if not self._signalled():
            return False
        self._arrived()
        return True

    async def wait(self, seen: int | None = None) -> None:
        """Return once `count` is not `seen`, by default what it is now."""
        if seen is None:
            seen = self.count
        while self.count == seen:
            if self._reading:
                await self._changed.wait()
                continue
            self._reading = True
            try:
                await trio.lowlevel.wait_readable(self.fd)
                if self._signalled():
                    try:
                        if self._acknowledge is not None:
                            await self._acknowledge()
                    finally:
                        self._arrived()
            finally:
                self._reading = False
                self._wake()  # another waiter becomes the reader

    def _signalled(self) -> bool:
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return False
        return True

    def _arrived(self) -> None:
        self.count += 1
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

"""Run something that SIGINT and SIGTERM cancel, and say in the end how things stand."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

import trio

from vfio_user_virtio.errors import ConnectionLost, HostError, RemoteError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator


class CancelledBySignal(HostError):
    """It was not done, as a signal came; the exit code is as shells have it for that signal."""


class Cancellable:
    """What a signal cancels: everything, or once `inner` was entered what is in it, so that the
    connections outside are there for the way back.

    `beside`: for tasks that end with it.
    """

    def __init__(self, beside: trio.Nursery) -> None:
        self.beside = beside
        self.caught: int | None = None
        self._scope = beside.cancel_scope

    @contextlib.contextmanager
    def inner(self) -> Iterator[None]:
        with trio.CancelScope() as self._scope:
            yield

    async def obey(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            self.caught = number
            self._scope.cancel()


def run_cancellable(
    work: Callable[[Cancellable], Awaitable[None]],
    standing: Callable[[], str],
    too_late: Callable[[], bool],
) -> None:
    """Run `work`.  Raises HostError for what went wrong, with how things are `standing`, and
    CancelledBySignal; not if that came `too_late`, when it was done."""
    caught = trio.run(_run, work, standing)
    if caught is not None and not too_late():
        raise CancelledBySignal(f"cancelled; {standing()}", exit_code=128 + caught)


async def _run(
    work: Callable[[Cancellable], Awaitable[None]], standing: Callable[[], str]
) -> int | None:
    failure: ConnectionLost | HostError | RemoteError | None = None
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            cancellable = Cancellable(nursery)
            nursery.start_soon(cancellable.obey, signals)
            try:
                await work(cancellable)
            except (ConnectionLost, HostError, RemoteError) as error:
                failure = error
            nursery.cancel_scope.cancel()
    if failure is not None:
        code = failure.exit_code if isinstance(failure, HostError) else os.EX_IOERR
        raise HostError(f"{failure}; {standing()}", exit_code=code) from failure
    return cancellable.caught

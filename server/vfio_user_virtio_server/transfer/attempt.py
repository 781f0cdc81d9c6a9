"""Run something that SIGINT and SIGTERM cancel, and say in the end how things stand."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING

import trio

from vfio_user_virtio.errors import ConnectionLost, HostError, RemoteError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator


class Cancellable:
    """What a signal cancels: everything, or once `inner` was entered what is in it, so that the
    connections outside are there for the way back."""

    def __init__(self, outer: trio.CancelScope) -> None:
        self._scope = outer
        self.caught: int | None = None

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
) -> int | None:
    """Run `work`; the exit code if it was cancelled, None if it is done.

    `too_late`: it was done by the time of the signal.  Raises HostError for what went wrong, with
    how things are `standing`.
    """
    caught = trio.run(_run, work, standing)
    if caught is None or too_late():
        return None
    print(f"vfio-user-virtio: cancelled; {standing()}", file=sys.stderr)
    return 128 + caught


async def _run(
    work: Callable[[Cancellable], Awaitable[None]], standing: Callable[[], str]
) -> int | None:
    failure: ConnectionLost | HostError | RemoteError | None = None
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            cancellable = Cancellable(nursery.cancel_scope)
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

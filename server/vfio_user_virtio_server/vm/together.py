"""Do several things at the same time that must not be left half done.

What moving a VM asks of servers and QEMUs is not given up in the middle, as nobody would know what
has become of it.  So where one fails the others are waited for; a nursery alone would cancel them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable


async def all_of(jobs: Iterable[Callable[[], Awaitable[None]]]) -> None:
    """Do `jobs`, each to its end.  Raises the first HostError among theirs, if there is one."""
    failures: list[HostError] = []

    async def do(job: Callable[[], Awaitable[None]]) -> None:
        try:
            await job()
        except HostError as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        for job in jobs:
            nursery.start_soon(do, job)
    if failures:
        raise failures[0]

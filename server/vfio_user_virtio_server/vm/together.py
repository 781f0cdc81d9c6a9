"""Do several things at the same time that must not be left half done.

What moving a VM asks of servers and QEMUs is not given up in the middle, as nobody would know what
has become of it.  So where one fails the others are waited for; a nursery alone would cancel them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import trio

from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

_A = TypeVar("_A")
_B = TypeVar("_B")


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


async def both(
    first: Callable[[], Awaitable[_A]], second: Callable[[], Awaitable[_B]]
) -> tuple[_A, _B]:
    """What `first` and `second` return.  Raises as `all_of` does."""
    found: list[_A] = []
    other: list[_B] = []

    async def do_first() -> None:
        found.append(await first())

    async def do_second() -> None:
        other.append(await second())

    await all_of((do_first, do_second))
    return found[0], other[0]

"""Keeping an owner up: what failed is reset and asked anew, as long as its device is there.

A PF that asks for a reset, or that somebody else has reset, serves no migration until it has been
brought up again.  That is safe at any time: what its reset takes with it, lists and resource
objects, is gone already or of no use any more, and members keep running.  A migration that was
under way fails; the way back of it, and the next one, find an owner: commands for members wait
meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Final

import trio

from vfio_user_virtio import limits
from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from vfio_user_virtio.backends.vfio.owner import VfioOwner
    from vfio_user_virtio.migration.parts_owner import PartsOwner

_log: Final = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def watched(
    owner: VfioOwner, parts: PartsOwner, give_back: Callable[[], None]
) -> AsyncIterator[None]:
    """Keep `owner` up for the length of the block; `give_back` its device if that is lost.

    The host waits for that when it wants the device back.
    """

    async def watch() -> None:
        failure = await keep_up(owner, parts)
        _log.error("%s; its VFs cannot migrate until the server is restarted with it", failure)
        await owner.close()
        give_back()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()


async def keep_up(owner: VfioOwner, parts: PartsOwner) -> HostError:
    """Recover `owner` whenever it fails, and discover `parts`, made for it, again.

    Returns, with the reason, when its device is lost: then it has to be closed.
    """
    while True:
        first = await owner.until_failure()
        pause = limits.MIN_RECOVERY_SECONDS
        with parts.client.members_wait():  # the first time it is not for long
            await trio.sleep(pause)
            failure = await _brought_up(owner, parts, first)
        while failure is not None and not owner.lost.is_set():
            pause = min(2 * pause, limits.MAX_RECOVERY_SECONDS)
            await trio.sleep(pause)
            with parts.client.members_wait():
                failure = await _brought_up(owner, parts, failure)
        if failure is not None:
            return failure


async def _brought_up(owner: VfioOwner, parts: PartsOwner, before: HostError) -> HostError | None:
    """Try once; what is wrong, if that did not help.  `before`: what was; it is not told again."""
    if owner.lost.is_set():
        return before
    try:
        await owner.recover()
        parts.forget_objects()
        support = await parts.discover()
    except HostError as error:
        if str(error) != str(before):
            _log.warning("%s; the owner is tried again until it is back", error)
        return error
    if support.lack is not None:
        _log.warning("%s: its VFs cannot migrate: %s", owner.name, support.lack)
    return None

"""A UNIX socket that leads to another, as ``ssh -L`` makes it between two hosts.

Bytes go both ways, descriptors (SCM_RIGHTS) do not: whoever sends some loses them.  A connection to
a path where nobody listens is accepted and closed.
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

_CHUNK: Final = 65_536


@asynccontextmanager
async def forwarding(paths: Mapping[Path, Path]) -> AsyncIterator[None]:
    """Each of `paths` leads to its value meanwhile, which need not be there yet."""
    async with trio.open_nursery() as nursery:
        for here, there in paths.items():
            sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
            await sock.bind(os.fspath(here))
            sock.listen()
            listener = trio.SocketListener(sock)
            nursery.start_soon(trio.serve_listeners, partial(_relay, there), [listener])
        yield
        nursery.cancel_scope.cancel()


async def _relay(there: Path, near: trio.SocketStream) -> None:
    try:
        far = await trio.open_unix_socket(os.fspath(there))
    except OSError:
        await near.aclose()
        return
    async with near, far, trio.open_nursery() as nursery:
        nursery.start_soon(_copy, near, far, nursery.cancel_scope)
        nursery.start_soon(_copy, far, near, nursery.cancel_scope)


async def _copy(
    source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope
) -> None:
    """Until either end is closed, with which both are."""
    try:
        while data := await source.receive_some(_CHUNK):
            await sink.send_all(data)
    except trio.BrokenResourceError:
        pass
    scope.cancel()

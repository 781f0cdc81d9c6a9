"""The two devices of a transfer: what a sender and a receiver need of them.

`SocketSource` and `SocketTarget` are clients of a server, as a VMM would be one: the device must be
free.  They have no guest, and so no guest memory.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

import attrs

from vfio_user_virtio.errors import HostError
from vfio_user_virtio.migration.preflight import Preflight
from vfio_user_virtio.migration.transfer_frames import DeviceFacts
from vfio_user_virtio.protocol.migration import MigrationFlags, MigrationState
from vfio_user_virtio.transport.migration_end import MigrationEnd

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from vfio_user_virtio.migration.transfer_frames import Pages, ZeroPages
    from vfio_user_virtio.protocol.header import Buffer
    from vfio_user_virtio.transport.client import Client


class Source(Protocol):
    """The device that is saved.  All methods raise ConnectionLost, HostError and RemoteError."""

    @property
    def state(self) -> MigrationState | None:
        """The migration state that it is in; None if that is not known."""
        ...

    async def prepare(self) -> DeviceFacts:
        """Look whether it can be saved; nothing is changed."""
        ...

    async def start_precopy(self) -> None: ...

    async def look_for_more(self) -> None:
        """Let it save anew what has changed."""
        ...

    async def stop(self) -> None:
        """From here on the device does nothing, and what is read is final."""
        ...

    async def read(self) -> Buffer:
        """The next bytes of the stream; none if there are no more just now."""
        ...

    def changed_pages(self) -> AsyncGenerator[Pages | ZeroPages, None]:
        """The guest memory that it has written and that has to go with it."""
        ...

    async def finish(self, *, keep: bool) -> None:
        """Another device runs in its place; `keep`: run on all the same."""
        ...

    async def run_on(self) -> None:
        """Nothing came of it: run as before."""
        ...


class Target(Protocol):
    """The device that is loaded; errors are those of `Source`."""

    async def prepare(self) -> DeviceFacts:
        """Look whether it can be loaded, and begin."""
        ...

    async def write(self, data: Buffer) -> None:
        """The next bytes of the stream.  Raises HostError for what does not fit, by name."""
        ...

    async def write_pages(self, pages: Pages | ZeroPages) -> None: ...

    async def load(self) -> None:
        """All has been written: only `run` is left to do."""
        ...

    async def run(self) -> None: ...

    async def give_up(self) -> None:
        """Be as before `prepare`."""
        ...


@attrs.define
class SocketSource:
    """The device behind `client`, called `name`."""

    client: Client
    name: str
    answer_seconds: float
    _end: MigrationEnd = attrs.field(init=False)
    _options: MigrationFlags = attrs.field(init=False, default=MigrationFlags(0))
    _more: bool = attrs.field(init=False, default=False)

    def __attrs_post_init__(self) -> None:
        self._end = MigrationEnd(self.client, "source", self.answer_seconds)

    @property
    def state(self) -> MigrationState | None:
        return self._end.state

    async def prepare(self) -> DeviceFacts:
        self._options = await self._end.options()
        return DeviceFacts(self._options, await self._end.num_vectors(), self.name)

    async def start_precopy(self) -> None:
        await self._end.set_state(MigrationState.PRE_COPY)
        self._more = True

    async def look_for_more(self) -> None:
        await self._end.look_for_more()
        self._more = True

    async def stop(self) -> None:
        if MigrationFlags.P2P in self._options:
            precopy = self._end.state is MigrationState.PRE_COPY
            p2p = MigrationState.PRE_COPY_P2P if precopy else MigrationState.RUNNING_P2P
            await self._end.set_state(p2p)
        await self._end.set_state(MigrationState.STOP_COPY)
        self._more = True

    async def read(self) -> Buffer:
        if not self._more:
            return b""
        data = await self._end.read(self._end.piece_size)
        self._more = len(data) == self._end.piece_size
        return data

    async def changed_pages(self) -> AsyncGenerator[Pages | ZeroPages, None]:
        none: tuple[Pages, ...] = ()
        for page in none:
            yield page

    async def finish(self, *, keep: bool) -> None:
        await self._end.set_state(MigrationState.RUNNING if keep else MigrationState.STOP)

    async def run_on(self) -> None:
        if self._end.state is not MigrationState.RUNNING:
            await self._end.set_state(MigrationState.RUNNING)


@attrs.define
class SocketTarget:
    """The device behind `client`, called `name`."""

    client: Client
    name: str
    answer_seconds: float
    _end: MigrationEnd = attrs.field(init=False)
    _options: MigrationFlags = attrs.field(init=False, default=MigrationFlags(0))
    _preflight: Preflight = attrs.field(init=False, factory=Preflight)

    def __attrs_post_init__(self) -> None:
        self._end = MigrationEnd(self.client, "target", self.answer_seconds)

    async def prepare(self) -> DeviceFacts:
        end = self._end
        self._options = await end.options()
        vectors = await end.num_vectors()
        await end.set_state(MigrationState.STOP_COPY)
        more = True
        while more:
            data = await end.read(end.piece_size)
            more = len(data) == end.piece_size
            self._preflight.target_saves_untrusted(data, vectors)
        await end.set_state(MigrationState.RUNNING)
        await end.set_state(MigrationState.RESUMING)
        return DeviceFacts(self._options, vectors, self.name)

    async def write(self, data: Buffer) -> None:
        self._preflight.source_saves_untrusted(data)
        size = self._end.piece_size
        for start in range(0, len(data), size):
            await self._end.write(data[start : start + size])

    async def write_pages(self, pages: Pages | ZeroPages) -> None:
        raise HostError(
            f"the stream has guest memory (at {pages.iova:#x}), and a target behind --to-socket "
            "has no guest; name one that a VM uses",
            exit_code=os.EX_CONFIG,
        )

    async def load(self) -> None:
        await self._end.set_state(MigrationState.STOP)
        if MigrationFlags.P2P in self._options:
            await self._end.set_state(MigrationState.RUNNING_P2P)

    async def run(self) -> None:
        await self._end.set_state(MigrationState.RUNNING)

    async def give_up(self) -> None:
        if self._end.asked:
            await self._end.reset()

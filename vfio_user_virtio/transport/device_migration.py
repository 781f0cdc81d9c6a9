"""Move a device from one server to another: the client's side of a whole migration.

For tests, measurements, `vfio-user-virtio migrate`, and tools that own both sockets.  It moves what
MIG_DATA_READ gives, and nothing else: guest memory, PCI configuration, MSI-X and eventfds are the
caller's, as they are a VMM's; a `GuestMachine` is told when to see to them.

The order is such that little is left to do while neither device runs, and nothing is lost if it
fails.  The target is in RESUMING before the source saves, and every piece is written to it as it
comes, so that it has set the first image by the time the source stops.  The source is let go of
only when the target has said that it runs.  Until then any failure, and any cancellation, ends with
the target reset and the source running; the step from which there is no way back, RUNNING on the
target, cannot be cancelled.  Where it stays open whether the target runs, the source stays stopped:
two running devices of one guest are worse than none.

A server refuses a stream with an errno and no more.  So a `Preflight` may be given what the target
saves of itself, and then each piece of the source's stream before the target gets it, to say what
does not fit.  If there will be no PRE_COPY, a source that has it is asked for one image beforehand,
so that it is not stopped in vain.  A migration that is refused then has not touched either device.

States are asked for one by one, the P2P ones where a server has them, so that each refusal names
the step.  Source: vfio-user, Device Migration; linux/vfio.h, enum vfio_device_mig_state.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final, Protocol

import attrs
import trio

from vfio_user_virtio.errors import ConnectionLost, RemoteError
from vfio_user_virtio.protocol.migration import MigrationFlags, MigrationState
from vfio_user_virtio.transport.migration_end import ANSWER_SECONDS, MigrationEnd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfio_user_virtio.protocol.header import Buffer
    from vfio_user_virtio.transport.client import Client

ROUND_SECONDS: Final = 1.05
"""From one round of PRE_COPY to the next: a little more than a server's limit of one a second."""

_PREPARE: Final = "prepare"
_PRE_COPY: Final = "pre-copy"
_STOP: Final = "stop"
_COPY: Final = "copy"
_RESUME: Final = "resume"
_FINISH: Final = "finish"
DOWNTIME: Final = frozenset({_STOP, _COPY, _RESUME})
"""The phases in which neither device runs."""


@attrs.define
class Phase:
    """A part of the migration: its length in seconds, and the bytes of the stream moved in it."""

    name: str
    seconds: float = 0.0
    byte_count: int = 0


class GuestMachine(Protocol):
    """What a guest has beside the device, for whoever moves the guest as well.

    An exception from one of these ends the migration as a refusal of a server does.  Letting the
    guest run again is the caller's, when `Migration.run` has returned or raised.
    """

    async def pause(self) -> None:
        """The source is about to be stopped: the guest must not reach it any more."""
        ...

    async def carry(self) -> None:
        """Neither device runs and the source has written all that it will: move the rest."""
        ...

    async def carry_back(self) -> None:
        """The source is about to run again: undo what `carry` did, if it was called."""
        ...


class NoGuest:
    """A device that is moved alone."""

    async def pause(self) -> None:
        pass

    async def carry(self) -> None:
        pass

    async def carry_back(self) -> None:
        pass


class Preflight(Protocol):
    """Who looks at both streams beforehand; what it raises ends the migration."""

    def target_saves_untrusted(self, data: Buffer, num_vectors: int | None) -> None:
        """The next bytes of what the target saves of itself; its MSI-X vectors, None if unknown."""
        ...

    def source_saves_untrusted(self, data: Buffer) -> None:
        """The next bytes of the source's stream; an image asked for beforehand is a part of it."""
        ...


@attrs.define
class Migration:
    """One migration of a device; `run` it once.

    `precopy`: save while the source still runs, if both servers can.  `rounds`: how often to look
    for more in PRE_COPY after the first image.  `keep_source`: let the source run in the end, which
    otherwise stays in STOP.  `guest`: what moves with it.  `on_data` is given every piece of the
    stream, `on_progress` is called whenever `phases` has changed; what they raise ends the
    migration.  `preflight`: see the module head; without one the target is the only judge.
    """

    source: Client
    target: Client
    precopy: bool = True
    rounds: int = 0
    keep_source: bool = False
    answer_seconds: float = ANSWER_SECONDS
    guest: GuestMachine = attrs.field(factory=NoGuest)
    on_data: Callable[[bytes | memoryview], None] = lambda _: None
    on_progress: Callable[[Migration], None] = lambda _: None
    preflight: Preflight | None = None

    phases: list[Phase] = attrs.field(init=False, factory=list)
    source_options: MigrationFlags = attrs.field(init=False, default=MigrationFlags(0))
    target_options: MigrationFlags = attrs.field(init=False, default=MigrationFlags(0))
    target_runs: bool = attrs.field(init=False, default=False)
    _source: MigrationEnd = attrs.field(init=False)
    _target: MigrationEnd = attrs.field(init=False)
    _may_run_twice: bool = attrs.field(init=False, default=False)

    def __attrs_post_init__(self) -> None:
        self._source = MigrationEnd(self.source, "source", self.answer_seconds)
        self._target = MigrationEnd(self.target, "target", self.answer_seconds)

    @property
    def source_state(self) -> MigrationState | None:
        """The state that the source is in; None if it is not known."""
        return self._source.state

    @property
    def byte_count(self) -> int:
        """How much of the stream has been moved."""
        return sum(phase.byte_count for phase in self.phases)

    @property
    def seconds(self) -> float:
        """How long it has taken."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def downtime(self) -> float:
        """Seconds from the request that stops the source to the target's answer that it runs."""
        return sum(phase.seconds for phase in self.phases if phase.name in DOWNTIME)

    async def run(self) -> None:
        """Migrate.

        To be cancelled by a scope inside those of the clients, which are needed for the way back.
        Raises RemoteError and ConnectionLost, which name the server and the step, and HostError if
        a device cannot migrate.  After an exception `target_runs` and `source_state` say how things
        stand.
        """
        try:
            await self._prepare()
            if self.precopy:
                await self._pre_copy()
            await self._stop()
            with self._phase(_COPY):
                await self._move()
                await self.guest.carry()
            await self._resume()
            await self._finish()
        except BaseException:
            if not self.target_runs:
                await self._go_back()
            raise

    # --- phases --------------------------------------------------------------------------------

    async def _prepare(self) -> None:
        with self._phase(_PREPARE):
            self.source_options = await self._source.options()
            self.target_options = await self._target.options()
            both = self.source_options & self.target_options
            self.precopy = self.precopy and MigrationFlags.PRE_COPY in both
            if self.preflight is not None:
                await self._look_ahead(self.preflight)
            await self._target.set_state(MigrationState.RESUMING)

    async def _look_ahead(self, preflight: Preflight) -> None:
        vectors = await self._target.num_vectors()
        await self._save_for(
            lambda data: preflight.target_saves_untrusted(data, vectors),
            self._target,
            MigrationState.STOP_COPY,
        )
        self._target.asked = False
        if not self.precopy and MigrationFlags.PRE_COPY in self.source_options:
            await self._save_for(
                preflight.source_saves_untrusted, self._source, MigrationState.PRE_COPY
            )

    async def _save_for(
        self, take: Callable[[Buffer], None], end: MigrationEnd, state: MigrationState
    ) -> None:
        """Let a device save itself in `state`, and then run as before."""
        await end.set_state(state)
        size, more = end.piece_size, True
        while more:
            data = await end.read(size)
            more = len(data) == size
            take(data)
        await end.set_state(MigrationState.RUNNING)

    async def _pre_copy(self) -> None:
        with self._phase(_PRE_COPY):
            await self._source.set_state(MigrationState.PRE_COPY)
            await self._move()
            for _ in range(self.rounds):
                await trio.sleep(ROUND_SECONDS)
                await self._source.look_for_more()
                await self._move()

    async def _stop(self) -> None:
        with self._phase(_STOP):
            await self.guest.pause()
            if MigrationFlags.P2P in self.source_options:
                p2p = MigrationState.PRE_COPY_P2P if self.precopy else MigrationState.RUNNING_P2P
                await self._source.set_state(p2p)
            await self._source.set_state(MigrationState.STOP_COPY)

    async def _resume(self) -> None:
        with self._phase(_RESUME):
            await self._target.set_state(MigrationState.STOP)
            if MigrationFlags.P2P in self.target_options:
                await self._target.set_state(MigrationState.RUNNING_P2P)
            with trio.CancelScope(shield=True):
                self._may_run_twice = True
                await self._target.set_state(MigrationState.RUNNING)
                self.target_runs = True

    async def _finish(self) -> None:
        with self._phase(_FINISH), trio.CancelScope(shield=True):
            final = MigrationState.RUNNING if self.keep_source else MigrationState.STOP
            await self._source.set_state(final)

    async def _go_back(self) -> None:
        """Let the source run again, unless the target may be running."""
        with trio.CancelScope(shield=True):
            if self._target.asked:
                with contextlib.suppress(RemoteError, ConnectionLost):
                    await self._target.reset()
                    self._may_run_twice = False
            if self.target.lost.is_set():  # what nobody is served does not run
                self._may_run_twice = False
            if self.source_state != MigrationState.RUNNING and not self._may_run_twice:
                await self.guest.carry_back()
                with contextlib.suppress(RemoteError, ConnectionLost):
                    await self._source.set_state(MigrationState.RUNNING)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        phase = Phase(name)
        self.phases.append(phase)
        self.on_progress(self)
        start = trio.current_time()
        try:
            yield
        finally:
            phase.seconds = trio.current_time() - start

    async def _move(self) -> None:
        """Move what there is now."""
        size = min(self._source.piece_size, self._target.piece_size)
        more = True
        while more:
            data = await self._source.read(size)
            more = len(data) == size
            if data:
                self.on_data(data)
                if self.preflight is not None:
                    self.preflight.source_saves_untrusted(data)
                await self._target.write(data)
                self.phases[-1].byte_count += len(data)
                self.on_progress(self)

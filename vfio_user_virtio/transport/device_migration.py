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
import errno
import os
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import attrs
import trio

from vfio_user_virtio.device import FeatureOperation, VfioIrq
from vfio_user_virtio.errors import ConnectionLost, HostError, RemoteError
from vfio_user_virtio.protocol.feature import Feature
from vfio_user_virtio.protocol.migration import (
    DEVICE_STATE_SIZE,
    FEATURE_U64,
    MigrationFlags,
    MigrationState,
    decode_device_state_reply_untrusted,
    decode_migration_flags_untrusted,
    encode_device_state,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from vfio_user_virtio.protocol.header import Buffer
    from vfio_user_virtio.transport.client import Client

_T = TypeVar("_T")

ANSWER_SECONDS: Final = 10.0
"""How long a server may take for one request, unless told otherwise."""

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

_NOT_THERE: Final = frozenset({errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
"""Refusals that mean that there is no such feature or command."""


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
    source_state: MigrationState | None = attrs.field(init=False, default=MigrationState.RUNNING)
    """The state that the source is in; None if it is not known."""
    _target_asked: bool = attrs.field(init=False, default=False)
    _may_run_twice: bool = attrs.field(init=False, default=False)

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
            self.source_options = await self._options_of(self.source)
            self.target_options = await self._options_of(self.target)
            both = self.source_options & self.target_options
            self.precopy = self.precopy and MigrationFlags.PRE_COPY in both
            if self.preflight is not None:
                await self._look_ahead(self.preflight)
            await self._set(self.target, MigrationState.RESUMING)

    async def _look_ahead(self, preflight: Preflight) -> None:
        vectors = await self._vectors_of(self.target)
        await self._save_for(
            lambda data: preflight.target_saves_untrusted(data, vectors),
            self.target,
            MigrationState.STOP_COPY,
        )
        self._target_asked = False
        if not self.precopy and MigrationFlags.PRE_COPY in self.source_options:
            await self._save_for(
                preflight.source_saves_untrusted, self.source, MigrationState.PRE_COPY
            )

    async def _save_for(
        self, take: Callable[[Buffer], None], client: Client, state: MigrationState
    ) -> None:
        """Let a device save itself in `state`, and then run as before."""
        size = client.version.capabilities.max_data_xfer_size
        await self._set(client, state)
        more = True
        while more:
            data = await self._ask(client, "MIG_DATA_READ", client.migration_read(size))
            more = len(data) == size
            take(data)
        await self._set(client, MigrationState.RUNNING)

    async def _pre_copy(self) -> None:
        with self._phase(_PRE_COPY):
            await self._set(self.source, MigrationState.PRE_COPY)
            await self._move()
            for _ in range(self.rounds):
                await trio.sleep(ROUND_SECONDS)
                await self._look_for_more()
                await self._move()

    async def _stop(self) -> None:
        with self._phase(_STOP):
            await self.guest.pause()
            if MigrationFlags.P2P in self.source_options:
                p2p = MigrationState.PRE_COPY_P2P if self.precopy else MigrationState.RUNNING_P2P
                await self._set(self.source, p2p)
            await self._set(self.source, MigrationState.STOP_COPY)

    async def _resume(self) -> None:
        with self._phase(_RESUME):
            await self._set(self.target, MigrationState.STOP)
            if MigrationFlags.P2P in self.target_options:
                await self._set(self.target, MigrationState.RUNNING_P2P)
            with trio.CancelScope(shield=True):
                self._may_run_twice = True
                await self._set(self.target, MigrationState.RUNNING)
                self.target_runs = True

    async def _finish(self) -> None:
        with self._phase(_FINISH), trio.CancelScope(shield=True):
            final = MigrationState.RUNNING if self.keep_source else MigrationState.STOP
            await self._set(self.source, final)

    async def _go_back(self) -> None:
        """Let the source run again, unless the target may be running."""
        with trio.CancelScope(shield=True):
            if self._target_asked:
                with contextlib.suppress(RemoteError, ConnectionLost):
                    await self._ask(self.target, "DEVICE_RESET", self.target.reset())
                    self._may_run_twice = False
            if self.target.lost.is_set():  # what nobody is served does not run
                self._may_run_twice = False
            if self.source_state != MigrationState.RUNNING and not self._may_run_twice:
                await self.guest.carry_back()
                with contextlib.suppress(RemoteError, ConnectionLost):
                    await self._set(self.source, MigrationState.RUNNING)

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

    async def _look_for_more(self) -> None:
        """Ask how much there is, which is what makes our server, and Linux, save anew."""
        try:
            await self._ask(self.source, "MIG_GET_PRECOPY_INFO", self.source.precopy_info())
        except RemoteError as error:
            if error.errno not in _NOT_THERE:
                raise

    async def _move(self) -> None:
        """Move what there is now."""
        size = min(
            client.version.capabilities.max_data_xfer_size for client in (self.source, self.target)
        )
        more = True
        while more:
            data = await self._ask(self.source, "MIG_DATA_READ", self.source.migration_read(size))
            more = len(data) == size
            if data:
                self.on_data(data)
                if self.preflight is not None:
                    self.preflight.source_saves_untrusted(data)
                write = self.target.migration_write(data)
                await self._ask(self.target, f"MIG_DATA_WRITE of {len(data)} bytes", write)
                self.phases[-1].byte_count += len(data)
                self.on_progress(self)

    # --- requests ------------------------------------------------------------------------------

    async def _vectors_of(self, client: Client) -> int | None:
        try:
            info = await self._ask(client, "DEVICE_GET_IRQ_INFO", client.irq_info(VfioIrq.MSIX))
        except RemoteError as error:
            if error.errno not in _NOT_THERE:
                raise
            return None
        return info.count

    async def _options_of(self, client: Client) -> MigrationFlags:
        get = FeatureOperation.GET
        try:
            data = await self._ask(
                client,
                "GET MIGRATION",
                client.feature(Feature.MIGRATION, get, room=FEATURE_U64.size),
            )
        except RemoteError as error:
            if error.errno not in _NOT_THERE:
                raise
            raise HostError(
                f"the {self._side(client)} does not offer migration; its log may say why",
                exit_code=os.EX_UNAVAILABLE,
            ) from None
        options = decode_migration_flags_untrusted(data)
        if MigrationFlags.STOP_COPY not in options:
            raise HostError(
                f"the {self._side(client)} offers migration without STOP_COPY ({options:#x}), "
                "which every device that can migrate has",
                exit_code=os.EX_UNAVAILABLE,
            )
        data = await self._ask(
            client,
            "GET MIG_DEVICE_STATE",
            client.feature(Feature.MIG_DEVICE_STATE, get, room=DEVICE_STATE_SIZE),
        )
        state = decode_device_state_reply_untrusted(data)
        if state is not MigrationState.RUNNING:
            raise HostError(
                f"the {self._side(client)} is in state {state.name}, not RUNNING; reset it first",
                exit_code=os.EX_UNAVAILABLE,
            )
        return options

    async def _set(self, client: Client, state: MigrationState) -> None:
        if client is self.target:
            self._target_asked = True
        else:
            self.source_state = None
        await self._ask(
            client,
            f"the change to {state.name}",
            client.feature(
                Feature.MIG_DEVICE_STATE, FeatureOperation.SET, encode_device_state(state)
            ),
        )
        if client is self.source:
            self.source_state = state

    async def _ask(self, client: Client, what: str, request: Awaitable[_T]) -> _T:
        """The answer to a request; errors say which server and what."""
        try:
            with trio.fail_after(self.answer_seconds):
                return await request
        except trio.TooSlowError:
            raise ConnectionLost(
                f"the {self._side(client)} did not answer {what} within {self.answer_seconds:g} s"
            ) from None
        except ConnectionLost as error:
            raise ConnectionLost(f"the {self._side(client)}, at {what}: {error}") from error
        except RemoteError as error:
            raise RemoteError(
                error.errno,
                f"the {self._side(client)} refuses {what}, and its log may say why",
            ) from error

    def _side(self, client: Client) -> str:
        return "source" if client is self.source else "target"

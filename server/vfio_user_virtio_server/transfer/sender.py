"""The sending side of a transfer: `migration.transfer_stream` says what is sent when.

One rule decides how it ends: as long as the word to run (RUN, or END without a way back) has not
gone out whole, the source runs on, whatever happened.  Once it has, the source runs on only if the
receiver says ABORT, which it does when its target is reset; without a word from it nobody knows,
and the source stays stopped.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

import attrs
import trio

from vfio_user_virtio.errors import ConnectionLost, HostError, RemoteError
from vfio_user_virtio.migration.transfer_frames import (
    TRANSFER_SIZE,
    Abort,
    Ack,
    DeviceFacts,
    Hello,
    Options,
    Pages,
    Run,
    Stage,
    State,
    Sync,
)
from vfio_user_virtio.protocol.migration import MigrationFlags
from vfio_user_virtio.transport.device_migration import ROUND_SECONDS
from vfio_user_virtio_server.spans import Span, timed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfio_user_virtio.migration.transfer_frames import Frame
    from vfio_user_virtio_server.transfer.channel import Channel
    from vfio_user_virtio_server.transfer.ends import Source

MAX_STATE: Final = 256 << 10
"""Bytes of the stream in one frame."""

ABORT_SECONDS: Final = 2.0
"""How long it may take to say why, or to hear why."""

PREPARE: Final = "prepare"
PRE_COPY: Final = "pre-copy"
STOP: Final = "stop"
COPY: Final = "copy"
RESUME: Final = "resume"
FINISH: Final = "finish"
DOWNTIME: Final = frozenset({STOP, COPY, RESUME})
"""The phases in which neither device is known to run."""


@attrs.define
class Sending:
    """One device that is sent; `run` it once.

    `precopy`, `rounds`, `keep_source`, `on_progress`: as of `transport.device_migration.Migration`.
    `word_is_out`: the receiver has been let run its target.  `target_runs`: it said that it does.
    """

    source: Source
    channel: Channel
    precopy: bool = True
    rounds: int = 0
    keep_source: bool = False
    on_progress: Callable[[Sending], None] = lambda _: None

    spans: list[Span] = attrs.field(init=False, factory=list)
    source_facts: DeviceFacts | None = attrs.field(init=False, default=None)
    target_facts: DeviceFacts | None = attrs.field(init=False, default=None)
    word_is_out: bool = attrs.field(init=False, default=False)
    target_runs: bool = attrs.field(init=False, default=False)
    _peer_failure: ConnectionLost | HostError | None = attrs.field(init=False, default=None)
    _peer_aborted: bool = attrs.field(init=False, default=False)
    _heard_all: trio.Event = attrs.field(init=False, factory=trio.Event)
    _stage: Stage | None = attrs.field(init=False, default=None)
    _acked: int = attrs.field(init=False, default=0)
    _something_heard: trio.Event = attrs.field(init=False, factory=trio.Event)

    @property
    def byte_count(self) -> int:
        """Bytes of the migration stream that have been sent."""
        return self.channel.writer.state_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of guest memory that have been sent, or told to be zero."""
        return self.channel.writer.page_bytes + self.channel.writer.zero_bytes

    @property
    def seconds(self) -> float:
        return sum(span.seconds for span in self.spans)

    @property
    def downtime(self) -> float:
        """Seconds from the request that stops the source to the news that the target runs; without
        a way back, to the end of the stream."""
        return sum(span.seconds for span in self.spans if span.name in DOWNTIME)

    async def run(self) -> None:
        """Send it.

        To be cancelled from a scope inside those of the source and the channel.  Raises HostError
        for what the receiver refuses, by its words, and what the source and the channel raise.
        """
        failure: ConnectionLost | HostError | RemoteError | None = None
        listening = trio.CancelScope(shield=True)  # what is not cancelled waits for an answer
        async with trio.open_nursery() as nursery:
            if self.channel.answers:
                nursery.start_soon(self._listen, listening)
            try:
                await self._send_all()
            except (ConnectionLost, HostError, RemoteError) as error:
                failure = error
            finally:
                listening.cancel()
        if failure is not None:
            raise failure

    async def _send_all(self) -> None:
        try:
            await self._prepare()
            if self.precopy:
                await self._pre_copy()
            with self._span(STOP):
                await self.source.stop()
            with self._span(COPY):
                await self._copy()
            with self._span(RESUME):
                await self._let_run()
        except BaseException as error:
            await self._go_back(error)
            raise
        with self._span(FINISH), trio.CancelScope(shield=True):
            await self.source.finish(keep=self.keep_source)

    # --- phases --------------------------------------------------------------------------------

    async def _prepare(self) -> None:
        with self._span(PREPARE):
            self.source_facts = await self.source.prepare()
            one_way = Options(0) if self.channel.answers else Options.ONE_WAY
            await self._send(Hello(os.urandom(TRANSFER_SIZE), one_way))
            await self._send(self.source_facts)
            await self._reach(Stage.READY, patient=True)
            both = self.source_facts.options
            if self.target_facts is not None:
                both &= self.target_facts.options
            self.precopy = self.precopy and MigrationFlags.PRE_COPY in both

    async def _pre_copy(self) -> None:
        with self._span(PRE_COPY):
            await self.source.start_precopy()
            await self._send_state()
            for _ in range(self.rounds):
                await trio.sleep(ROUND_SECONDS)
                await self.source.look_for_more()
                await self._send_state()
            if self.channel.answers:  # whoever refuses it does so while the source runs
                await self._send(Sync())
                await self._reach(Stage.TAKEN)

    async def _copy(self) -> None:
        await self._send_state()
        async with contextlib.aclosing(self.source.changed_pages()) as pages:
            async for page in pages:
                await self._send(page)
                count = len(page.data) if isinstance(page, Pages) else page.size
                self._moved(count // 4096)
        if self.channel.answers:
            await self._send(self.channel.writer.end)
            await self._reach(Stage.LOADED)

    async def _let_run(self) -> None:
        with trio.CancelScope(shield=True):
            await self._send(Run() if self.channel.answers else self.channel.writer.end)
            self.word_is_out = True
            await self._reach(Stage.RUNNING)
            self.target_runs = self.channel.answers

    async def _go_back(self, error: BaseException) -> None:
        if self.word_is_out and not self._peer_aborted:
            return
        with trio.CancelScope(shield=True):
            if not isinstance(error, ConnectionLost) and self._peer_failure is None:
                told = isinstance(error, (HostError, RemoteError))
                code = error.exit_code if isinstance(error, HostError) else os.EX_IOERR
                reason = f"the sender gave up: {error if told else 'cancelled'}"
                with contextlib.suppress(ConnectionLost), trio.move_on_after(ABORT_SECONDS):
                    if self.channel.writer.sequence:
                        await self.channel.send(Abort(reason, code))
            with contextlib.suppress(ConnectionLost, RemoteError):
                await self.source.run_on()

    # --- frames --------------------------------------------------------------------------------

    async def _send_state(self) -> None:
        while data := await self.source.read():
            for start in range(0, len(data), MAX_STATE):
                piece = data[start : start + MAX_STATE]
                await self._send(State(piece))
                self.spans[-1].byte_count += len(piece)
                self.on_progress(self)

    def _moved(self, pages: int) -> None:
        self.spans[-1].page_count += pages
        self.on_progress(self)

    async def _send(self, frame: Frame) -> None:
        if self._peer_failure is not None:
            raise self._peer_failure
        try:
            await self.channel.send(frame)
        except ConnectionLost:
            if self.channel.answers:  # it may have said why
                with trio.move_on_after(ABORT_SECONDS):
                    await self._heard_all.wait()
                if self._peer_failure is not None:
                    raise self._peer_failure from None
            raise

    async def _reach(self, stage: Stage, *, patient: bool = False) -> None:
        """Wait until the receiver says so, of what has been sent so far."""
        if not self.channel.answers:
            return
        last = self.channel.writer.sequence - 1
        try:
            with trio.fail_after(float("inf") if patient else self.channel.seconds):
                while self._stage is not stage or self._acked < last:
                    if self._peer_failure is not None:
                        raise self._peer_failure
                    await self._something_heard.wait()
        except trio.TooSlowError:
            raise ConnectionLost(
                f"the receiver has not said {stage.name} for {self.channel.seconds:g} s"
            ) from None

    async def _listen(self, scope: trio.CancelScope) -> None:
        """Take in what the receiver says until it has nothing more to say."""
        with scope:
            try:
                while not self._peer_aborted:
                    self._hear(await self.channel.receive(patient=True))
                    self._wake()
            except ConnectionLost as error:
                self._peer_failure = error
        self._heard_all.set()
        self._wake()

    def _hear(self, frame: Frame) -> None:
        match frame:
            case Abort(reason, exit_code):
                self._peer_aborted = True
                self._peer_failure = HostError(
                    f"the receiver refuses: {reason}", exit_code=exit_code
                )
            case Ack(stage, sequence):
                self._stage, self._acked = stage, sequence
            case DeviceFacts():
                self.target_facts = frame

    def _wake(self) -> None:
        self._something_heard.set()
        self._something_heard = trio.Event()

    @contextlib.contextmanager
    def _span(self, name: str) -> Iterator[None]:
        with timed(self.spans, name, down=name in DOWNTIME):
            self.on_progress(self)
            yield

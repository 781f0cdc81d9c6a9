"""The receiving side of a transfer: `migration.transfer_stream` says what is answered when.

The target runs only after a whole, undamaged stream, and with a way back only at the sender's word.
Before that, whatever goes wrong ends with the target reset, and only then with ABORT, by which the
sender knows that it may let the source run.  If it stays open whether the target runs, nothing is
said: a sender without an answer keeps the source stopped.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

import attrs
import trio

from vfio_user_virtio.errors import ConnectionLost, HostError, RemoteError
from vfio_user_virtio.migration.transfer_frames import (
    Abort,
    Ack,
    DeviceFacts,
    End,
    Hello,
    Options,
    Pages,
    Run,
    Stage,
    State,
    Sync,
    ZeroPages,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_user_virtio.migration.transfer_frames import Frame
    from vfio_user_virtio_server.transfer.channel import Channel
    from vfio_user_virtio_server.transfer.ends import Target

ABORT_SECONDS: Final = 2.0
"""How long it may take to say why."""


@attrs.define
class Receiving:
    """One device that is received; `run` it once.

    `on_progress` is called after each frame.  `seconds`: from the first frame to the target's run.
    """

    target: Target
    channel: Channel
    on_progress: Callable[[Receiving], None] = lambda _: None

    source_facts: DeviceFacts | None = attrs.field(init=False, default=None)
    target_facts: DeviceFacts | None = attrs.field(init=False, default=None)
    begun: bool = attrs.field(init=False, default=False)
    """The target has been touched."""
    target_runs: bool = attrs.field(init=False, default=False)
    may_run: bool = attrs.field(init=False, default=False)
    """It was told to run, and whether it did is not known."""
    seconds: float = attrs.field(init=False, default=0.0)
    _hello: Hello | None = attrs.field(init=False, default=None)
    _greeted: bool = attrs.field(init=False, default=False)

    @property
    def byte_count(self) -> int:
        """Bytes of the migration stream that have come."""
        return self.channel.reader.state_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of guest memory that have come, or were told to be zero."""
        return self.channel.reader.page_bytes + self.channel.reader.zero_bytes

    async def run(self) -> None:
        """Receive it.

        To be cancelled from a scope inside those of the target and the channel.  Raises HostError
        for what does not fit and for the sender's ABORT, and what the target and the channel raise.
        """
        try:
            await self._receive_all()
        except BaseException as error:
            if not self.target_runs:
                await self._give_up(error)
            raise

    async def _receive_all(self) -> None:
        hello = await self.channel.receive(patient=True)
        assert isinstance(hello, Hello), "the reader lets nothing else be first"
        start = trio.current_time()
        self._hello = hello
        if not self.one_way and not self.channel.answers:
            raise HostError(
                "the sender waits for answers, and there is no way back; "
                "give both ends a socket, or let the sender write to a pipe",
                exit_code=os.EX_USAGE,
            )
        facts = await self.channel.receive()
        self._check_abort(facts)
        assert isinstance(facts, DeviceFacts)
        self.source_facts = facts
        self.begun = True
        self.target_facts = await self.target.prepare()
        await self._greet()
        await self._answer(self.target_facts)
        await self._acknowledge(Stage.READY)
        while not self.target_runs:
            frame = await self.channel.receive()
            self._check_abort(frame)
            await self._take(frame)
            self.on_progress(self)
        self.seconds = trio.current_time() - start

    @property
    def one_way(self) -> bool:
        """Whether the sender takes no answers."""
        return self._hello is not None and Options.ONE_WAY in self._hello.options

    async def _take(self, frame: Frame) -> None:
        match frame:
            case State(data):
                await self.target.write(data)
            case Pages() | ZeroPages():
                await self.target.write_pages(frame)
            case Sync():
                await self._acknowledge(Stage.TAKEN)
            case End():
                await self.target.load()
                await self._acknowledge(Stage.LOADED)
                if self.one_way:
                    await self._let_run()
            case Run():
                await self._let_run()

    async def _let_run(self) -> None:
        with trio.CancelScope(shield=True):
            self.may_run = True
            await self.target.run()
            self.target_runs = True
            with contextlib.suppress(ConnectionLost):  # it runs, whoever knows
                await self._acknowledge(Stage.RUNNING)

    async def _give_up(self, error: BaseException) -> None:
        with trio.CancelScope(shield=True):
            try:
                await self.target.give_up()
            except (ConnectionLost, RemoteError):
                if self.may_run:
                    return
            self.may_run = False
            told = isinstance(error, (ConnectionLost, HostError, RemoteError))
            code = error.exit_code if isinstance(error, HostError) else os.EX_IOERR
            with contextlib.suppress(ConnectionLost), trio.move_on_after(ABORT_SECONDS):
                await self._greet()
                await self._answer(Abort(str(error) if told else "it was cancelled", code))

    async def _greet(self) -> None:
        """Say HELLO, once."""
        if self._hello is not None and not self._greeted:
            self._greeted = True
            await self._answer(Hello(self._hello.transfer))

    async def _acknowledge(self, stage: Stage) -> None:
        await self._answer(Ack(stage, self.channel.reader.sequence - 1))

    async def _answer(self, frame: Frame) -> None:
        """Whoever has not said HELLO, or takes no answers, gets none."""
        if self.channel.answers and self._hello is not None and not self.one_way:
            await self.channel.send(frame)

    def _check_abort(self, frame: Frame) -> None:
        if isinstance(frame, Abort):
            raise HostError(frame.reason, exit_code=frame.exit_code)

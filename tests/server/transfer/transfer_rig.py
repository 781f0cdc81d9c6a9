"""A transfer between two members in this process, over a wire that cuts, changes and delays."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import attrs
import trio
import trio.testing

from tests.transport.migration_pair import MAC_A, MAC_B, RUNNING
from vfio_user_virtio.errors import ConnectionLost, HostError, RemoteError
from vfio_user_virtio.migration.transfer_stream import BACKWARD, FORWARD
from vfio_user_virtio_server.transfer.channel import Channel
from vfio_user_virtio_server.transfer.ends import SocketSource, SocketTarget
from vfio_user_virtio_server.transfer.receiver import Receiving
from vfio_user_virtio_server.transfer.sender import Sending

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.transport.migration_pair import Pair
    from vfio_user_virtio_server.transfer.ends import Source, Target

FAILURES: Final = (ConnectionLost, HostError, RemoteError)
SECONDS: Final = 5.0
MAGIC_SIZE: Final = 8
HEADER_SIZE: Final = 20


@attrs.define
class Wire:
    """What lies between the two.

    `cut`: after how many bytes of a direction everything breaks; `flip`: which byte of a direction
    is changed.  `seen`: what has gone in.  `delay`: seconds for each `piece` bytes.
    """

    cut: dict[str, int] = attrs.field(factory=dict)
    flip: dict[str, int] = attrs.field(factory=dict)
    delay: float = 0.0
    piece: int = 1 << 20
    seen: dict[str, bytearray] = attrs.field(
        factory=lambda: {"forward": bytearray(), "backward": bytearray()}
    )
    _ends: list[trio.abc.AsyncResource] = attrs.field(factory=list)

    async def carry(
        self, direction: str, source: trio.abc.ReceiveStream, target: trio.abc.SendStream
    ) -> None:
        """Until one of the ends is closed."""
        self._ends += [source, target]
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := bytearray(await source.receive_some(self.piece)):
                place = len(self.seen[direction])
                self.seen[direction] += data
                flip = self.flip.get(direction, -1) - place
                if 0 <= flip < len(data):
                    data[flip] ^= 0x40
                left = self.cut.get(direction, 1 << 30) - place
                await target.send_all(data[: max(left, 0)])
                if left <= len(data):
                    for end in self._ends:
                        await end.aclose()
                    return
                if self.delay:
                    await trio.sleep(self.delay)
            await target.aclose()

    def borders(self, direction: str) -> list[int]:
        """Where frames begin in what was seen, and where the last one ends."""
        data, found = self.seen[direction], [MAGIC_SIZE]
        while found[-1] < len(data):
            size = int.from_bytes(data[found[-1] + 4 : found[-1] + 8], "little")
            found.append(found[-1] + HEADER_SIZE + size)
        return found


@attrs.define
class Outcome:
    """What both ends have come to; a failure is the exception, or None."""

    sending: Sending
    receiving: Receiving
    send_failure: BaseException | None
    receive_failure: BaseException | None


async def transfer(both: Pair, wire: Wire | None = None, **options: object) -> Outcome:
    """Send the first member's state to the second; `options` are those of `carry`."""
    source = SocketSource(both.clients[0], "a", 10.0)
    return await carry(source, SocketTarget(both.clients[1], "b", 10.0), wire, **options)  # type: ignore[arg-type]  # passed on


async def carry(
    source: Source,
    target: Target,
    wire: Wire | None = None,
    *,
    one_way: bool = False,
    cancel: Callable[[trio.CancelScope, trio.CancelScope], None] = lambda *_: None,
    **options: object,
) -> Outcome:
    """Send from `source` to `target`.  `cancel` is given both ends' scopes."""
    wire = Wire() if wire is None else wire
    to_wire, wire_in = trio.testing.memory_stream_one_way_pair()
    wire_out, to_receiver = trio.testing.memory_stream_one_way_pair()
    answers, back_in = trio.testing.memory_stream_one_way_pair()
    back_out, to_sender = trio.testing.memory_stream_one_way_pair()
    sending = Sending(
        source,
        Channel(None if one_way else to_sender, to_wire, BACKWARD, seconds=SECONDS),
        **options,  # type: ignore[arg-type]  # passed on
    )
    receiving = Receiving(
        target,
        Channel(to_receiver, answers, FORWARD, seconds=SECONDS),
    )
    outcome = Outcome(sending, receiving, None, None)
    scopes = trio.CancelScope(), trio.CancelScope()

    async def receive() -> None:
        with scopes[1]:
            try:
                await receiving.run()
            except FAILURES as error:
                outcome.receive_failure = error
        await answers.aclose()
        await to_receiver.aclose()

    cancel(*scopes)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.carry, "forward", wire_in, wire_out)
        nursery.start_soon(wire.carry, "backward", back_in, back_out)
        nursery.start_soon(receive)
        with scopes[0]:
            try:
                await sending.run()
            except FAILURES as error:
                outcome.send_failure = error
        await to_wire.aclose()
        await to_sender.aclose()
    return outcome


def check_invariants(both: Pair, outcome: Outcome) -> str:
    """The guest is never run twice, and nowhere only if nobody can know; where it runs."""
    source_runs = both.states[0] is RUNNING and not both.members[0].mode.stopped
    mac = both.members[1].state.filter.mac
    target_runs = both.states[1] is RUNNING and mac == MAC_A
    assert not (source_runs and target_runs), "it runs twice"
    assert target_runs == outcome.receiving.target_runs
    if not outcome.sending.word_is_out:
        assert source_runs
    if not target_runs:
        assert both.states[1] is RUNNING
        assert mac == MAC_B, "the target was reset"
    if source_runs:
        assert both.objects == 0
        assert both.members[0].function.common.state.queue_select == 3, "it was not reset"
        assert outcome.sending.source.state is RUNNING
    else:
        assert target_runs or outcome.sending.word_is_out
    return "source" if source_runs else "target" if target_runs else "neither"

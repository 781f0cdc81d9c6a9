"""The queues of a member that run: which ring is served how, and where it stands.

A queue is opened when it is first needed and closed when it stops or its memory changes; between
the two only its position is kept, which is plain data, and the frames that it holds.  A ring that
lies in mapped memory in one piece is worked on in place (`SplitQueue`), any other goes to the slow
service, and so does a queue whose buffers turn out to be reachable by messages only.

Which index is what depends on what was negotiated: RX and TX alternate, and the control queue is
behind the last pair with MQ, but always the third without (virtio 1.4, Network Device, Virtqueues).
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs

from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.ports import first_bytes
from vfio_user_virtio.backends.software.receiver import Effort, Receiver
from vfio_user_virtio.backends.software.slow_service import (
    SlowControl,
    SlowReceiver,
    SlowService,
    SlowTransmitter,
)
from vfio_user_virtio.backends.software.transmitter import Headers, Outcome, Transmitter
from vfio_user_virtio.errors import DriverError
from vfio_user_virtio.memory.guest_memory import RemoteOnly
from vfio_user_virtio.virtio.features import Feature
from vfio_user_virtio.virtio.slow_queue import SlowQueue
from vfio_user_virtio.virtio.split_queue import (
    SplitQueue,
    check_alignment_untrusted,
    ring_layout,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_user_virtio.backends.software.member import Member
    from vfio_user_virtio.memory.access import GuestAccess
    from vfio_user_virtio.virtio.common_config import QueueState

_CONTROL_WITHOUT_MQ: Final = 2
Ring: TypeAlias = SplitQueue | SlowQueue


@attrs.frozen
class Position:
    """Where a queue stands: its next entry, and the next one to announce.

    One index is enough: between two commands nothing that was taken is unfinished, so that the next
    available entry to take is the next used entry to fill.
    """

    index: int
    signalled: int


class Queues:
    """The running queues of `member`."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self.open = False
        self.access: GuestAccess | None = None
        self.receivers: list[Receiver | SlowReceiver | None] = []
        self.receive_mask = 0
        self.send_mask = 0
        self.effort = Effort(member.receive_again)
        self._too_long = 0
        self._invalid = 0
        self.slow = SlowService(
            self._interrupt, member.sent, member.slow_failed, lambda: member.memory.generation
        )
        self._positions: dict[int, Position] = {}
        self._unplaced: set[int] = set()
        self._held: dict[int, list[bytes]] = {}
        self._rings: dict[int, Ring] = {}
        self._areas: list[tuple[int, int]] = []
        self._used_areas: dict[int, tuple[int, int]] = {}
        self._mark: Callable[[int, int], None] | None = None
        self._transmitters: dict[int, Transmitter | SlowTransmitter] = {}
        self._slow_senders: list[int] = []
        self._by_messages: set[int] = set()
        self._control: int | None = None
        self._worked: list[int] = []

    def dropped(self) -> tuple[int, int]:
        """Frames that fitted no buffer, and frames that the driver may not send, since ever."""
        too_long = sum(receiver.too_long for receiver in self.receivers if receiver is not None)
        invalid = sum(transmitter.invalid for transmitter in self._transmitters.values())
        return self._too_long + too_long, self._invalid + invalid

    def all_kicked(self) -> int:
        """A mask of all queues that exist."""
        return (1 << self._member.config.num_queues) - 1

    def ensure_open(self) -> bool:
        """Open what may run.  False if nothing may.

        Raises DriverError if a ring is misplaced or in no guest memory; then nothing is open.
        """
        if not self.open and self._member.running:
            try:
                self._open_all()
            except DriverError:
                self.close()
                raise
        return self.open

    def close(self) -> None:
        """Let go of all guest memory; the positions stay, and the frames that are held."""
        self._mark_used_rings()
        self._too_long, self._invalid = self.dropped()
        for pair, receiver in enumerate(self.receivers):
            if receiver is not None:
                receiver.forget()
                if held := receiver.take_held():
                    self._held[pair] = held
        for index, ring in self._rings.items():
            if isinstance(ring, SplitQueue):
                self._positions[index] = Position(ring.next_used, ring.signalled)
            elif ring.placed:
                self._positions[index] = Position(ring.published, ring.signalled)
                self._unplaced.discard(index)
        self.slow.stop()
        self.open = False
        self.receivers = []
        self.receive_mask = self.send_mask = 0
        self._rings = {}
        self._areas = []
        self._used_areas = {}
        self._transmitters = {}
        self._slow_senders = []
        self._control = None
        if not self._member.running:
            self._by_messages.clear()

    def forget(self, index: int) -> int:
        """Queue `index` starts anew; how many frames had been held for it."""
        self.close()
        self._positions.pop(index, None)
        self._unplaced.discard(index)
        return 0 if index % 2 else len(self._held.pop(index // 2, ()))

    def forget_all(self) -> int:
        """All queues start anew; how many frames had been held for them."""
        return sum(self.forget(index) for index in range(self._member.config.num_queues))

    def settle(self) -> bool:
        """Give the driver what is held for it, as far as it has room; whether that is all, or
        something is under way that has to be waited for (`SlowService.quiesce`)."""
        for receiver in self.receivers:
            if isinstance(receiver, Receiver):
                with contextlib.suppress(DriverError, RemoteOnly):
                    receiver.release_held()
        return self.slow.idle

    def start_from_memory(self) -> None:
        """Each queue goes on from where its used index in guest memory says it stands."""
        self.close()
        self._positions.clear()
        self._unplaced.update(range(self._member.config.num_queues))

    def memory_released(self, start: int, end: int) -> None:
        """Guest memory at start … end - 1 is no longer there."""
        if any(start < area_end and area_start < end for area_start, area_end in self._areas):
            self.close()
        else:
            self._forget_buffers()

    # --- dirty tracking (see `dma_logging`) ----------------------------------------------------

    def log_writes(self, mark: Callable[[int, int], None] | None) -> None:
        """Call `mark(iova, size)` for guest memory that is, or may be, written; None: no longer.

        What the slow service writes is told by `access`.
        """
        self._mark = mark
        for ring in self._rings.values():
            if isinstance(ring, SplitQueue):
                ring.views_of = self._views_of if mark is None else self._marked_views_of
                ring.used_written = False
        self._forget_buffers()

    def settle_writes(self) -> None:
        """Mark what has been written and was not marked yet; what comes will be marked anew."""
        self._mark_used_rings()
        self._forget_buffers()

    def _mark_used_rings(self) -> None:
        if self._mark is None:
            return
        for index, ring in self._rings.items():
            if isinstance(ring, SplitQueue) and ring.used_written:
                ring.used_written = False
                self._mark(*self._used_areas[index])

    def _forget_buffers(self) -> None:
        for receiver in self.receivers:
            if receiver is not None:
                receiver.forget()

    def receiver(self, pair: int) -> Receiver | SlowReceiver | None:
        """The receiving side of `pair`, or None while it is not there."""
        if not self.open:
            try:
                if not self.ensure_open():
                    return None
            except DriverError:
                return None
        return self.receivers[pair]

    def run(self, index: int, budget: int) -> Outcome:
        """Do what there is to do on a TX or control queue; others have nothing to be done.

        Raises DriverError.
        """
        ring = self._rings.get(index)
        if isinstance(ring, SlowQueue):
            self.slow.kick(index)
            return Outcome.DRAINED
        try:
            return self._run(index, ring, budget)
        except RemoteOnly:
            self.serve_by_messages(index)
            self.ensure_open()
            return Outcome.MORE

    def announce(self) -> None:
        """Interrupt for the queues that have been run, where the driver wants it.

        Last in a pass: an interrupt takes the processor from us, and frames should not wait for it.
        """
        while self._worked:
            index = self._worked.pop()
            ring = self._rings.get(index)
            if isinstance(ring, SplitQueue) and ring.should_interrupt():
                self._interrupt(index)

    def serve_by_messages(self, index: int) -> None:
        """A buffer of the queue can be reached by messages only: so serve all of the queue."""
        self.close()
        self._by_messages.add(index)

    def kick_slow_senders(self) -> None:
        """A destination has room again."""
        for index in self._slow_senders:
            self.slow.kick(index)

    def _run(self, index: int, ring: SplitQueue | None, budget: int) -> Outcome:
        if ring is None:
            return Outcome.DRAINED
        transmitter = self._transmitters.get(index)
        if isinstance(transmitter, Transmitter):
            outcome = transmitter.run(budget)
        elif index == self._control:
            outcome = self._run_control(ring, budget)
        else:
            return Outcome.DRAINED
        self._worked.append(index)
        return outcome

    def _run_control(self, ring: SplitQueue, budget: int) -> Outcome:
        while budget > 0:
            chain = ring.take()
            if chain is None:
                if ring.enable_kicks():
                    return Outcome.DRAINED
                continue
            budget -= 1 + (len(chain.readable) + len(chain.writable)) // limits.PIECES_OF_WORK
            command = first_bytes(chain.readable, limits.MAX_CONTROL_SIZE)
            answer = self._member.execute(command)
            target = next((view for view in chain.writable if view), None)
            if target is not None:
                target[: len(answer)] = answer
            ring.put(chain.head, 0 if target is None else len(answer))
            ring.publish()
        return Outcome.MORE

    def _interrupt(self, index: int) -> None:
        self._member.function.interrupt_queue(index)

    # --- opening -------------------------------------------------------------------------------

    def _open_all(self) -> None:
        member = self._member
        features = member.state.features
        pairs = member.config.queue_pairs if features & Feature.MQ.mask else 1
        headers = Headers(features)
        self.receivers = [None] * pairs
        for pair in range(pairs):
            self._open_receiver(pair, mergeable=bool(features & Feature.MRG_RXBUF.mask))
            self._open_transmitter(pair, headers)
        if features & Feature.CTRL_VQ.mask:
            self._open_control(2 * pairs if pairs > 1 else _CONTROL_WITHOUT_MQ)
        self.open = True

    def _open_receiver(self, pair: int, *, mergeable: bool) -> None:
        index = 2 * pair
        ring = self._open_ring(index)
        if isinstance(ring, SplitQueue):
            self.receivers[pair] = Receiver(ring, mergeable=mergeable, effort=self.effort)
        elif ring is not None:
            receiver = SlowReceiver(
                ring,
                mergeable=mergeable,
                wake=partial(self.slow.kick, index),
                room=self._member.room,
            )
            self.receivers[pair] = receiver
            self.slow.add(index, receiver)
        opened = self.receivers[pair]
        if opened is not None:
            opened.keep(self._held.pop(pair, []))
            self.receive_mask |= 1 << index

    def _open_transmitter(self, pair: int, headers: Headers) -> None:
        index = 2 * pair + 1
        ring = self._open_ring(index)
        send = partial(self._member.send, pair)
        if isinstance(ring, SplitQueue):
            self._transmitters[index] = Transmitter(ring, headers, send)
            self.send_mask |= 1 << index
        elif ring is not None:
            transmitter = SlowTransmitter(ring, headers, send)
            self._transmitters[index] = transmitter
            self._slow_senders.append(index)
            self.slow.add(index, transmitter)

    def _open_control(self, index: int) -> None:
        ring = self._open_ring(index)
        if isinstance(ring, SlowQueue):
            self.slow.add(index, SlowControl(ring, self._member.execute))
        self._control = index

    def _open_ring(self, index: int) -> Ring | None:
        registers = self._member.function.common.state.queues[index]
        if not registers.enabled:
            return None
        check_alignment_untrusted(registers.desc, registers.driver, registers.device)
        features = self._member.state.features
        event_idx = bool(features & Feature.EVENT_IDX.mask)
        indirect = bool(features & Feature.INDIRECT_DESC.mask)
        views = None if index in self._by_messages else self._ring_views(registers)
        ring: Ring
        if views is not None:
            ring = SplitQueue(
                registers.size,
                *views,
                views_of=self._views_of if self._mark is None else self._marked_views_of,
                event_idx=event_idx,
                indirect=indirect,
            )
            self._used_areas[index] = registers.device, ring_layout(registers.size).used
        else:
            assert self.access is not None
            ring = SlowQueue(
                registers.size,
                registers.desc,
                registers.driver,
                registers.device,
                memory=self.access,
                event_idx=event_idx,
                indirect=indirect,
            )
        self._place(index, ring)
        self._rings[index] = ring
        return ring

    def _place(self, index: int, ring: Ring) -> None:
        position = self._positions.get(index)
        if index not in self._unplaced:
            if position is not None:
                ring.start(position.index, position.index)
                ring.signalled = position.signalled
        elif isinstance(ring, SplitQueue):
            used_idx = ring.used_idx
            ring.start(used_idx, used_idx)
            self._unplaced.discard(index)
        else:
            ring.start_from_memory()

    def _ring_views(
        self, registers: QueueState
    ) -> tuple[memoryview, memoryview, memoryview] | None:
        """The three areas of a ring, or None if one of them is not one piece of mapped memory."""
        layout = ring_layout(registers.size)
        areas = (
            (registers.desc, layout.desc, False),
            (registers.driver, layout.avail, False),
            (registers.device, layout.used, True),
        )
        found: list[memoryview] = []
        for iova, size, write in areas:
            try:
                pieces = self._member.memory.views(iova, size, write)
            except RemoteOnly:
                return None
            if len(pieces) != 1:
                return None
            found.append(pieces[0])
        self._areas.extend((iova, iova + size) for iova, size, _ in areas)
        return found[0], found[1], found[2]

    def _views_of(self, iova: int, size: int, write: bool) -> list[memoryview]:
        view = self._member.memory.view(iova, size, write)
        return self._member.memory.views(iova, size, write) if view is None else [view]

    def _marked_views_of(self, iova: int, size: int, write: bool) -> list[memoryview]:
        views = self._views_of(iova, size, write)
        if write and size:
            assert self._mark is not None
            self._mark(iova, size)
        return views

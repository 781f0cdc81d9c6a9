"""The receiving side of a member: frames from the switch, or read by an uplink in place.

Which frames the driver wants (`virtio.rx_filter`), and on which queue pair (`virtio.steering`), is
decided here; getting them into its buffers is `receiver`'s.  An uplink reads into the buffers of
the pair that the last frame was for, and if the frame turns out to be for another, it is copied.

A driver's mistakes that come to light here are not held against it yet: they close the queues, and
the next kick finds them again (see `member`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vfio_user_virtio.backends.software.ports import (
    FLOW_SIZE,
    HEAD_SIZE,
    NET_HEADER_SIZE,
    flow_bytes,
)
from vfio_user_virtio.errors import DriverError
from vfio_user_virtio.memory.guest_memory import RemoteOnly
from vfio_user_virtio.virtio.rx_filter import accepts
from vfio_user_virtio.virtio.steering import flow_slot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_user_virtio.backends.software.member import Member
    from vfio_user_virtio.backends.software.ports import Buffer, Frame
    from vfio_user_virtio.backends.software.queues import Queues

_TPID: Final = b"\x81\x00"


class Reception:
    """What of `ports.DirectPort` moves frames, for `member`."""

    def __init__(self, member: Member, queues: Queues) -> None:
        self._member = member
        self._queues = queues
        self._pair = 0
        """Where an uplink reads the next frame to."""
        self.filtered = 0
        self.missed = 0

    def start_over(self) -> None:
        """Other queue pairs are in use than before."""
        self._pair = 0

    def deliver(self, frame: Frame, size: int) -> bool:
        if not self._accepts(frame[0]):
            self.filtered += 1
            return True
        pair = 0
        if self._member.steering.pairs > 1:
            pair = self._member.steering.pair_for(flow_slot(flow_bytes(frame)))
        return self._deliver_to(pair, frame, size)

    def reserve(self) -> Sequence[memoryview] | None:
        pair = self._pair
        try:
            receiver = self._queues.receiver(pair)
            return None if receiver is None else receiver.reserve()
        except DriverError:
            self._queues.close()
            return None
        except RemoteOnly:
            self._queues.serve_by_messages(2 * pair)
            return self.reserve()

    def commit(self, size: int) -> None:
        pair = self._pair
        receiver = self._queues.receivers[pair]
        assert receiver is not None
        if not self._member.state.filter.promisc and not self._accepts(receiver.peek(HEAD_SIZE)):
            self.filtered += 1
            return
        if self._member.steering.pairs > 1:
            slot = flow_slot(receiver.peek(FLOW_SIZE)[NET_HEADER_SIZE:])
            self._pair = self._member.steering.pair_for(slot)
            if self._pair != pair:
                if not self._deliver_to(self._pair, receiver.reserved(size), size):
                    self.missed += 1
                return
        try:
            receiver.commit(size)
        except (DriverError, RemoteOnly):
            self.missed += 1
            self._queues.close()

    def _deliver_to(self, pair: int, frame: Frame, size: int) -> bool:
        try:
            receiver = self._queues.receiver(pair)
            return receiver is not None and receiver.deliver(frame, size)
        except DriverError:
            self._queues.close()
            return False
        except RemoteOnly:
            self._queues.serve_by_messages(2 * pair)
            return self._deliver_to(pair, frame, size)

    def flush(self) -> None:
        for pair, receiver in enumerate(self._queues.receivers):
            if receiver is not None and receiver.should_interrupt():
                self._member.function.interrupt_queue(2 * pair)

    def _accepts(self, head: Buffer) -> bool:
        rules = self._member.state.filter
        if rules.promisc:
            return True
        vlan = None
        if rules.filter_vlans and head[24:26] == _TPID and len(head) >= HEAD_SIZE:
            vlan = int.from_bytes(head[26:28], "big") & 0xFFF
        return accepts(rules, bytes(head[12:18]), vlan)

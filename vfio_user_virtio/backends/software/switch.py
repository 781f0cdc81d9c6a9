"""The switch between the members of an owner and its uplinks.

A learning bridge in the sense of IEEE 802.1Q, modelled on the embedded switch of an SR-IOV NIC
("VEB") and, in its details, on the Linux bridge: frames to a known address go to one port, others
to all ports of their VLAN; a frame never goes back where it came from; no spanning tree, and
link-local group addresses are flooded like others.

What is done when, and what for:

* `refresh` works out, when a port is plugged in or out or changes, all that does not depend on the
  frame.  In the common set-up of one member and one uplink `forward` is then a look-up and a call,
  and the uplink may read frames straight into the member's memory (`direct_receiver`).  With more
  ports it may not: it cannot know whose frame comes next, and guests would see each other's.
* A frame goes to each port in a form that the port takes: tagged or not, and finished
  (`virtio.offload`) if the port does not take it unfinished.  Only then is it copied.
* A port without room makes its senders wait, within limits (`switch_port`), if the frame has no
  other destination; in a flood the port just misses the frame.
* Everything is counted, nothing is logged: guests decide how often these things happen.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Final

from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.forwarding_table import ForwardingTable
from vfio_user_virtio.backends.software.ports import MIN_FRAME_SIZE
from vfio_user_virtio.backends.software.switch_paths import work_out_paths
from vfio_user_virtio.backends.software.switch_port import Drop, PortStatistics, SwitchPort
from vfio_user_virtio.backends.software.vlan import ANY_VLAN, TAG_SIZE, pop_tag, push_tag, vlan_of
from vfio_user_virtio.virtio.offload import (
    F_DATA_VALID,
    F_NEEDS_CSUM,
    INVALID,
    STRAY_FLAGS,
    finish_untrusted,
    unfinished,
    without_stray_flags,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfio_user_virtio.backends.software.pcap import Capture
    from vfio_user_virtio.backends.software.ports import DirectPort, Frame, Port, Sender, Uplink
    from vfio_user_virtio.backends.software.rate_limit import TokenBucket
    from vfio_user_virtio.backends.software.vlan import PortVlans

_DESTINATION: Final = slice(12, 18)
_SOURCE: Final = slice(18, 24)


class Switch:
    """A switch whose ports are told apart by identity.

    `alarm(delay)` must see to it that `expired` is called in `delay` seconds at the latest (see
    `alarm.Alarm`).  `clock` gives seconds and never goes back.  `changed` is called whenever a port
    may have come up or gone down.
    """

    def __init__(
        self,
        *,
        alarm: Callable[[float], None],
        clock: Callable[[], float] = time.monotonic,
        table: ForwardingTable[SwitchPort] | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._alarm = alarm
        self._clock = clock
        self._changed = changed
        self._table: ForwardingTable[SwitchPort] = ForwardingTable() if table is None else table
        self._ports: dict[Port, SwitchPort] = {}
        self._uplinks: tuple[Uplink, ...] = ()
        self._touched: set[SwitchPort] = set()

    # --- plugging -----------------------------------------------------------------------------

    def plug(
        self,
        port: Port,
        sender: Sender | None = None,
        *,
        vlans: PortVlans = ANY_VLAN,
        rate_limit: TokenBucket | None = None,
    ) -> None:
        """Plug a member in.  Without a `sender` to resume, `forward` drops what has to wait.

        `rate_limit` is for what the member sends.  A member that is also a `DirectPort` may be read
        into while it and one uplink are alone here.
        """
        self._plug(SwitchPort(port, sender, None, vlans, rate_limit))

    def plug_uplink(self, uplink: Uplink, *, vlans: PortVlans = ANY_VLAN) -> None:
        """Plug an uplink in."""
        self._plug(SwitchPort(uplink, uplink, uplink, vlans, None))

    def unplug(self, port: Port) -> None:
        """Take a port out and forget it; those who wait for it go on."""
        self._fold()
        at = self._ports.pop(port, None)
        if at is None:
            return
        self._touched.discard(at)
        self._table.forget(at)
        for other in self._ports.values():
            other.waiting.pop(at, None)
        self.refresh()
        self._resume_waiting(at)

    def refresh(self) -> None:
        """A port has come up or gone down, or takes other frames than before."""
        ports = list(self._ports.values())
        were_direct = [at for at in ports if at.direct is not None]
        self._work_out_paths()
        for at in ports:
            if not at.up:
                self._resume_waiting(at)
        for at in were_direct:
            if at.direct is None and at.sender is not None:
                at.sender.resume()  # it may wait for room that it no longer needs
        self._changed()

    def capture(self, port: Port, capture: Capture | None) -> None:
        """Record what passes at a port from now on, or stop that.  Direct paths end meanwhile."""
        self._ports[port].capture = capture
        self.refresh()

    @property
    def uplinks(self) -> tuple[Uplink, ...]:
        """The uplinks that are plugged in."""
        return tuple(at.uplink for at in self._ports.values() if at.uplink is not None)

    def statistics(self, port: Port) -> PortStatistics:
        """Counters of one port."""
        self._fold()
        return self._ports[port].statistics()

    # --- frames -------------------------------------------------------------------------------

    def forward(self, source: Port, frame: Frame, size: int) -> bool:
        """Send a frame of `size` bytes, header included, that came from `source`, where it belongs.

        False: it has not been sent; keep it, and offer it again when `Sender.resume` is called.
        True: it is gone, be it sent or dropped.  Follow a batch with `flush`.
        """
        at = self._ports[source]
        deliver = at.fast_deliver
        if deliver is None or size < MIN_FRAME_SIZE:
            return self._forward(at, frame, size)
        head = frame[0]
        if (head[0] or head[1]) and unfinished(head, size) & at.fast_lacks:
            return self._forward(at, frame, size)
        peer = at.fast_peer
        assert peer is not None
        if deliver(frame, size):
            at.fast_frames += 1
            at.fast_bytes += size
            self._touched.add(peer)
            return True
        return self._has_no_room(peer, at)

    def direct_receiver(self, uplink: Port) -> DirectPort | None:
        """The port whose memory `uplink` may read frames into: the only one they can be for."""
        return self._ports[uplink].direct

    def received_directly(self, uplink: Port, frames: int, size: int) -> None:
        """`uplink` has committed so many frames, of `size` bytes with headers, to its receiver."""
        at = self._ports[uplink]
        at.fast_frames += frames
        at.fast_bytes += size
        if at.fast_peer is not None:
            self._touched.add(at.fast_peer)

    def wait_for_room(self, source: Port, destination: Port) -> None:
        """Resume `source` when `destination`, whose `reserve` gave nothing, calls `writable`."""
        at, peer = self._ports[source], self._ports.get(destination)
        if peer is not None:
            peer.waiting[at] = None

    def flush(self) -> None:
        """A batch is over: let the ports that got frames tell their guests."""
        while self._touched:
            self._touched.pop().port.flush()

    def poll(self, port: Port) -> None:
        """`port` has sent a batch: let uplinks look whether there is an answer already."""
        for uplink in self._uplinks:
            if uplink is not port:
                uplink.poll()

    def writable(self, port: Port) -> None:
        """A port that had no room has some: deliver what it is owed, and resume who waits."""
        at = self._ports.get(port)
        if at is None or not (at.waiting or at.backlog or at.deadline != math.inf):
            return
        at.stop_blocking(self._clock())
        if self._deliver_backlog(at):
            self._resume_waiting(at)
        self.flush()

    def expired(self) -> None:
        """The alarm has gone off."""
        now = self._clock()
        next_deadline = math.inf
        for at in list(self._ports.values()):
            if at.deadline <= now:
                at.stop_blocking(now)
                self._resume_waiting(at)
            if at.resume_at <= now:
                at.resume_at = math.inf
                at.copies = 0
                if at.sender is not None:
                    at.sender.resume()
        for at in self._ports.values():
            next_deadline = min(next_deadline, at.deadline, at.resume_at)
        if next_deadline != math.inf:
            self._alarm(max(0.0, next_deadline - now))

    # --- paths --------------------------------------------------------------------------------

    def _plug(self, at: SwitchPort) -> None:
        if at.port in self._ports:
            raise ValueError(f"port {at.port.name} is plugged in already")
        self._ports[at.port] = at
        self.refresh()

    def _fold(self) -> None:
        for at in self._ports.values():
            at.fold_fast_counters()

    def _work_out_paths(self) -> None:
        ports = list(self._ports.values())
        for at in work_out_paths(ports):
            self._table.forget(at)
        self._uplinks = tuple(at.uplink for at in ports if at.uplink is not None)

    # --- the long way -------------------------------------------------------------------------

    def _forward(self, at: SwitchPort, frame: Frame, size: int) -> bool:
        head = frame[0]
        if size < MIN_FRAME_SIZE or len(head) < MIN_FRAME_SIZE:
            return self._drop(at, Drop.RUNT)
        try:
            tag = vlan_of(head)
        except ValueError:
            return self._drop(at, Drop.RUNT)
        vlans = at.vlans
        vlan = (tag or 0) if vlans.access is None else vlans.access
        if (tag is not None and vlans.access is not None) or not vlans.carries(vlan):
            return self._drop(at, Drop.WRONG_VLAN)
        needs = 0
        if head[0] or head[1]:
            needs = unfinished(head, size)
            if needs & INVALID:
                return self._drop(at, Drop.BAD_HEADER)
            if needs & STRAY_FLAGS:
                keep = F_NEEDS_CSUM if at.uplink is None else F_NEEDS_CSUM | F_DATA_VALID
                head = without_stray_flags(bytes(head), keep)
                frame = [head, *frame[1:]]

        now = self._clock()
        if at.copies >= limits.MAX_COPIES and at.sender is not None:
            self._pause(at, now, 0.0)
            return False
        if at.limiter is not None and (wait := at.limiter.take(size, now)):
            if at.sender is None:
                return self._drop(at, Drop.RATE)
            self._pause(at, now, wait)
            return False
        taken = self._route(at, frame, size, vlan, tag is not None, needs, now)
        if taken:
            at.frames_in += 1
            at.bytes_in += size
            if at.capture is not None:
                self._record(at, at.capture, frame, inbound=True)
        elif at.limiter is not None:
            at.limiter.give_back(size)
        return taken

    def _route(
        self,
        at: SwitchPort,
        frame: Frame,
        size: int,
        vlan: int,
        tagged: bool,
        needs: int,
        now: float,
    ) -> bool:
        head = frame[0]
        if not head[18] & 1:
            self._table.learn(vlan, bytes(head[_SOURCE]), at, now)
        if not head[12] & 1:
            to = self._table.look_up(vlan, bytes(head[_DESTINATION]), now)
            if to is not None:
                if to is at:
                    return self._drop(at, Drop.HAIRPIN)
                return self._send(at, to, frame, size, vlan, tagged, needs)
        receivers = [
            to for to in self._ports.values() if to is not at and to.up and to.vlans.carries(vlan)
        ]
        if not receivers:
            return self._drop(at, Drop.UNREACHABLE)
        if len(receivers) == 1:
            return self._send(at, receivers[0], frame, size, vlan, tagged, needs)
        self._flood(at, receivers, frame, size, vlan, tagged, needs)
        return True

    def _send(
        self,
        at: SwitchPort,
        to: SwitchPort,
        frame: Frame,
        size: int,
        vlan: int,
        tagged: bool,
        needs: int,
    ) -> bool:
        """Send a frame to its only destination."""
        if to.backlog and not self._deliver_backlog(to):
            return self._has_no_room(to, at)
        want_tag = _wants_tag(at, to, tagged)
        if want_tag == tagged and not needs & to.lacks:
            return self._deliver(to, frame, size) or self._has_no_room(to, at)
        pieces = _in_form(frame, size, vlan, tagged, want_tag, bool(needs & to.lacks))
        if pieces is None:
            return self._drop(at, Drop.BAD_HEADER)
        at.copies += len(pieces) - 1
        for index, (piece, piece_size) in enumerate(pieces):
            if not self._deliver(to, piece, piece_size):
                if index == 0:
                    return self._has_no_room(to, at)
                to.backlog.extend(pieces[index:])
                self._work_out_paths()
                break
        return True

    def _flood(
        self,
        at: SwitchPort,
        receivers: list[SwitchPort],
        frame: Frame,
        size: int,
        vlan: int,
        tagged: bool,
        needs: int,
    ) -> None:
        """Send a frame to several ports; who has no room misses it."""
        forms: dict[tuple[bool, bool], Sequence[tuple[Frame, int]] | None] = {}
        for to in receivers:
            form = (_wants_tag(at, to, tagged), bool(needs & to.lacks))
            if form not in forms:
                forms[form] = _in_form(frame, size, vlan, tagged, *form)
            pieces = forms[form]
            if pieces is None:
                self._drop(at, Drop.BAD_HEADER)
                continue
            if len(pieces) > limits.MAX_FLOODED_SEGMENTS:
                self._drop(to, Drop.TOO_MANY_SEGMENTS)
                continue
            at.copies += len(pieces)
            for piece, piece_size in pieces:
                if to.backlog or not self._deliver(to, piece, piece_size):
                    self._drop(to, Drop.NO_ROOM)

    def _deliver(self, to: SwitchPort, frame: Frame, size: int) -> bool:
        if not to.port.deliver(frame, size):
            return False
        to.frames_out += 1
        to.bytes_out += size
        self._touched.add(to)
        if to.capture is not None:
            self._record(to, to.capture, frame, inbound=False)
        return True

    def _record(self, at: SwitchPort, capture: Capture, frame: Frame, *, inbound: bool) -> None:
        capture.record(frame, inbound=inbound)
        if not capture.is_open:
            at.capture = None
            self._work_out_paths()

    def _deliver_backlog(self, to: SwitchPort) -> bool:
        """Deliver what is left of a segmented frame; False if there is still no room."""
        if to.backlog:
            while to.backlog:
                frame, size = to.backlog[0]
                if not self._deliver(to, frame, size):
                    return False
                to.backlog.popleft()
            self._work_out_paths()
        return True

    def _has_no_room(self, to: SwitchPort, at: SwitchPort) -> bool:
        """False if the sender at `at` shall wait for `to`; True if its frame has been dropped."""
        if at.sender is not None:
            if to.fast_peer is not None:
                self._fold()
            now = self._clock()
            if to.may_hold_up(now):
                to.waiting[at] = None
                self._alarm(to.deadline - now)
                return False
        return self._drop(to, Drop.NO_ROOM)

    @staticmethod
    def _drop(at: SwitchPort, reason: Drop) -> bool:
        at.drops[reason] += 1
        return True

    def _pause(self, at: SwitchPort, now: float, delay: float) -> None:
        at.resume_at = now + delay
        self._alarm(delay)

    @staticmethod
    def _resume_waiting(to: SwitchPort) -> None:
        """Resume who waits for `to`, until one finds it full again: others are first then."""
        waiting, to.waiting = list(to.waiting), {}
        for position, at in enumerate(waiting, 1):
            if at.sender is not None:
                at.sender.resume()
            if at in to.waiting:
                to.waiting = dict.fromkeys([*waiting[position:], *to.waiting])
                return


def _wants_tag(at: SwitchPort, to: SwitchPort, tagged: bool) -> bool:
    """Whether a frame from `at` has to be tagged at `to`."""
    return to.vlans.access is None and (tagged or at.vlans.access is not None)


def _in_form(
    frame: Frame, size: int, vlan: int, tagged: bool, want_tag: bool, finish: bool
) -> Sequence[tuple[Frame, int]] | None:
    """A frame tagged or not as wanted, and finished if wanted: one piece or several."""
    if want_tag and not tagged:
        frame = push_tag(frame, vlan)
        size += TAG_SIZE
    elif tagged and not want_tag:
        frame = pop_tag(frame)
        size -= TAG_SIZE
    if not finish:
        return ((frame, size),)
    return finish_untrusted(b"".join(frame))

"""A member: one virtio-net function of the software model, as a session serves it and as the
switch sees it.

It joins the parts.  `Function` is the PCI side, `NetState` what the driver has set, `Queues` the
rings that run, and the switch where frames come from and go to.  Commands of the client change
registers at once; kicks are only noted, and `work` handles all that a batch brought in one pass.

A member runs (`running`) while its driver is ready, it may do DMA, a session is there, and it is
not in STOPPED mode (`mode`, which is also where parts are got and set).  When it stops for whatever
reason its queues are let go of; their positions stay, so that it can go on.  Its registers outlive
a client that vanished, but whose memory the next client brings nobody knows: it is left alone until
a kick shows that the driver is still the same, or the device has been reset.

What a driver does wrong ends in DEVICE_NEEDS_RESET and one line in the log.  One thing is not held
against it: memory that is missing when a frame comes in from outside, or that goes while messages
to it are under way.  QEMU re-maps guest RAM in steps, and between two of them a ring may be
nowhere; the queues then pause until the next mapping.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import attrs
import trio

from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.announcement import rarp_request
from vfio_user_virtio.backends.software.dma_logging import MemberLogging
from vfio_user_virtio.backends.software.function import Function, FunctionFront
from vfio_user_virtio.backends.software.member_legacy import MemberLegacy
from vfio_user_virtio.backends.software.member_operator import MemberOperator
from vfio_user_virtio.backends.software.ports import (
    Offload,
    flow_bytes,
)
from vfio_user_virtio.backends.software.queues import Queues
from vfio_user_virtio.backends.software.reception import Reception
from vfio_user_virtio.backends.software.stopped_mode import StoppedMode
from vfio_user_virtio.backends.software.transmitter import Outcome
from vfio_user_virtio.device import ResetCause
from vfio_user_virtio.errors import DriverError
from vfio_user_virtio.memory.access import GuestAccess
from vfio_user_virtio.memory.guest_memory import GuestMemory
from vfio_user_virtio.pci.config_space import ConfigEvents
from vfio_user_virtio.virtio.common_config import Status
from vfio_user_virtio.virtio.features import Feature, feature_names
from vfio_user_virtio.virtio.net_config import (
    DUPLEX_FULL,
    DUPLEX_UNKNOWN,
    NetConfig,
    NetStatus,
)
from vfio_user_virtio.virtio.net_control import (
    GUEST_OFFLOADS,
    Change,
    NetState,
    execute_untrusted,
)
from vfio_user_virtio.virtio.rx_filter import FilterState
from vfio_user_virtio.virtio.steering import Steering, flow_slot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_user_virtio.backends.software.config import MemberConfig
    from vfio_user_virtio.backends.software.member_parts import DeviceState
    from vfio_user_virtio.backends.software.ports import Buffer
    from vfio_user_virtio.backends.software.switch import Switch
    from vfio_user_virtio.device import (
        DmaMapping,
        RemoteMemory,
    )

_log: Final = logging.getLogger(__name__)


@attrs.frozen
class MemberStatistics:
    """Counts since the member was made; frames and bytes are counted at the switch's port.

    `filtered` frames did not pass the driver's filters, `missed` ones were for a queue pair without
    buffers, `too_long` ones fitted no buffer, `invalid` ones the driver sent in a form that virtio
    forbids.
    """

    filtered: int
    missed: int
    too_long: int
    invalid: int
    driver_errors: int


class Member(FunctionFront):
    """One member on `switch`.  A `Device`, a `DirectPort` and a `Sender`."""

    def __init__(self, name: str, config: MemberConfig, switch: Switch) -> None:
        self.name = name
        self.config = config
        self.memory = GuestMemory(allow_unsealed=config.allow_unsealed_memory)
        self.memory.subscribe(self._memory_released)
        self.function = Function(config, self)
        self.running = False
        self.steering = Steering()
        self.state = self._initial_state()
        self._switch = switch
        self.link_up = True
        self._plugged = self._wired = True
        self._in_session = False
        self._left_over = False
        """The driver was ready in an earlier session, and has not been heard of in this one."""
        self._kicked = 0
        self._again = 0
        self._turn = 0
        """The queue that is run first, so that whoever has filled the wire is the last."""
        self._wake = trio.Event()
        self._driver_errors = 0
        self._lines_left = limits.MAX_GUEST_LOG_LINES
        self._queues = Queues(self)
        reception = self._reception = Reception(self, self._queues)
        # what the switch calls for each frame goes straight to where it is done
        self.deliver = reception.deliver
        self.reserve = reception.reserve
        self.commit = reception.commit
        self.flush = reception.flush
        self.legacy: Final = MemberLegacy(self)
        self.mode: Final = StoppedMode(self, self._queues)
        self.logging: Final = MemberLogging(name, self._queues)
        self.operator: Final = MemberOperator(self, self._queues, switch)

    def _initial_state(self) -> NetState:
        return NetState(FilterState(self.config.mac), max_queue_pairs=self.config.queue_pairs)

    def statistics(self) -> MemberStatistics:
        too_long, invalid = self._queues.dropped()
        return MemberStatistics(
            self._reception.filtered,
            self._reception.missed,
            too_long,
            invalid,
            self._driver_errors,
        )

    # --- Device: what the client asks ----------------------------------------------------------

    async def dma_map(self, mapping: DmaMapping) -> None:
        self.memory.map(mapping)
        self._queues.slow.mapped()
        if self.running and not self._queues.open:
            self._again = self._queues.all_kicked()

    async def dma_unmap(self, iova: int, size: int) -> None:
        if self._kicked or self._again:
            self.work()
            await trio.lowlevel.checkpoint()  # a read can bring a thousand kicks and unmaps
        self.memory.unmap(iova, size)

    async def reset(self, cause: ResetCause) -> None:
        self._reset(cause)

    async def serve(self, memory: RemoteMemory) -> None:
        self._in_session = True
        self._queues.access = GuestAccess(self.memory, memory, self.logging.wrote)
        self.update_running()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._queues.slow.run)
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                self.work()
                await trio.lowlevel.checkpoint()

    async def release(self) -> None:
        self._in_session = False
        self._lines_left = limits.MAX_GUEST_LOG_LINES
        self._left_over = True
        self.update_running()
        self._queues.access = None
        self.logging.stop_logging()
        self.memory.clear()
        self.function.interrupts.close()

    def work(self) -> None:
        if self.mode.stopping:
            return
        kicked, self._kicked = self._kicked, 0
        again, self._again = self._again, 0
        if kicked and self._left_over:
            self._left_over = False
            self.update_running()
        if not self.running or not (kicked or again):
            return
        if kicked:
            self._queues.slow.notified()
        try:
            self._run(kicked | again)
        except DriverError as error:
            if kicked:
                self._fail(error)
            else:
                self._queues.close()
        self._switch.flush()
        self._switch.poll(self)
        self._queues.announce()

    # --- what registers set in motion ----------------------------------------------------------

    def kick(self, queue: int) -> None:
        if queue < self.config.num_queues:
            self._kicked |= 1 << queue

    def features_accepted(self, features: int) -> None:
        self.state.features = features
        self.state.guest_offloads = features & GUEST_OFFLOADS
        self.state.filter.filter_vlans = bool(features & Feature.CTRL_VLAN.mask)

    def driver_ok(self) -> None:
        self._tell(
            logging.INFO, f"the driver is ready: {' '.join(feature_names(self.state.features))}"
        )
        self._left_over = False
        self.update_running()

    def queue_enabled(self, index: int) -> None:
        self._reception.missed += self._queues.forget(index)
        if self.running:
            self._again = self._queues.all_kicked()

    def queue_reset(self, index: int) -> None:
        self._reception.missed += self._queues.forget(index)
        self._kicked &= ~(1 << index)
        if self.running:
            self._again = self._queues.all_kicked()

    def device_reset(self) -> None:
        self._left_over = False
        self.update_running()
        self._reception.missed += self._queues.forget_all()
        self.mode.device_reset()
        self._kicked = self._again = 0
        self.state = self._initial_state()
        self.steering.resize(1)
        self._reception.start_over()
        self.function.reset_transport()

    def config_events(self, events: ConfigEvents) -> None:
        if events & (ConfigEvents.FUNCTION_LEVEL_RESET | ConfigEvents.POWER_D0):
            flr = events & ConfigEvents.FUNCTION_LEVEL_RESET
            self._reset(ResetCause.FUNCTION_LEVEL if flr else ResetCause.POWER_STATE)
        else:
            self.update_running()

    def device_config(self) -> bytes:
        status = NetStatus.LINK_UP if self.link_up else NetStatus(0)
        if self.state.announce:
            status |= NetStatus.ANNOUNCE
        known = self.config.offered & Feature.SPEED_DUPLEX.mask
        return NetConfig(
            mac=self.state.filter.mac,
            status=status,
            max_virtqueue_pairs=self.config.queue_pairs,
            mtu=self.config.mtu or 0,
            speed=self.config.speed if known else 0,
            duplex=DUPLEX_FULL if known else DUPLEX_UNKNOWN,
        ).encode()

    def _reset(self, cause: ResetCause) -> None:
        _log.debug("%s: reset: %s", self.name, cause.value)
        self.mode.function_reset()
        self.function.reset()
        self.device_reset()

    def update_running(self) -> None:
        """Run or stop, after something that has a say in it has changed."""
        running = (
            self._in_session
            and not self._left_over
            and self.function.common.live
            and self.function.may_dma
            and not self.mode.stopped
        )
        if running == self.running:
            return
        self.running = running
        if running:
            self._again = self._queues.all_kicked()
            self._wake.set()
            self.mode.started()
        else:
            self._queues.close()
        self._switch.refresh()

    def paused(self) -> None:
        """`mode.stopping` has changed: frames may, or may not, be delivered here."""
        self._switch.refresh()

    def restore(self, state: DeviceState) -> None:
        """Take on all of `state`, while stopped.  It says how the driver has left the device, so
        the driver counts as heard of."""
        common = self.function.common
        common.state = state.common
        self.state = state.net
        self.steering.resize(state.net.queue_pairs)
        self._reception.start_over()
        self._left_over = False
        if common.state.status & Status.FEATURES_OK and not state.net.features:
            common.needs_reset()

    def _fail(self, error: DriverError) -> None:
        self._driver_errors += 1
        self._tell(
            logging.WARNING, f"the guest's driver broke a rule: {error}; it has to reset the device"
        )
        self.function.common.needs_reset()
        self.update_running()
        self.function.interrupt_config()

    def _tell(self, level: int, what: str) -> None:
        """Log what a guest may bring about as often as it likes, so often and no more a session."""
        if self._lines_left:
            self._lines_left -= 1
            last = "" if self._lines_left else " (no more of this until the next session)"
            _log.log(level, "%s: %s%s", self.name, what, last)

    # --- the link and its announcement ---------------------------------------------------------

    def set_link(self, up: bool) -> None:
        """Plug the cable in or pull it, as the guest sees it."""
        self._plugged = up
        self._update_link()

    def set_wired(self, wired: bool) -> None:
        """Whether the cable leads to somebody; the guest does not see the difference."""
        self._wired = wired
        self._update_link()

    def _update_link(self) -> None:
        up = self._plugged and self._wired
        if up != self.link_up:
            self.link_up = up
            if self._in_session:
                _log.info("%s: the guest's link is %s", self.name, "up" if up else "down")
            self._config_changed()
            self._switch.refresh()

    def announce(self) -> None:
        """Ask the driver to announce itself (GUEST_ANNOUNCE), if it can."""
        if self.state.features & Feature.GUEST_ANNOUNCE.mask and not self.state.announce:
            self.state.announce = True
            self._config_changed()

    def announce_to_network(self) -> None:
        """Tell the switches that the driver's address is here."""
        frame, size = rarp_request(self.state.filter.mac)
        self._switch.forward(self, frame, size)
        self._switch.flush()

    def _config_changed(self) -> None:
        self.function.common.config_changed()
        if self.function.common.state.status & Status.DRIVER_OK and not self.mode.stopped:
            self.function.interrupt_config()

    # --- the queues ----------------------------------------------------------------------------

    def slow_failed(self, error: DriverError) -> None:
        """The slow service met a broken rule."""
        self._fail(error)

    def send(self, pair: int, frame: Sequence[Buffer], size: int) -> bool:
        """The driver sent a frame on queue pair `pair`; False: keep it, `resume` will come."""
        if self.steering.pairs > 1:
            self.steering.sent(flow_slot(flow_bytes(frame)), pair)
        return self._switch.forward(self, frame, size)

    def sent(self) -> None:
        """A batch has been sent outside of `work`."""
        self._switch.flush()
        self._switch.poll(self)

    def execute(self, command: bytes) -> bytes:
        """A control command of the driver; the bytes of the answer."""
        answer, change = execute_untrusted(self.state, command)
        if change & Change.QUEUE_PAIRS:
            self.steering.resize(self.state.queue_pairs)
            self._reception.start_over()
        if change & Change.OFFLOADS:
            self._switch.refresh()
        return answer

    def _run(self, kicked: int) -> None:
        queues = self._queues
        if not queues.ensure_open():
            return
        if kicked & queues.receive_mask:
            queues.effort.rested()
            self._switch.writable(self)
        blocked = False
        for turn in (kicked >> self._turn << self._turn, kicked & (1 << self._turn) - 1):
            while turn:
                lowest = turn & -turn
                turn ^= lowest
                index = lowest.bit_length() - 1
                outcome = queues.run(index, limits.WORK_BUDGET)
                if outcome is Outcome.MORE:
                    self._again |= lowest
                    self._wake.set()
                elif outcome is Outcome.BLOCKED and not blocked:
                    blocked = True
                    self._turn = index + 1

    def _memory_released(self, start: int, end: int) -> None:
        self._queues.memory_released(start, end)

    # --- Sender --------------------------------------------------------------------------------

    def resume(self) -> None:
        queues = self._queues
        self._again |= queues.send_mask if queues.open else queues.all_kicked()
        queues.kick_slow_senders()
        self._wake.set()

    def receive_again(self) -> None:
        """There is room for frames again, when others have had their turn."""
        self._again |= self._queues.receive_mask
        self._wake.set()

    def room(self) -> None:
        """The slow service has taken frames off a backlog."""
        self._switch.writable(self)

    # --- DirectPort ----------------------------------------------------------------------------

    @property
    def offloads(self) -> Offload:
        offloads = Offload(self.state.guest_offloads)
        return offloads if offloads & Offload.CSUM else Offload(0)

    @property
    def up(self) -> bool:
        held = self.mode.stopped and self._in_session
        return self.link_up and (held or (self.running and not self.mode.stopping))

"""The software owner as a PCI function of its own: a PF that a driver can open.

Members are migrated through their owner, and the daemon that has both asks it in process.  A PF
that is served puts all that hardware has between: the common configuration with ADMIN_VQ and the
administration virtqueue's index (virtio 1.4, Virtio Over PCI Bus), a ring in the driver's memory,
interrupts, resets.  Linux's virtio_pci in a guest drives it, and so does our own owner over VFIO.

To a driver it is a virtio-net device with one queue pair and no link: what the network does belongs
to the members.  Without a link Linux sends nothing, so nothing of that pair is served.

The PF belongs to its client.  When the client goes, the PF is reset, and with it what Linux calls
the admin state: lists, capabilities, objects.  Members keep running, as VFs of a PF that is reset
would not; a model whose members ended there would say nothing about its driver that this one does
not.

There is no SR-IOV capability, since the VFs are functions of their own sockets; SR_IOV is offered
only where asked, for a driver that insists.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.admin_queue import NO_DELAY, SoftwareAdminQueue
from vfio_user_virtio.backends.software.administration import Administration
from vfio_user_virtio.backends.software.function import Function, FunctionFront
from vfio_user_virtio.backends.software.owner_function_config import ADMIN_QUEUE
from vfio_user_virtio.backends.software.owner_function_queue import AdminVirtqueue
from vfio_user_virtio.device import ResetCause
from vfio_user_virtio.errors import DriverError
from vfio_user_virtio.memory.access import GuestAccess
from vfio_user_virtio.memory.guest_memory import GuestMemory
from vfio_user_virtio.pci.config_space import ConfigEvents
from vfio_user_virtio.virtio.features import Feature, feature_names
from vfio_user_virtio.virtio.net_config import DUPLEX_UNKNOWN, NetConfig, NetStatus
from vfio_user_virtio.virtio.slow_queue import SlowQueue
from vfio_user_virtio.virtio.split_queue import check_alignment_untrusted

if TYPE_CHECKING:
    from vfio_user_virtio.backends.software.admin_queue import DeviceTiming
    from vfio_user_virtio.backends.software.owner import Owner
    from vfio_user_virtio.backends.software.owner_function_config import OwnerFunctionConfig
    from vfio_user_virtio.device import (
        DmaMapping,
        RemoteMemory,
    )

_log: Final = logging.getLogger(__name__)


class OwnerFunction(FunctionFront):
    """The PF of `owner`, called `name` in logs.  A `Device`."""

    def __init__(
        self,
        name: str,
        config: OwnerFunctionConfig,
        owner: Owner,
        timing: DeviceTiming = NO_DELAY,
    ) -> None:
        self.name = name
        self.config = config
        self.memory = GuestMemory(allow_unsealed=config.allow_unsealed_memory)
        self.function = Function(config, self, admin_queues=1)
        self.administration: Final = Administration(owner, linux_compat=config.linux_compat)
        self._queue = AdminVirtqueue(
            name,
            SoftwareAdminQueue(self.administration, timing),
            interrupt=self._interrupt,
            failed=self._fail,
        )
        self._access: GuestAccess | None = None
        self._running = False
        self._lines_left = limits.MAX_GUEST_LOG_LINES

    # --- Device: what the client asks ----------------------------------------------------------

    async def dma_map(self, mapping: DmaMapping) -> None:
        self.memory.map(mapping)

    async def dma_unmap(self, iova: int, size: int) -> None:
        self.memory.unmap(iova, size)

    async def reset(self, cause: ResetCause) -> None:
        self._reset(cause)

    async def serve(self, memory: RemoteMemory) -> None:
        self._access = GuestAccess(self.memory, memory)
        self._update()
        await self._queue.run()

    async def release(self) -> None:
        self._access = None
        self._reset(ResetCause.CLIENT)
        self._lines_left = limits.MAX_GUEST_LOG_LINES
        self.memory.clear()
        self.function.interrupts.close()

    def work(self) -> None:
        """Nothing is left for later: a kick sets the queue's own task going."""

    # --- what registers set in motion ----------------------------------------------------------

    def kick(self, queue: int) -> None:
        if queue == ADMIN_QUEUE:
            self._queue.kick()

    def features_accepted(self, features: int) -> None:
        pass

    def driver_ok(self) -> None:
        names = " ".join(feature_names(self.function.common.features))
        self._tell(logging.INFO, f"the driver is ready: {names}")
        self._update()

    def queue_enabled(self, index: int) -> None:
        self._update()

    def queue_reset(self, index: int) -> None:
        """RING_RESET is not offered."""

    def device_reset(self) -> None:
        self._stop()
        self.administration.reset()
        self.function.reset_transport()

    def config_events(self, events: ConfigEvents) -> None:
        if events & ConfigEvents.FUNCTION_LEVEL_RESET:
            self._reset(ResetCause.FUNCTION_LEVEL)
        elif events & ConfigEvents.POWER_D0:
            self._reset(ResetCause.POWER_STATE)
        else:
            self._update()

    def device_config(self) -> bytes:
        return NetConfig(
            mac=self.config.mac,
            status=NetStatus(0),
            max_virtqueue_pairs=1,
            mtu=0,
            speed=0,
            duplex=DUPLEX_UNKNOWN,
        ).encode()

    # --- the administration virtqueue ----------------------------------------------------------

    def _update(self) -> None:
        """Serve the queue, after something that has a say in it has changed.

        A driver that takes bus mastering away stops it for good, until it resets the device.
        """
        common = self.function.common
        registers = common.state.queues[ADMIN_QUEUE]
        live = (
            self._access is not None
            and self.function.may_dma
            and common.live
            and bool(common.features & Feature.ADMIN_VQ.mask)
            and registers.enabled
        )
        if not live:
            self._queue.stop()
        elif not self._running:
            assert self._access is not None
            try:
                check_alignment_untrusted(registers.desc, registers.driver, registers.device)
            except DriverError as error:
                self._fail(error)
                return
            self._running = True
            self._queue.start(
                SlowQueue(
                    registers.size,
                    registers.desc,
                    registers.driver,
                    registers.device,
                    memory=self._access,
                    event_idx=bool(common.features & Feature.EVENT_IDX.mask),
                    indirect=bool(common.features & Feature.INDIRECT_DESC.mask),
                )
            )

    def _stop(self) -> None:
        self._running = False
        self._queue.stop()

    def _reset(self, cause: ResetCause) -> None:
        _log.debug("%s: reset: %s", self.name, cause.value)
        self.function.reset()
        self.device_reset()

    def _interrupt(self) -> None:
        self.function.interrupt_queue(ADMIN_QUEUE)

    def _fail(self, error: DriverError) -> None:
        self._tell(logging.WARNING, f"the driver broke a rule: {error}; it has to reset the device")
        self._queue.stop()
        self.function.common.needs_reset()
        self.function.interrupt_config()

    def _tell(self, level: int, what: str) -> None:
        """Log what a driver may bring about at will, so often and no more in a session."""
        if self._lines_left:
            self._lines_left -= 1
            last = "" if self._lines_left else " (no more of this until the next session)"
            _log.log(level, "%s: %s%s", self.name, what, last)

"""The client's eventfds, given to the kernel as they are: an interrupt never comes by here.

What is decided here is only what the kernel and clients see differently:

- Disabling an index that is not on is fine for a client and EINVAL for the kernel.
- Older kernels fix how many MSI-X vectors there are when the first is armed (NORESIZE), and a
  client that is told so disables and arms all of them again for each new one.  So clients are not
  told, and on such kernels the first call arms the whole table, empty but for what was asked.
- REQ, by which the kernel asks for the device back, has one listener, and that has to be us: a
  device that nobody gives back blocks whoever unbinds it for ever.  A client's eventfd for it is
  kept, and signalled when ours is.

The kernel takes its own reference of an eventfd, so they are closed once they are armed.

Source: vfio-user, VFIO_USER_DEVICE_SET_IRQS; Linux, drivers/vfio/pci/vfio_pci_intrs.c.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.backends.vfio.kernel import KernelRefusal
from vfio_user_virtio.backends.vfio.vfio_device import NO_EVENTFD
from vfio_user_virtio.device import IrqAction, IrqFlags, IrqInfo, VfioIrq

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_user_virtio.backends.vfio.vfio_device import VfioDevice
    from vfio_user_virtio.device import IrqRequest

_ABSENT: Final = IrqInfo(0, IrqFlags(0))
_FUNCTION: Final = (VfioIrq.INTX, VfioIrq.MSI, VfioIrq.MSIX)
"""What the function interrupts by; the others tell of errors and of the kernel's wishes."""


class ClientInterrupts:
    """The interrupts of `device`, as one client after another has them."""

    def __init__(self, device: VfioDevice) -> None:
        self._device = device
        self._on: set[int] = set()
        self._client_req = NO_EVENTFD

    def info(self, index: int) -> IrqInfo:
        """Interrupt `index`, without NORESIZE; count 0 for one that is absent."""
        irqs = self._device.irqs
        if index >= len(irqs) or not irqs[index].count:
            return _ABSENT
        return IrqInfo(irqs[index].count, irqs[index].flags & ~IrqFlags.NORESIZE)

    def set_irqs(self, request: IrqRequest) -> None:
        """Do what a SET_IRQS says, and close its eventfds.  Raises KernelRefusal."""
        eventfds = request.eventfds
        try:
            if request.index == VfioIrq.REQ and request.action is IrqAction.TRIGGER:
                self._set_req(request)
            elif eventfds is not None:
                self._arm(request.index, request.start, request.count, eventfds)
            elif request.action is IrqAction.TRIGGER and not request.count:
                self.disable(request.index)
            else:
                self._device.act_on_irqs(
                    request.index, request.start, request.count, request.action, request.bools
                )
        finally:
            for eventfd in eventfds or ():
                os.close(eventfd)

    def disable(self, index: int) -> None:
        """Turn an index off; nothing if it is off.  Raises KernelRefusal."""
        if index in self._on:
            self._device.disable_irqs(index)
            self._on.discard(index)

    def inject_all(self) -> None:
        """Send each of the function's interrupts once.  Raises KernelRefusal."""
        for index in _FUNCTION:
            if index in self._on:
                count = self._device.irqs[index].count
                self._device.act_on_irqs(index, 0, count, IrqAction.TRIGGER)

    def close(self) -> None:
        """Turn all of the client's off.  Raises KernelRefusal, having tried all."""
        failed: KernelRefusal | None = None
        for index in sorted(self._on):
            try:
                self.disable(index)
            except KernelRefusal as error:
                failed = error
        self._on.clear()
        self._keep_req(NO_EVENTFD)
        if failed is not None:
            raise failed

    def signal_request(self) -> None:
        """Tell the client, if it wants to know, that the kernel wants the device back."""
        if self._client_req != NO_EVENTFD:
            with contextlib.suppress(OSError):  # it has been told often enough
                os.eventfd_write(self._client_req, 1)

    def _arm(self, index: int, start: int, count: int, eventfds: Sequence[int]) -> None:
        fds = list(eventfds) or [NO_EVENTFD] * count
        if not fds or (not eventfds and index not in self._on and index != VfioIrq.MSIX):
            return  # nothing of what is not armed is taken away
        irq = self._device.irqs[index]
        if index not in self._on and irq.flags & IrqFlags.NORESIZE:
            head = [NO_EVENTFD] * start
            fds = head + fds + [NO_EVENTFD] * (irq.count - start - len(fds))
            start = 0
        self._device.set_eventfds(index, start, fds)
        self._on.add(index)

    def _set_req(self, request: IrqRequest) -> None:
        if request.eventfds is not None:
            self._keep_req(os.dup(request.eventfds[0]) if request.eventfds else NO_EVENTFD)
        elif not request.count:
            self._keep_req(NO_EVENTFD)
        else:
            self.signal_request()

    def _keep_req(self, eventfd: int) -> None:
        before, self._client_req = self._client_req, eventfd
        if before != NO_EVENTFD:
            os.close(before)

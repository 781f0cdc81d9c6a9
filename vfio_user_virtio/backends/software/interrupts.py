"""The interrupts of one function: the client's eventfds, and when they are signalled.

Modelled on the kernel's VFIO (``vfio_pci_intrs.c``), whose SET_IRQS the client expects, and on what
stock QEMU needs of it (vfio-user, VFIO_USER_DEVICE_SET_IRQS):

* one batch per MSI-X enable: no NORESIZE flag, else QEMU re-sends all vectors for each new one;
* INTx is level: signalling it masks it until the client sends UNMASK, and if the level is still
  asserted then, it is signalled again;
* an MSI-X vector that fires without an eventfd becomes pending, and arming it delivers (why mask
  bits have no say: `vfio_user_virtio.pci.msix`);
* ERR and REQ are there, as they are of every PCI Express function of the kernel's, and the device
  never signals them.  QEMU answers ERR by stopping the guest for good, which is right for hardware
  that has failed; all that can befall this device is DEVICE_NEEDS_RESET, which the guest's driver
  mends by itself.  REQ asks the client to give a device of the host back, and there is none.

A request is checked as a whole before anything of it takes effect, and its eventfds are closed
if it fails.  Where the kernel and the wire's own rules leave a choice, it is the kernel's:
masking what cannot be masked is ENOTTY; injecting into an interrupt without an eventfd does
nothing.

How an eventfd is signalled without ever waiting for a hostile client, see
`vfio_user_virtio.backends.software.eventfds`.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.backends.software.eventfds import shared_signaller
from vfio_user_virtio.device import IrqAction, IrqFlags, IrqInfo, VfioIrq
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.eventfd import check_eventfd_untrusted
from vfio_user_virtio.pci.msix import PendingBits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_user_virtio.device import IrqRequest

_NOT_ARMED: Final = -1
_ABSENT: Final = IrqInfo(0, IrqFlags(0))


@attrs.frozen
class InterruptStatistics:
    """Counts since the function was made.

    `signalled` interrupts had an eventfd (one whose counter is full stays full: the client has
    been told), `pended` ones of MSI-X had none.
    """

    signalled: int
    pended: int


class Interrupts:
    """Eventfds and delivery of a function with INTx, `vectors` ≥ 1 of MSI-X, ERR and REQ.

    `pending` is what the client reads as the pending bit array.  All of it is state of the
    function but the eventfds, which are the session's: `close` gives them back.
    """

    def __init__(self, vectors: int) -> None:
        self.pending: Final = PendingBits(vectors)
        self._info: Final[dict[int, IrqInfo]] = {
            VfioIrq.INTX: IrqInfo(1, IrqFlags.EVENTFD | IrqFlags.MASKABLE | IrqFlags.AUTOMASKED),
            VfioIrq.MSI: _ABSENT,
            VfioIrq.MSIX: IrqInfo(vectors, IrqFlags.EVENTFD),
            VfioIrq.ERR: IrqInfo(1, IrqFlags.EVENTFD),
            VfioIrq.REQ: IrqInfo(1, IrqFlags.EVENTFD),
        }
        self._eventfds: Final[dict[int, list[int]]] = {
            index: [_NOT_ARMED] * info.count for index, info in self._info.items()
        }
        self._vectors = self._eventfds[VfioIrq.MSIX]
        self._intx = self._eventfds[VfioIrq.INTX]
        self._signal = shared_signaller().signal
        self._intx_level = False
        self._intx_masked = False
        self._intx_disabled = False
        self._signalled = 0
        self._pended = 0

    def info(self, index: int) -> IrqInfo:
        """The interrupt `index`; count 0 for one that is absent."""
        return self._info.get(index, _ABSENT)

    def trigger(self, vector: int) -> None:
        """Fire an MSI-X vector; one that is not there, such as NO_VECTOR, is ignored."""
        try:
            eventfd = self._vectors[vector]
        except IndexError:
            return
        if eventfd >= 0:
            self._signalled += 1
            self._signal(eventfd)
        else:
            self._pended += 1
            self.pending.add(vector)

    def set_intx_level(self, asserted: bool) -> None:
        """Assert or deassert INTx; signalled when asserted and not masked or disabled."""
        self._intx_level = asserted
        self._deliver_intx()

    def set_intx_disabled(self, disabled: bool) -> None:
        """Follow INTx Disable of the COMMAND register."""
        self._intx_disabled = disabled
        self._deliver_intx()

    def set_irqs(self, request: IrqRequest) -> None:
        """Do what a SET_IRQS says; `IrqRequest` tells how.

        Raises ClientError, having changed nothing and closed the request's eventfds: EINVAL for a
        range that is not there, data that does not fit and fds that are no eventfds; ENOTTY for
        masking what cannot be masked.
        """
        eventfds = request.eventfds or ()
        try:
            self._check_untrusted(request)
            for eventfd in eventfds:
                check_eventfd_untrusted(eventfd)
        except ClientError:
            for eventfd in eventfds:
                os.close(eventfd)
            raise
        if request.action is IrqAction.TRIGGER:
            self._set_trigger(request)
        elif list(_selected(request)):
            self._intx_masked = request.action is IrqAction.MASK
            self._deliver_intx()

    def reset(self) -> None:
        """The device is reset: INTx is deasserted, nothing is pending.

        The eventfds and the client's masking stay; so does INTx Disable, which a reset of the
        virtio device alone leaves (after one of the function: `set_intx_disabled`).
        """
        self._intx_level = False
        self.pending.clear()

    def close(self) -> None:
        """Close every eventfd and forget the client's masking; the rest of the state stays."""
        for index in self._eventfds:
            self._disarm(index, 0, self._info[index].count)

    def statistics(self) -> InterruptStatistics:
        return InterruptStatistics(self._signalled, self._pended)

    def _check_untrusted(self, request: IrqRequest) -> None:
        info = self.info(request.index)
        known = request.index in self._info
        if not known or not 0 <= request.start <= request.start + request.count <= info.count:
            raise ClientError(
                errno.EINVAL,
                f"SET_IRQS of {request.count} interrupts from {request.start} of index"
                f" {request.index}, which has {info.count}",
            )
        if request.action is not IrqAction.TRIGGER:
            if not info.flags & IrqFlags.MASKABLE:
                raise ClientError(
                    errno.ENOTTY,
                    f"SET_IRQS: interrupt index {request.index} cannot be masked; take its"
                    " eventfds away instead",
                )
            if request.eventfds is not None:
                raise ClientError(errno.EINVAL, "SET_IRQS: eventfds go with TRIGGER only")
        for name, items in (("eventfds", request.eventfds or None), ("bools", request.bools)):
            if items is not None and len(items) != request.count:
                raise ClientError(
                    errno.EINVAL,
                    f"SET_IRQS of {request.count} interrupts came with {len(items)} {name}",
                )

    def _set_trigger(self, request: IrqRequest) -> None:
        index = request.index
        if request.eventfds:
            for subindex, eventfd in enumerate(request.eventfds, request.start):
                self._arm(index, subindex, eventfd)
        elif request.eventfds is not None:
            self._disarm(index, request.start, request.count)
        elif request.bools is None and not request.count:
            self._disarm(index, 0, self._info[index].count)
        else:
            for subindex in _selected(request):
                self._tell(self._eventfds[index][subindex])

    def _arm(self, index: int, subindex: int, eventfd: int) -> None:
        armed = self._eventfds[index]
        old, armed[subindex] = armed[subindex], eventfd
        if old != _NOT_ARMED:
            os.close(old)
        if index == VfioIrq.INTX:
            self._deliver_intx()
        elif index == VfioIrq.MSIX and self.pending.take(subindex):
            self._tell(eventfd)

    def _disarm(self, index: int, start: int, count: int) -> None:
        armed = self._eventfds[index]
        for subindex in range(start, start + count):
            eventfd, armed[subindex] = armed[subindex], _NOT_ARMED
            if eventfd != _NOT_ARMED:
                os.close(eventfd)
        if index == VfioIrq.INTX and count:
            self._intx_masked = False

    def _deliver_intx(self) -> None:
        eventfd = self._intx[0]
        wanted = self._intx_level and not (self._intx_masked or self._intx_disabled)
        if wanted and eventfd != _NOT_ARMED:
            self._intx_masked = True
            self._tell(eventfd)

    def _tell(self, eventfd: int) -> None:
        if eventfd != _NOT_ARMED:
            self._signalled += 1
            self._signal(eventfd)


def _selected(request: IrqRequest) -> Iterator[int]:
    """The sub-indices that a request without eventfds acts on."""
    for position in range(request.count):
        if request.bools is None or request.bools[position]:
            yield request.start + position

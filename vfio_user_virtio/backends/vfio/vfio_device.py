"""One open VFIO device: its regions, interrupts and reset, in calls that say what they do.

Nothing is decided here.  The VF backend serves a guest with it, the PF owner drives its own queue
with it; both get the same registers.  How the device was opened, by group or by its own node, makes
no difference from here on (`opening`).

Register access.  A driver means one access of 1, 2 or 4 bytes, and the kernel makes of a `pread` or
`pwrite` of that size, naturally aligned, exactly one.  Eight bytes are two accesses of four, low
first: what newer kernels make of them is one access of eight, which virtio devices need not
understand.  Any other size is left to the kernel, which cuts it as it sees fit.

All calls block.  Those that wait for hardware (`reset`: 0.1 s) or move much are the caller's to put
in a thread.  All raise KernelRefusal, with the device's name.

Source: Linux, drivers/vfio/pci/vfio_pci_rdwr.c; virtio 1.4, Virtio Over PCI Bus.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.backends.vfio import uapi
from vfio_user_virtio.backends.vfio.kernel import KernelRefusal, ioctl, refusal
from vfio_user_virtio.backends.vfio.uapi import DeviceIoctl, KernelDeviceFlags
from vfio_user_virtio.device import FeatureOperation, IrqAction, IrqFlags, RegionFlags

if TYPE_CHECKING:
    import uuid
    from collections.abc import Sequence

    from vfio_user_virtio.backends.vfio.uapi import KernelIrq, KernelRegion

NO_EVENTFD: Final = -1

_ACCESS_REMEDIES: Final = {
    errno.EIO: "memory decoding is off in its COMMAND register, or the device has gone"
}
_ABSENT_IRQ: Final = uapi.KernelIrq(0, IrqFlags(0))
_ABSENT_REGION: Final = uapi.KernelRegion(0, 0, RegionFlags(0))


class VfioDevice:
    """The device behind `fd`, which this object owns; `name` is its PCI address.

    What the kernel says of it is asked once, here: it does not change while it is open.
    `extra_fds` are closed after it: what kept it attached.
    """

    def __init__(self, fd: int, name: str, extra_fds: Sequence[int] = ()) -> None:
        self.fd = fd
        self.name: Final = name
        self._extra_fds = list(extra_fds)
        try:
            info = uapi.encode_device_info()
            self._ioctl(DeviceIoctl.GET_INFO, info, "asking what it is")
            self.info: Final = uapi.decode_device_info(info)
            self.regions: Final = tuple(map(self._region, range(self.info.num_regions)))
            self.irqs: Final = tuple(map(self._irq, range(self.info.num_irqs)))
        except BaseException:
            self.close()
            raise

    @property
    def can_reset(self) -> bool:
        """Whether the kernel has a way to reset this function alone."""
        return bool(self.info.flags & KernelDeviceFlags.RESET)

    @property
    def closed(self) -> bool:
        return self.fd < 0

    def close(self) -> None:
        """Give the device back.  The kernel then resets it, and ends its interrupts and DMA."""
        fds, self.fd, self._extra_fds = [self.fd, *self._extra_fds], -1, []
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    # --- registers -----------------------------------------------------------------------------

    def read(self, region: int, offset: int, count: int) -> bytes:
        """`count` bytes at `offset` of region `region`; see the module head for the accesses."""
        if count == 8:
            return self._read(region, offset, 4) + self._read(region, offset + 4, 4)
        return self._read(region, offset, count)

    def write(self, region: int, offset: int, data: bytes | memoryview) -> None:
        if len(data) == 8:
            self._write(region, offset, data[:4])
            self._write(region, offset + 4, data[4:])
        else:
            self._write(region, offset, data)

    def _read(self, region: int, offset: int, count: int) -> bytes:
        try:
            data = os.pread(self.fd, count, self.regions[region].offset + offset)
        except OSError as error:
            what = f"reading {count} bytes at {offset:#x} of region {region}"
            raise self._refusal(error, what) from error
        if len(data) != count:
            raise self._short(f"reading {count} bytes at {offset:#x} of region {region}", len(data))
        return data

    def _write(self, region: int, offset: int, data: bytes | memoryview) -> None:
        try:
            written = os.pwrite(self.fd, data, self.regions[region].offset + offset)
        except OSError as error:
            what = f"writing {len(data)} bytes at {offset:#x} of region {region}"
            raise self._refusal(error, what) from error
        if written != len(data):
            what = f"writing {len(data)} bytes at {offset:#x} of region {region}"
            raise self._short(what, written)

    # --- interrupts and reset ------------------------------------------------------------------

    def set_eventfds(self, index: int, start: int, eventfds: Sequence[int]) -> None:
        """Have interrupts `start` … of `index` signal `eventfds`; NO_EVENTFD: one of them nothing.

        The kernel keeps what it needs of them: they may be closed at once.  Another index must be
        disabled before (EINVAL).
        """
        request = uapi.encode_irq_set(
            index, start, len(eventfds), IrqAction.TRIGGER, eventfds=eventfds
        )
        self._ioctl(
            DeviceIoctl.SET_IRQS,
            request,
            f"arming {len(eventfds)} interrupts of index {index} from {start} on",
        )

    def act_on_irqs(
        self,
        index: int,
        start: int,
        count: int,
        action: IrqAction,
        bools: Sequence[bool] | None = None,
    ) -> None:
        """Mask, unmask or inject interrupts `start` …; of `bools` those that are true."""
        request = uapi.encode_irq_set(index, start, count, action, bools=bools)
        what = f"{action.name} of {count} interrupts of index {index}"
        self._ioctl(DeviceIoctl.SET_IRQS, request, what)

    def disable_irqs(self, index: int) -> None:
        """Turn the whole index off.  EINVAL if it is not on."""
        request = uapi.encode_irq_set(index, 0, 0, IrqAction.TRIGGER)
        self._ioctl(DeviceIoctl.SET_IRQS, request, f"disabling the interrupts of index {index}")

    def reset(self) -> None:
        """Reset the function: by FLR, which takes 0.1 s, or what else the kernel has."""
        self._ioctl(DeviceIoctl.RESET, 0, "resetting it")

    def set_vf_token(self, token: uuid.UUID) -> None:
        """Of a PF: what whoever opens its VFs has to know from now on."""
        request = uapi.encode_feature(
            uapi.KernelFeature.VF_TOKEN, FeatureOperation.SET, token.bytes
        )
        self._ioctl(DeviceIoctl.FEATURE, request, "setting the VF token")

    # --- asking --------------------------------------------------------------------------------

    def _region(self, index: int) -> KernelRegion:
        answer = uapi.encode_region_info(index)
        try:
            self._ioctl(DeviceIoctl.GET_REGION_INFO, answer, f"asking for region {index}")
            if (needed := uapi.needed_size(answer)) > len(answer):
                answer = uapi.encode_region_info(index, needed)
                self._ioctl(DeviceIoctl.GET_REGION_INFO, answer, f"asking for region {index}")
        except KernelRefusal as error:
            if error.errno == errno.EINVAL:  # VGA of what is no VGA
                return _ABSENT_REGION
            raise
        return uapi.decode_region_info(answer)

    def _irq(self, index: int) -> KernelIrq:
        answer = uapi.encode_irq_info(index)
        try:
            self._ioctl(DeviceIoctl.GET_IRQ_INFO, answer, f"asking for interrupt {index}")
        except KernelRefusal as error:
            if error.errno == errno.EINVAL:  # ERR of what is not PCI Express
                return _ABSENT_IRQ
            raise
        return uapi.decode_irq_info(answer)

    def _ioctl(self, request: DeviceIoctl, argument: bytearray | int, what: str) -> int:
        return ioctl(self.fd, request, argument, what=f"{self.name}: {what}")

    def _refusal(self, error: OSError, what: str) -> KernelRefusal:
        return refusal(error, f"{self.name}: {what}", _ACCESS_REMEDIES)

    def _short(self, what: str, count: int) -> KernelRefusal:
        return KernelRefusal(errno.EIO, f"{self.name}: {what}: the kernel did {count}")

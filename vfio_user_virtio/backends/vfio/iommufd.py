"""VFIO by a node of the device's own, and iommufd: the way of Linux 6.6 and newer.

A device is opened by /dev/vfio/devices/vfioN, bound to a descriptor of /dev/iommu, and attached to
an address space there (IOAS).  What it has over groups: memory files are mapped as such (Linux
6.13), so that a guest's memory never is in our address space; and a page table that tracks what the
device has written (HWPT with dirty tracking), where the IOMMU can.  Such a page table has to be
made before the device is attached, so it is made wherever it is possible.

Dirty tracking knows pages as the IOMMU has them: where it maps 2 MiB at once, 2 MiB are dirty.
Small pages would be finer, and cost the device address translations all the time; so they are left.

Source: Linux, Documentation/userspace-api/iommufd.rst, include/uapi/linux/iommufd.h.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.backends.vfio import iommufd_uapi as codec
from vfio_user_virtio.backends.vfio.address_space import AddressLimits
from vfio_user_virtio.backends.vfio.iommufd_uapi import IommufdIoctl
from vfio_user_virtio.backends.vfio.kernel import (
    KernelRefusal,
    address_of,
    ioctl,
    malformed,
    refusal,
)
from vfio_user_virtio.backends.vfio.uapi import DeviceIoctl
from vfio_user_virtio.backends.vfio.vfio_device import VfioDevice
from vfio_user_virtio.device import DmaAccess

if TYPE_CHECKING:
    import uuid

DEV: Final = Path("/dev")
IOMMUFD: Final = "iommu"
CDEVS: Final = "vfio/devices"

_OPEN_REMEDIES: Final = {
    errno.ENOENT: "the kernel has no iommufd or no device nodes of VFIO (Linux 6.6, "
    "CONFIG_IOMMUFD, CONFIG_VFIO_DEVICE_CDEV), or the device is not bound to vfio-pci",
    errno.EACCES: "give this user read and write access to it (an ACL, or a udev rule)",
    errno.EBUSY: "another process has the device; end that one",
}
_BIND_REMEDIES: Final = {
    errno.EPERM: "the host's IOMMU does not remap interrupts; if you trust every guest, allow it: "
    "echo 1 > /sys/module/iommufd/parameters/allow_unsafe_interrupts",
    errno.EACCES: "its PF is owned by a user of VFIO, and the VF token is missing or wrong",
    errno.EBUSY: "its group is open in another process; end that one",
    errno.EINVAL: "another process has the device, end that one; or a VF token was given for a "
    "function that takes none",
}
_NO_IOAS: Final = 0
_NOT_THERE: Final = frozenset({errno.ENOTTY, errno.EOPNOTSUPP})
_MAX_RANGES: Final = 4096
_WORD: Final = 8


class IommufdSpace:
    """An IOAS of the iommufd behind `fd`, which this object owns."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._hwpt: int | None = None
        answer = codec.encode_ioas_alloc()
        self._ioctl(IommufdIoctl.IOAS_ALLOC, answer, "making an address space")
        self._ioas = codec.decode_ioas_alloc(answer)
        self.maps_files: Final = self._knows_files()
        self.limits = AddressLimits(1)

    @property
    def tracks_dirty(self) -> bool:
        return self._hwpt is not None

    def attach(self, device_fd: int, device_id: int, name: str) -> None:
        """Give the address space to the device, which has the number `device_id` on the iommufd."""
        self._hwpt = self._tracking_page_table(device_id)
        ioctl(
            device_fd,
            DeviceIoctl.ATTACH_IOMMUFD_PT,
            codec.encode_attach(self._hwpt if self._hwpt is not None else self._ioas),
            what=f"{name}: attaching it to an address space",
        )
        self.limits = self._ask_limits()

    def map_memory(self, iova: int, size: int, access: DmaAccess, address: int) -> None:
        request = codec.encode_map(self._ioas, iova, size, access, address)
        self._ioctl(IommufdIoctl.IOAS_MAP, request, f"mapping {size:#x} bytes at {iova:#x}")

    def map_file(self, iova: int, size: int, access: DmaAccess, fd: int, offset: int) -> None:
        request = codec.encode_map_file(self._ioas, iova, size, access, fd, offset)
        self._ioctl(IommufdIoctl.IOAS_MAP_FILE, request, f"mapping {size:#x} bytes at {iova:#x}")

    def unmap(self, iova: int, size: int) -> None:
        request = codec.encode_unmap(self._ioas, iova, size)
        self._ioctl(IommufdIoctl.IOAS_UNMAP, request, f"unmapping {size:#x} bytes at {iova:#x}")

    def unmap_all(self) -> None:
        try:
            request = codec.encode_unmap_all(self._ioas)
            self._ioctl(IommufdIoctl.IOAS_UNMAP, request, "unmapping everything")
        except KernelRefusal as error:
            if error.errno != errno.ENOENT:  # nothing is mapped
                raise

    def set_dirty_tracking(self, on: bool) -> None:
        request = codec.encode_set_dirty_tracking(self._tracking_hwpt(), on)
        what = f"turning dirty tracking {'on' if on else 'off'}"
        self._ioctl(IommufdIoctl.HWPT_SET_DIRTY_TRACKING, request, what)

    def dirty_bitmap(self, iova: int, size: int, page_size: int, *, clear: bool) -> bytearray:
        pages = -(-size // page_size)
        bitmap = bytearray(-(-pages // (8 * _WORD)) * _WORD)
        request = codec.encode_get_dirty_bitmap(
            self._tracking_hwpt(), iova, size, page_size, address_of(bitmap), clear=clear
        )
        what = f"asking what was written of {size:#x} bytes at {iova:#x}"
        self._ioctl(IommufdIoctl.HWPT_GET_DIRTY_BITMAP, request, what)
        return bitmap

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _knows_files(self) -> bool:
        """Whether the kernel knows IOAS_MAP_FILE: then it looks for the address space, in vain."""
        try:
            request = codec.encode_map_file(_NO_IOAS, 0, 0, DmaAccess.READ, -1, 0)
            self._ioctl(IommufdIoctl.IOAS_MAP_FILE, request, "trying to map files")
        except KernelRefusal as error:
            return error.errno not in _NOT_THERE
        return True

    def _tracking_page_table(self, device_id: int) -> int | None:
        """A page table with dirty tracking, or None where the IOMMU or the kernel has none."""
        answer = codec.encode_hw_info(device_id)
        try:
            self._ioctl(IommufdIoctl.GET_HW_INFO, answer, "asking what the IOMMU can do")
            if not codec.decode_tracks_dirty(answer):
                return None
            answer = codec.encode_hwpt_alloc(device_id, self._ioas)
            self._ioctl(IommufdIoctl.HWPT_ALLOC, answer, "making a page table")
        except KernelRefusal as error:
            if error.errno in _NOT_THERE:
                return None
            raise
        return codec.decode_hwpt_alloc(answer)

    def _tracking_hwpt(self) -> int:
        if self._hwpt is None:
            raise KernelRefusal(
                errno.EOPNOTSUPP, "this IOMMU cannot tell which pages a device has written"
            )
        return self._hwpt

    def _ask_limits(self) -> AddressLimits:
        room = 16
        while True:
            found = bytearray(room * codec.IOVA_RANGE.size)
            answer = codec.encode_iova_ranges(self._ioas, room, address_of(found))
            try:
                self._ioctl(IommufdIoctl.IOAS_IOVA_RANGES, answer, "asking what can be mapped")
            except KernelRefusal as error:
                if error.errno != errno.EMSGSIZE:
                    raise
            count, alignment = codec.decode_iova_ranges(answer)
            if count <= room:
                ranges = codec.decode_range_list(found[: count * codec.IOVA_RANGE.size])
                return AddressLimits(max(alignment, 1), ranges)
            if count > _MAX_RANGES:
                raise malformed("IOAS_IOVA_RANGES", f"there are {count} ranges")
            room = count

    def _ioctl(self, request: IommufdIoctl, argument: bytearray, what: str) -> int:
        return ioctl(self._fd, request, argument, what=what)


def open_by_cdev(
    address: str, node: str, vf_token: uuid.UUID | None = None, *, dev: Path = DEV
) -> tuple[VfioDevice, IommufdSpace]:
    """Open the function at `address`, whose node is /dev/vfio/devices/`node`, with a space of its
    own.  Raises HostError; the kernel's refusals as KernelRefusal.
    """
    iommufd = _open(dev / IOMMUFD, address)
    try:
        space = IommufdSpace(iommufd)
        fd = _open(dev / CDEVS / node, address)
        try:
            space.attach(fd, _bind(fd, iommufd, address, vf_token), address)
        except BaseException:
            os.close(fd)
            raise
        return VfioDevice(fd, address), space
    except BaseException:
        os.close(iommufd)
        raise


def _bind(fd: int, iommufd: int, address: str, vf_token: uuid.UUID | None) -> int:
    token = None if vf_token is None else bytearray(vf_token.bytes)
    answer = codec.encode_bind(iommufd, None if token is None else address_of(token))
    what = f"{address}: binding it to iommufd"
    ioctl(fd, DeviceIoctl.BIND_IOMMUFD, answer, what=what, remedies=_BIND_REMEDIES)
    return codec.decode_bind(answer)


def _open(path: Path, address: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise refusal(error, f"{address}: opening {path}", _OPEN_REMEDIES) from error

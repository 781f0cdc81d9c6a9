"""VFIO by group and container: the way of every kernel since 3.6.

Devices that the IOMMU cannot tell apart make a group, and a group is opened as a whole, by one
process at a time.  A container is an address space; one group is in one container, which is all
that is needed here: each VF of a PF has a group of its own, or cannot be given to a guest.

A device that has no IOMMU in front of it (noiommu) can be had this way too, if the administrator
has allowed it: its registers work, but it reaches all of the host's memory by physical addresses,
so nothing can be mapped for it (`NoIommuSpace`).

Rejected: several groups in one container, which would save mappings if one guest had several VFs;
each of them is a session of its own here.

Source: Linux, Documentation/driver-api/vfio.rst; drivers/vfio/vfio_iommu_type1.c.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vfio_user_virtio import limits
from vfio_user_virtio.backends.vfio import type1_uapi, uapi
from vfio_user_virtio.backends.vfio.address_space import AddressLimits
from vfio_user_virtio.backends.vfio.kernel import KernelRefusal, ioctl, refusal
from vfio_user_virtio.backends.vfio.type1_uapi import ContainerIoctl, Extension, IommuType
from vfio_user_virtio.backends.vfio.uapi import GroupFlags, GroupIoctl
from vfio_user_virtio.backends.vfio.vfio_device import VfioDevice
from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    import uuid

    from vfio_user_virtio.backends.vfio.address_space import IoAddressSpace
    from vfio_user_virtio.device import DmaAccess

DEV: Final = Path("/dev")

_OPEN_REMEDIES: Final = {
    errno.ENOENT: "load the kernel modules vfio-pci and vfio_iommu_type1, and bind the device",
    errno.EACCES: "give this user read and write access to it (an ACL, or a udev rule)",
    errno.EPERM: "give this user read and write access to it, and CAP_SYS_RAWIO for noiommu",
    errno.EBUSY: "another process has the group; end that one",
}
_SET_IOMMU_REMEDIES: Final = {
    errno.EPERM: "the host's IOMMU does not remap interrupts; if you trust every guest, allow it: "
    "echo 1 > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts",
}
_DEVICE_REMEDIES: Final = {
    errno.EACCES: "its PF is owned by a user of VFIO, and the VF token is missing or wrong",
    errno.EINVAL: "a VF token is only for VFs whose PF is bound to vfio-pci as well",
    errno.EBUSY: "it is open already, by its own node; end the process that has it",
    errno.ENODEV: "it is not bound to vfio-pci: vfio-user-virtio bind",
}


class Type1Space:
    """The container behind `fd`, which this object owns."""

    maps_files: Final = False
    tracks_dirty: Final = False

    def __init__(self, fd: int) -> None:
        self._fd = fd
        info = _iommu_info(fd)
        smallest = info.page_sizes & -info.page_sizes or limits.PAGE_SIZE
        self.limits = AddressLimits(smallest, info.ranges, info.mappings_left)
        self._unmaps_all = bool(
            ioctl(fd, ContainerIoctl.CHECK_EXTENSION, Extension.UNMAP_ALL, what="VFIO container")
        )

    def map_memory(self, iova: int, size: int, access: DmaAccess, address: int) -> None:
        request = type1_uapi.encode_map(iova, size, access, address)
        what = f"mapping {size:#x} bytes at {iova:#x}"
        ioctl(self._fd, ContainerIoctl.IOMMU_MAP_DMA, request, what=what)

    def map_file(self, iova: int, size: int, access: DmaAccess, fd: int, offset: int) -> None:
        raise KernelRefusal(errno.EOPNOTSUPP, "a VFIO container maps our own memory, not files")

    def unmap(self, iova: int, size: int) -> None:
        request = type1_uapi.encode_unmap(iova, size)
        what = f"unmapping {size:#x} bytes at {iova:#x}"
        ioctl(self._fd, ContainerIoctl.IOMMU_UNMAP_DMA, request, what=what)

    def unmap_all(self) -> None:
        what = "unmapping everything"
        if self._unmaps_all:
            request = type1_uapi.encode_unmap_all()
            ioctl(self._fd, ContainerIoctl.IOMMU_UNMAP_DMA, request, what=what)
            return
        half = 1 << 63  # a size of 2^64 does not fit its field
        for start in (0, half):
            request = type1_uapi.encode_unmap(start, half)
            ioctl(self._fd, ContainerIoctl.IOMMU_UNMAP_DMA, request, what=what)

    def set_dirty_tracking(self, on: bool) -> None:
        raise _no_tracking()

    def dirty_bitmap(self, iova: int, size: int, page_size: int, *, clear: bool) -> bytearray:
        raise _no_tracking()

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class NoIommuSpace:
    """No address space at all: what a device without an IOMMU has.  Nothing can be mapped."""

    limits: Final = AddressLimits(limits.PAGE_SIZE, (), 0)
    maps_files: Final = False
    tracks_dirty: Final = False

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def map_memory(self, iova: int, size: int, access: DmaAccess, address: int) -> None:
        raise self._refused()

    def map_file(self, iova: int, size: int, access: DmaAccess, fd: int, offset: int) -> None:
        raise self._refused()

    def unmap(self, iova: int, size: int) -> None:
        raise self._refused()

    def unmap_all(self) -> None:
        """Nothing is mapped."""

    def set_dirty_tracking(self, on: bool) -> None:
        raise _no_tracking()

    def dirty_bitmap(self, iova: int, size: int, page_size: int, *, clear: bool) -> bytearray:
        raise _no_tracking()

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    @staticmethod
    def _refused() -> KernelRefusal:
        return KernelRefusal(
            errno.EOPNOTSUPP,
            "there is no IOMMU (noiommu), so no memory can be mapped for the device; "
            "turn the host's IOMMU on (intel_iommu=on on the kernel's command line)",
        )


def group_path(group: int, *, noiommu: bool = False, dev: Path = DEV) -> Path:
    """The node of a group, which is there if a driver of VFIO has a device of it."""
    return dev / "vfio" / (f"noiommu-{group}" if noiommu else str(group))


def open_by_group(
    address: str,
    group: int,
    vf_token: uuid.UUID | None = None,
    *,
    noiommu: bool = False,
    dev: Path = DEV,
) -> tuple[VfioDevice, IoAddressSpace]:
    """Open the function at `address`, which is in IOMMU group `group`, with a space of its own.

    Raises HostError; the kernel's refusals as KernelRefusal.
    """
    fds: list[int] = []
    try:
        path = group_path(group, noiommu=noiommu, dev=dev)
        container = _open(dev / "vfio/vfio", fds, address)
        group_fd = _open(path, fds, address)
        _check_group(group_fd, path)
        ioctl(
            group_fd,
            GroupIoctl.SET_CONTAINER,
            uapi.encode_container(container),
            what=f"{path}: putting it into a container",
        )
        kind = IommuType.NOIOMMU if noiommu else IommuType.TYPE1V2
        ioctl(
            container,
            ContainerIoctl.SET_IOMMU,
            kind,
            what=f"{path}: setting IOMMU type {kind.name}",
            remedies=_SET_IOMMU_REMEDIES,
        )
        space = NoIommuSpace(container) if noiommu else Type1Space(container)
        token = None if vf_token is None else str(vf_token)
        device_fd = ioctl(
            group_fd,
            GroupIoctl.GET_DEVICE_FD,
            uapi.encode_device_name(address, token),
            what=f"{address}: opening it in {path}",
            remedies=_DEVICE_REMEDIES,
        )
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    try:
        return VfioDevice(device_fd, address, [group_fd]), space
    except BaseException:
        space.close()
        raise


def _open(path: Path, fds: list[int], address: str) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise refusal(error, f"{address}: opening {path}", _OPEN_REMEDIES) from error
    fds.append(fd)
    return fd


def _check_group(fd: int, path: Path) -> None:
    answer = uapi.encode_group_status()
    ioctl(fd, GroupIoctl.GET_STATUS, answer, what=f"{path}: asking for its status")
    if not uapi.decode_group_status(answer) & GroupFlags.VIABLE:
        members = f"/sys/kernel/iommu_groups/{path.name}/devices"
        raise HostError(
            f"{path}: the group is not viable: another device of it is bound to a driver of the "
            f"host; bind every device in {members} to vfio-pci, or unbind it",
            exit_code=os.EX_UNAVAILABLE,
        )


def _iommu_info(fd: int) -> type1_uapi.IommuInfo:
    what = "asking what the IOMMU can map"
    answer = type1_uapi.encode_iommu_info()
    ioctl(fd, ContainerIoctl.IOMMU_GET_INFO, answer, what=what)
    if (needed := uapi.needed_size(answer)) > len(answer):
        answer = type1_uapi.encode_iommu_info(needed)
        ioctl(fd, ContainerIoctl.IOMMU_GET_INFO, answer, what=what)
    return type1_uapi.decode_iommu_info(answer)


def _no_tracking() -> KernelRefusal:
    return KernelRefusal(
        errno.EOPNOTSUPP, "a VFIO container cannot tell which pages a device has written"
    )

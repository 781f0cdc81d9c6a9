"""From the address of a VF or a PF to all that is needed to open it, or why that cannot be done.

`serve --vf 0000:03:00.2` names a function; which PF owns it, by which id the owner knows it, which
node below ``/dev/vfio`` opens it and who else is in its IOMMU group stands in sysfs.  All of it can
be named explicitly instead, where sysfs is not to be had (containers): then nothing here is used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import attrs

from vfio_user_virtio.backends.vfio import sysfs
from vfio_user_virtio.backends.vfio.binding import VFIO_PCI, is_vfio
from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    from pathlib import Path

    from vfio_user_virtio.backends.vfio.sysfs import PciAddress


@attrs.frozen
class FunctionPlace:
    """A function that VFIO can open.

    `group`: number of its IOMMU group (None: no IOMMU); `cdev`: name below ``/dev/vfio/devices``,
    None where the kernel has none; `rivals`: functions of the same group that have drivers of the
    kernel, so that the group is not viable.
    """

    address: PciAddress
    group: int | None
    cdev: str | None
    rivals: tuple[PciAddress, ...] = ()


@attrs.frozen
class VfPlace:
    """A VF, its `owner` and the `member_id` by which the owner's commands know it.

    `owner_is_ours`: the PF is on vfio-pci, so that we can own it, and opening the VF takes the
    PF's VF token; otherwise a driver of the kernel has it.
    """

    function: FunctionPlace
    owner: PciAddress
    member_id: int
    owner_is_ours: bool


def find_function(address: PciAddress, root: Path = sysfs.SYS) -> FunctionPlace:
    """Where VFIO has the function.  Raises HostError with what to do if it has not."""
    bound = sysfs.driver(address, root)
    if not is_vfio(bound):
        has = "has no driver" if bound is None else f"belongs to the driver {bound}"
        raise HostError(
            f"{address} {has}; give it to vfio-pci: vfio-user-virtio bind {address}",
            exit_code=os.EX_UNAVAILABLE,
        )
    group = sysfs.iommu_group(address, root)
    return FunctionPlace(
        address,
        group,
        sysfs.vfio_cdev(address, root),
        () if group is None else rivals(address, group, root),
    )


def find_vf(address: PciAddress, root: Path = sysfs.SYS) -> VfPlace:
    """Where VFIO has the VF, and whose it is.  Raises HostError, also for what is no VF."""
    owner = sysfs.physical_function(address, root)
    member_id = sysfs.group_member_id(address, root)
    if owner is None or member_id is None:
        raise HostError(
            f"{address} is not a VF; if it shall be served all the same, name its owner and its "
            "member id"
        )
    ours = sysfs.driver(owner, root) == VFIO_PCI
    return VfPlace(find_function(address, root), owner, member_id, ours)


def find_pf(address: PciAddress, root: Path = sysfs.SYS) -> FunctionPlace:
    """Where VFIO has the PF that we are to own.  Raises HostError, also for a VF."""
    owner = sysfs.physical_function(address, root)
    if owner is not None:
        raise HostError(f"{address} is a VF; its PF is {owner}")
    return find_function(address, root)


def rivals(address: PciAddress, group: int, root: Path = sysfs.SYS) -> tuple[PciAddress, ...]:
    """The other functions of an IOMMU group that drivers of the kernel hold.

    Bridges are not among them: their driver does no DMA for others to see, and VFIO tolerates it.
    """
    found = []
    for other in sysfs.group_members(group, root):
        if other == address:
            continue
        bound = sysfs.driver(other, root)
        if bound is not None and not is_vfio(bound) and bound not in _HARMLESS:
            found.append(other)
    return tuple(found)


_HARMLESS = frozenset(("pcieport", "pci-stub"))

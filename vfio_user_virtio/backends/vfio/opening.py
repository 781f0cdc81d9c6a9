"""Open a PCI function that is bound to vfio-pci, by whichever way the kernel offers.

Its own node and iommufd come first, groups second: the former maps memory files and can track what
is dirty.  One case makes the kernel's offer worthless: Linux 6.17 up to a stable fix of December
2025 refuses every VF token by that way (E2BIG), and before 6.17 it knows none at all (EINVAL); then
the group is taken, which has always known them.  Any other failure of the first way is told, not
papered over: it would fail by the second way too, or be something that the user should know.

Opening a function resets it.
"""

from __future__ import annotations

import enum
import errno
import logging
import os
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.backends.vfio import discovery, sysfs
from vfio_user_virtio.backends.vfio.group import group_path, open_by_group
from vfio_user_virtio.backends.vfio.iommufd import CDEVS, DEV, IOMMUFD, open_by_cdev
from vfio_user_virtio.backends.vfio.kernel import KernelRefusal
from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    import uuid
    from pathlib import Path

    from vfio_user_virtio.backends.vfio.address_space import IoAddressSpace
    from vfio_user_virtio.backends.vfio.sysfs import PciAddress
    from vfio_user_virtio.backends.vfio.vfio_device import VfioDevice

_log: Final = logging.getLogger(__name__)

_NOIOMMU: Final = "noiommu-"
_NO_TOKENS: Final = frozenset({errno.E2BIG, errno.EINVAL})


class Way(enum.Enum):
    """How a device is opened."""

    CDEV = "its own device node and iommufd"
    GROUP = "its group and a container"
    NOIOMMU = "its group, without an IOMMU"


@attrs.frozen
class OpenOptions:
    """`way`: only this one.  `vf_token`: of the PF, if that is owned by a user of VFIO too.

    `unsafe_noiommu`: take a device that no IOMMU keeps in check, and that can therefore read and
    write all of the host's memory.  No guest can be given one: nothing can be mapped for it.
    """

    way: Way | None = None
    vf_token: uuid.UUID | None = None
    unsafe_noiommu: bool = False


@attrs.frozen
class OpenedFunction:
    """A device, the address space that is its own, and how it was opened."""

    device: VfioDevice
    space: IoAddressSpace
    way: Way

    def close(self) -> None:
        """The device first, then what it reached."""
        self.device.close()
        self.space.close()


def open_function(
    address: PciAddress,
    options: OpenOptions | None = None,
    *,
    root: Path = sysfs.SYS,
    dev: Path = DEV,
) -> OpenedFunction:
    """Open the function at `address`.  Blocks while it is reset, for 0.1 s or more.

    Raises HostError, naming what is missing and what mends it; KernelRefusal among them.
    """
    options = options or OpenOptions()
    _check_driver(address, root)
    _check_group(address, root)
    ways = _offered(address, options, root, dev)
    while True:
        way = ways.pop(0)
        try:
            device, space = _open(address, way, options, root, dev)
        except KernelRefusal as error:
            if not (way is Way.CDEV and options.vf_token and error.errno in _NO_TOKENS and ways):
                raise
            _log.info("%s; trying %s", error, ways[0].value)
        else:
            _log.info("%s: opened by %s", address, way.value)
            return OpenedFunction(device, space, way)


def _check_driver(address: PciAddress, root: Path) -> None:
    driver = sysfs.driver(address, root)
    if driver is None or "vfio" not in driver:
        bound = "no driver" if driver is None else f"the driver {driver}"
        raise HostError(
            f"{address} is bound to {bound}, not to vfio-pci; "
            f"bind it: vfio-user-virtio bind {address}",
            exit_code=os.EX_UNAVAILABLE,
        )


def _check_group(address: PciAddress, root: Path) -> None:
    """What the kernel says of such a group is another thing by each way, and by none the reason."""
    group = sysfs.iommu_group(address, root)
    others = () if group is None else discovery.rivals(address, group, root)
    if others:
        names = " ".join(map(str, others))
        raise HostError(
            f"{address}: its IOMMU group {group} is not viable, because drivers of the kernel have "
            f"others of the group; give those to vfio-pci too: vfio-user-virtio bind {names}",
            exit_code=os.EX_UNAVAILABLE,
        )


def _offered(address: PciAddress, options: OpenOptions, root: Path, dev: Path) -> list[Way]:
    """The ways to try, best first.  Raises HostError where there is none, or none that is allowed.

    The kernel has nodes of both kinds for a function without an IOMMU, too, under names of their
    own; it must not be opened by either unless that is meant.
    """
    node = sysfs.vfio_cdev(address, root)
    group = sysfs.iommu_group(address, root)
    unsafe = group is not None and group_path(group, noiommu=True, dev=dev).exists()
    if unsafe or (node is not None and node.startswith(_NOIOMMU)):
        if not options.unsafe_noiommu or options.way not in (None, Way.NOIOMMU):
            raise HostError(
                f"{address} has no IOMMU in front of it: it could read and write all of the host's "
                "memory; turn the host's IOMMU on, or allow unsafe_noiommu for experiments",
                exit_code=os.EX_UNAVAILABLE,
            )
        return [Way.NOIOMMU]
    if options.way is not None:
        return [options.way]
    ways = []
    if node is not None and (dev / CDEVS / node).exists() and (dev / IOMMUFD).exists():
        ways.append(Way.CDEV)
    if group is not None and group_path(group, dev=dev).exists():
        ways.append(Way.GROUP)
    if ways:
        return ways
    raise HostError(
        f"{address} has neither a node in /dev/vfio/devices nor a group in /dev/vfio; "
        "turn the host's IOMMU on (intel_iommu=on), and load vfio-pci and vfio_iommu_type1",
        exit_code=os.EX_UNAVAILABLE,
    )


def _open(
    address: PciAddress, way: Way, options: OpenOptions, root: Path, dev: Path
) -> tuple[VfioDevice, IoAddressSpace]:
    if way is Way.CDEV:
        node = sysfs.vfio_cdev(address, root)
        if node is None:
            raise HostError(
                f"{address} has no device node of its own: the kernel lacks "
                "CONFIG_VFIO_DEVICE_CDEV (Linux 6.6)",
                exit_code=os.EX_UNAVAILABLE,
            )
        return open_by_cdev(str(address), node, options.vf_token, dev=dev)
    group = sysfs.iommu_group(address, root)
    if group is None:
        raise HostError(
            f"{address} is in no IOMMU group; turn the host's IOMMU on (intel_iommu=on)",
            exit_code=os.EX_UNAVAILABLE,
        )
    noiommu = way is Way.NOIOMMU
    return open_by_group(str(address), group, options.vf_token, noiommu=noiommu, dev=dev)


def open_pf(
    address: PciAddress,
    options: OpenOptions,
    *,
    root: Path = sysfs.SYS,
    dev: Path = DEV,
) -> OpenedFunction:
    """Open a PF, and have whoever opens its VFs know `options.vf_token` from now on.

    The token is set when it is open.  Given while opening it replaces that of a process which has
    the PF, though the opening is then refused (Linux, by device nodes).  Only where VFs are in use
    it has to be given, and is then compared.  Raises as `open_function`.
    """
    try:
        opened = open_function(address, attrs.evolve(options, vf_token=None), root=root, dev=dev)
    except KernelRefusal as error:
        if error.errno != errno.EACCES or options.vf_token is None:
            raise
        return open_function(address, options, root=root, dev=dev)
    if options.vf_token is not None:
        try:
            opened.device.set_vf_token(options.vf_token)
        except HostError:
            opened.close()
            raise
    return opened

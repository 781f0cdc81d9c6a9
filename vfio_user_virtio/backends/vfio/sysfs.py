"""What Linux's sysfs says of a PCI function: its IOMMU group, driver, PF, VFs and sizes.

Pure functions of an address and the folder where sysfs is mounted, so that a test gives them a tree
of its own.  Nothing is written here (`binding` does that) and nothing is cached: every file may
change between two calls.  A file that is not there is an answer (None); a function that is not
there is a `HostError`.

Sources: Linux, Documentation/ABI/testing/sysfs-bus-pci; VFIO, Documentation/driver-api/vfio.rst.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

import attrs

from vfio_user_virtio.errors import HostError

SYS: Final = Path("/sys")
_ADDRESS: Final = re.compile(
    r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])", re.IGNORECASE
)
_VIRTFN: Final = re.compile(r"virtfn([0-9]+)")
_NO_OVERRIDE: Final = "(null)"
_IORESOURCE_MEM: Final = 0x200
NUM_RESOURCES: Final = 6
"""BAR 0 to 5 in the file ``resource``; expansion ROM and VF BARs follow."""


@attrs.frozen(order=True)
class PciAddress:
    """Domain, bus, device and function; ``0000:03:00.2`` as text."""

    domain: int
    bus: int
    device: int
    function: int

    @classmethod
    def parse(cls, text: str) -> PciAddress:
        """``0000:03:00.2`` or, in domain 0, ``03:00.2``.  Raises ValueError."""
        match = _ADDRESS.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is no PCI address; write it as lspci -D does, such as 0000:03:00.2"
            )
        domain, bus, device, function = (int(field or "0", 16) for field in match.groups())
        return cls(domain, bus, device, function)

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.device:02x}.{self.function:x}"


@attrs.frozen
class Identifiers:
    """vendor, device: the IDs that the kernel has, also of a VF, whose own registers read ffff.
    class_code: 24 bits, base class highest."""

    vendor: int
    device: int
    class_code: int


@attrs.frozen
class Sriov:
    """SR-IOV of a PF: VFs that are there, VFs that there can be, whether drivers take new ones."""

    num_vfs: int
    total_vfs: int
    drivers_autoprobe: bool


@attrs.frozen
class Resource:
    """One BAR: `size` in bytes, 0 when absent."""

    size: int
    is_memory: bool


def device_path(address: PciAddress, root: Path = SYS) -> Path:
    """The folder of the function.  Raises HostError if there is no such function."""
    path = root / "bus/pci/devices" / str(address)
    if not path.is_dir():
        raise HostError(
            f"there is no PCI function {address}; see lspci -D", exit_code=os.EX_UNAVAILABLE
        )
    return path


def identifiers(address: PciAddress, root: Path = SYS) -> Identifiers:
    path = device_path(address, root)
    return Identifiers(*(_hex(path / name) for name in ("vendor", "device", "class")))


def iommu_group(address: PciAddress, root: Path = SYS) -> int | None:
    """The number of the IOMMU group; None without an IOMMU, or without a driver of one."""
    name = _link_name(device_path(address, root) / "iommu_group")
    return int(name) if name is not None and name.isdecimal() else None


def group_members(group: int, root: Path = SYS) -> tuple[PciAddress, ...]:
    """The PCI functions in an IOMMU group, which VFIO opens together or not at all."""
    names = _names(root / "kernel/iommu_groups" / str(group) / "devices")
    return tuple(sorted(PciAddress.parse(name) for name in names if _ADDRESS.fullmatch(name)))


def driver(address: PciAddress, root: Path = SYS) -> str | None:
    """The driver that is bound; None if there is none."""
    return _link_name(device_path(address, root) / "driver")


def driver_override(address: PciAddress, root: Path = SYS) -> str | None:
    """The only driver that may bind; None if any may."""
    text = _text(device_path(address, root) / "driver_override")
    return None if text in (None, "", _NO_OVERRIDE) else text


def vfio_cdev(address: PciAddress, root: Path = SYS) -> str | None:
    """The name below ``/dev/vfio/devices``; None unless a VFIO driver of Linux 6.6 or newer, built
    with cdev, is bound."""
    return next(iter(_names(device_path(address, root) / "vfio-dev")), None)


def physical_function(address: PciAddress, root: Path = SYS) -> PciAddress | None:
    """The PF of a VF; None for a function that is not a VF."""
    name = _link_name(device_path(address, root) / "physfn")
    return None if name is None else PciAddress.parse(name)


def virtual_functions(address: PciAddress, root: Path = SYS) -> dict[int, PciAddress]:
    """The VFs of a PF by VF index, from 0."""
    path = device_path(address, root)
    found = {}
    for name in _names(path):
        if match := _VIRTFN.fullmatch(name):
            target = _link_name(path / name)
            if target is not None:
                found[int(match[1])] = PciAddress.parse(target)
    return dict(sorted(found.items()))


def group_member_id(address: PciAddress, root: Path = SYS) -> int | None:
    """The id that administration commands know the VF by, VF index + 1; None if it is no VF.

    The index is that of the PF's link, never computed from the address: First VF Offset and VF
    Stride are the device's choice.
    """
    owner = physical_function(address, root)
    if owner is None:
        return None
    for index, virtual in virtual_functions(owner, root).items():
        if virtual == address:
            return index + 1
    return None


def sriov(address: PciAddress, root: Path = SYS) -> Sriov | None:
    """None for a function without the SR-IOV capability (or without extended config space)."""
    path = device_path(address, root)
    total = _text(path / "sriov_totalvfs")
    if total is None:
        return None
    autoprobe = _text(path / "sriov_drivers_autoprobe")
    return Sriov(int(_text(path / "sriov_numvfs") or "0"), int(total), autoprobe != "0")


def resources(address: PciAddress, root: Path = SYS) -> tuple[Resource, ...]:
    """BAR 0 to 5 as the kernel has placed them."""
    lines = (_text(device_path(address, root) / "resource") or "").splitlines()
    found = []
    for line in lines[:NUM_RESOURCES]:
        start, end, flags = (int(field, 16) for field in line.split())
        found.append(Resource(end - start + 1 if flags else 0, bool(flags & _IORESOURCE_MEM)))
    return tuple(found)


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HostError(f"cannot read {path}: {error.strerror}") from None


def _hex(path: Path) -> int:
    return int(_text(path) or "0", 16)


def _link_name(path: Path) -> str | None:
    """The last part of where a link leads."""
    try:
        return Path(os.readlink(path)).name
    except FileNotFoundError:
        return None


def _names(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []

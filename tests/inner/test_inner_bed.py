"""The inner host is what the tests of VFIO need, by the kernel's own words; no code of ours runs.

The ioctl numbers are <linux/vfio.h>'s and <linux/iommufd.h>'s.
"""

from __future__ import annotations

import os
import struct
from contextlib import ExitStack
from fcntl import ioctl
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from tests.inner.conftest import InnerFacts

DEVICES: Final = Path("/sys/bus/pci/devices")
VFIO_API_VERSION: Final = 0
VFIO_GET_API_VERSION: Final = 0x3B64
VFIO_SET_IOMMU: Final = 0x3B66
VFIO_GROUP_GET_STATUS: Final = 0x3B67
VFIO_GROUP_SET_CONTAINER: Final = 0x3B68
VFIO_GROUP_GET_DEVICE_FD: Final = 0x3B6A
VFIO_DEVICE_GET_REGION_INFO: Final = 0x3B6C
VFIO_DEVICE_BIND_IOMMUFD: Final = 0x3B76
VFIO_DEVICE_ATTACH_IOMMUFD_PT: Final = 0x3B77
IOMMU_IOAS_ALLOC: Final = 0x3B81
VFIO_GROUP_FLAGS_VIABLE: Final = 1
IOMMU_TYPES: Final = {"group": 3, "noiommu": 8}
"""VFIO_TYPE1v2_IOMMU and VFIO_NOIOMMU_IOMMU."""
VFIO_PCI_CONFIG_REGION_INDEX: Final = 7
VIRTIO_NET: Final = bytes.fromhex("f41a 4110")


def open_group(address: str, way: str, stack: ExitStack) -> int:
    """The device's descriptor, by its group and a container."""
    number = (DEVICES / address / "iommu_group").resolve().name
    prefix = "noiommu-" if way == "noiommu" else ""
    container = os.open("/dev/vfio/vfio", os.O_RDWR)
    stack.callback(os.close, container)
    assert ioctl(container, VFIO_GET_API_VERSION) == VFIO_API_VERSION
    group = os.open(f"/dev/vfio/{prefix}{number}", os.O_RDWR)
    stack.callback(os.close, group)
    status = bytearray(struct.pack("<II", 8, 0))
    ioctl(group, VFIO_GROUP_GET_STATUS, status)
    assert struct.unpack("<II", status)[1] & VFIO_GROUP_FLAGS_VIABLE
    ioctl(group, VFIO_GROUP_SET_CONTAINER, struct.pack("<i", container))
    ioctl(container, VFIO_SET_IOMMU, IOMMU_TYPES[way])
    device: int = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, bytearray(address.encode() + b"\0"))
    stack.callback(os.close, device)
    return device


def open_cdev(address: str, stack: ExitStack) -> int:
    """The device's descriptor, bound to an iommufd and attached to an address space."""
    (name,) = (DEVICES / address / "vfio-dev").iterdir()
    device = os.open(f"/dev/vfio/devices/{name.name}", os.O_RDWR)
    stack.callback(os.close, device)
    iommufd = os.open("/dev/iommu", os.O_RDWR)
    stack.callback(os.close, iommufd)
    ioctl(device, VFIO_DEVICE_BIND_IOMMUFD, bytearray(struct.pack("<IIiI", 16, 0, iommufd, 0)))
    space = bytearray(struct.pack("<III", 12, 0, 0))
    ioctl(iommufd, IOMMU_IOAS_ALLOC, space)
    attach = bytearray(struct.pack("<III", 12, 0, struct.unpack("<III", space)[2]))
    ioctl(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, attach)
    return device


def read_identity(device: int) -> bytes:
    """Vendor and device id, from the device's configuration space."""
    info = bytearray(struct.pack("<IIIIQQ", 32, 0, VFIO_PCI_CONFIG_REGION_INDEX, 0, 0, 0))
    ioctl(device, VFIO_DEVICE_GET_REGION_INFO, info)
    *_, size, offset = struct.unpack("<IIIIQQ", info)
    assert size == 4096
    return os.pread(device, 4, offset)


def test_functions_are_bound_to_vfio(inner: InnerFacts) -> None:
    assert inner.vfs or inner.functions
    for address in (*inner.vfs, *inner.functions):
        assert (DEVICES / address / "driver").resolve().name == "vfio-pci"


def test_vfs_belong_to_their_pf(inner: InnerFacts) -> None:
    assert inner.pf is not None
    for number, address in enumerate(inner.vfs):
        pf = DEVICES / inner.pf
        assert (DEVICES / address / "physfn").resolve() == pf.resolve()
        assert (pf / f"virtfn{number}").resolve().name == address


def test_each_vf_has_a_group_of_its_own(inner: InnerFacts) -> None:
    groups = {(DEVICES / address / "iommu_group").resolve().name for address in inner.vfs}
    assert len(groups) == len(inner.vfs)


def test_functions_open(inner: InnerFacts, way: str) -> None:
    for address in (*inner.vfs, *inner.functions):
        with ExitStack() as stack:
            opened = open_cdev(address, stack) if way == "cdev" else open_group(address, way, stack)
            assert read_identity(opened) == VIRTIO_NET


def test_only_the_own_kernel_has_character_devices(inner: InnerFacts) -> None:
    assert (
        Path("/dev/iommu").exists() == Path("/dev/vfio/devices").exists() == (inner.kernel == "own")
    )


def test_temporary_files_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")


async def test_trio_runs() -> None:
    with trio.fail_after(10):
        await trio.to_thread.run_sync(os.getpid)

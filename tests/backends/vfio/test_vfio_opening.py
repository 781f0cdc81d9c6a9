"""Which way a function is opened, and what is told when it cannot be."""

from __future__ import annotations

import errno
import os
import uuid
from typing import TYPE_CHECKING

import pytest

from tests.backends.vfio.model_kernel import ADDRESS, GROUP
from vfio_user_virtio.backends.vfio.iommufd_uapi import IommufdIoctl
from vfio_user_virtio.backends.vfio.kernel import KernelRefusal
from vfio_user_virtio.backends.vfio.opening import OpenOptions, Way, open_pf
from vfio_user_virtio.backends.vfio.type1_uapi import ContainerIoctl
from vfio_user_virtio.backends.vfio.uapi import DeviceIoctl
from vfio_user_virtio.device import DmaAccess
from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    from tests.backends.vfio.model_kernel import ModelKernel

TOKEN = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_the_devices_own_node_comes_first(model: ModelKernel) -> None:
    before = open_fds()
    opened = model.open()
    assert opened.way is Way.CDEV
    assert opened.space.maps_files
    assert not opened.space.tracks_dirty
    assert opened.space.limits.ranges == tuple(model.ranges)
    assert [index for index, region in enumerate(opened.device.regions) if region.size] == [1, 4, 7]
    assert [irq.count for irq in opened.device.irqs] == [1, 0, 4, 0, 1]
    opened.close()
    opened.close()
    assert open_fds() == before


@pytest.mark.parametrize("missing", ["iommu", "vfio/devices/vfio0"])
def test_the_group_is_second(model: ModelKernel, missing: str) -> None:
    (model.dev / missing).rename(model.dev / "elsewhere")
    if missing != "iommu":
        (model.sys / "bus/pci/devices" / str(ADDRESS) / "vfio-dev/vfio0").rmdir()
        model.node.symlink_to(model.dev / "elsewhere")
    before = open_fds()
    opened = model.open()
    assert opened.way is Way.GROUP
    assert not opened.space.maps_files
    assert opened.space.limits.ranges == tuple(model.ranges)
    opened.close()
    assert open_fds() == before


def test_a_way_can_be_named(model: ModelKernel) -> None:
    opened = model.open(OpenOptions(way=Way.GROUP))
    assert opened.way is Way.GROUP
    opened.close()


@pytest.mark.parametrize("way", [Way.CDEV, Way.GROUP])
def test_token_of_the_pf(model: ModelKernel, way: Way) -> None:
    model.token = str(TOKEN)
    opened = model.open(OpenOptions(way=way, vf_token=TOKEN))
    assert opened.way is way
    opened.close()
    for wrong in (None, uuid.UUID(int=1)):
        before = open_fds()
        with pytest.raises(KernelRefusal, match="token is missing or wrong") as caught:
            model.open(OpenOptions(way=way, vf_token=wrong))
        assert caught.value.errno == errno.EACCES
        assert open_fds() == before


@pytest.mark.parametrize("in_use", [False, True], ids=["free", "VFs in use"])
@pytest.mark.parametrize("way", [Way.CDEV, Way.GROUP])
def test_the_token_of_a_pf_that_is_opened(model: ModelKernel, way: Way, *, in_use: bool) -> None:
    """Set when it is open; given before only where the kernel insists, which then compares."""
    options = OpenOptions(way=way, vf_token=TOKEN)
    model.token = str(TOKEN) if in_use else None
    open_pf(ADDRESS, options, root=model.sys, dev=model.dev).close()
    assert model.own_token == (None if in_use else TOKEN.hex)
    if in_use:
        with pytest.raises(KernelRefusal, match="token is missing or wrong"):
            open_pf(ADDRESS, OpenOptions(way=way), root=model.sys, dev=model.dev)
    else:
        before = open_fds()
        model.refuse[DeviceIoctl.FEATURE] = errno.ENOTTY
        with pytest.raises(KernelRefusal, match="setting the VF token"):
            open_pf(ADDRESS, options, root=model.sys, dev=model.dev)
        assert open_fds() == before


def test_a_group_with_a_driver_of_the_kernel(model: ModelKernel) -> None:
    other = "0000:00:1f.7"
    (model.sys / f"kernel/iommu_groups/{GROUP}/devices" / other).mkdir(parents=True)
    device = model.sys / "bus/pci/devices" / other
    device.mkdir()
    (device / "driver").symlink_to("../drivers/e1000e")
    for way in (Way.CDEV, Way.GROUP):
        with pytest.raises(HostError, match=f"is not viable.*vfio-user-virtio bind {other}"):
            model.open(OpenOptions(way=way))
    assert model.calls == []


@pytest.mark.parametrize("number", [errno.E2BIG, errno.EINVAL])
def test_a_kernel_that_knows_no_tokens_by_node(model: ModelKernel, number: int) -> None:
    """6.17 before its fix, and those before: the group has always known them."""
    model.token = str(TOKEN)
    model.refuse[DeviceIoctl.BIND_IOMMUFD] = number
    opened = model.open(OpenOptions(vf_token=TOKEN))
    assert opened.way is Way.GROUP
    opened.close()


def test_other_failures_by_node_are_told(model: ModelKernel) -> None:
    model.refuse[DeviceIoctl.BIND_IOMMUFD] = errno.EPERM
    before = open_fds()
    with pytest.raises(KernelRefusal, match="allow_unsafe_interrupts"):
        model.open()
    assert open_fds() == before


def test_no_interrupt_remapping_by_group(model: ModelKernel) -> None:
    model.refuse[ContainerIoctl.SET_IOMMU] = errno.EPERM
    before = open_fds()
    with pytest.raises(KernelRefusal, match="vfio_iommu_type1/parameters/allow_unsafe_interrupts"):
        model.open(OpenOptions(way=Way.GROUP))
    assert open_fds() == before


def test_group_that_is_not_viable(model: ModelKernel) -> None:
    model.viable = False
    before = open_fds()
    with pytest.raises(HostError, match=r"not viable.*iommu_groups/7/devices"):
        model.open(OpenOptions(way=Way.GROUP))
    assert open_fds() == before


def test_bound_to_another_driver(model: ModelKernel) -> None:
    link = model.sys / "bus/pci/devices" / str(ADDRESS) / "driver"
    link.unlink()
    with pytest.raises(HostError, match=r"bound to no driver.*vfio-user-virtio bind 0000:01:00.1"):
        model.open()
    link.symlink_to("virtio-pci")
    with pytest.raises(HostError, match="bound to the driver virtio-pci"):
        model.open()


def test_no_iommu(model: ModelKernel) -> None:
    (model.dev / "iommu").unlink()
    (model.dev / f"vfio/{GROUP}").rename(model.dev / "gone")
    with pytest.raises(HostError, match=r"neither a node .* nor a group"):
        model.open()
    (model.dev / "gone").rename(model.dev / f"vfio/noiommu-{GROUP}")
    for way in (None, Way.NOIOMMU, Way.GROUP):
        with pytest.raises(HostError, match=r"all of the host's memory.*unsafe_noiommu"):
            model.open(OpenOptions(way=way))
    opened = model.open(OpenOptions(unsafe_noiommu=True))
    assert opened.way is Way.NOIOMMU
    with pytest.raises(KernelRefusal, match="no memory can be mapped"):
        opened.space.map_memory(0, 0x1000, DmaAccess.READ, 0)
    opened.space.unmap_all()
    opened.close()


def test_no_iommu_in_a_kernel_that_has_nodes_for_that(model: ModelKernel) -> None:
    """Linux 7.3: the node works, and maps what it is told to addresses that mean the host's."""
    nodes = model.sys / "bus/pci/devices" / str(ADDRESS) / "vfio-dev"
    (nodes / "vfio0").rename(nodes / "noiommu-vfio0")
    (model.dev / "vfio/devices/noiommu-vfio0").symlink_to(model.node)
    for options in (
        OpenOptions(),
        OpenOptions(way=Way.CDEV),
        OpenOptions(way=Way.CDEV, unsafe_noiommu=True),
    ):
        with pytest.raises(HostError, match="all of the host's memory"):
            model.open(options)


def test_a_kernel_without_nodes(model: ModelKernel) -> None:
    (model.sys / "bus/pci/devices" / str(ADDRESS) / "vfio-dev/vfio0").rmdir()
    with pytest.raises(HostError, match="CONFIG_VFIO_DEVICE_CDEV"):
        model.open(OpenOptions(way=Way.CDEV))


def test_node_that_may_not_be_opened(model: ModelKernel) -> None:
    (model.dev / f"vfio/{GROUP}").unlink()
    with pytest.raises(KernelRefusal, match=f"vfio/{GROUP}: No such file or directory"):
        model.open(OpenOptions(way=Way.GROUP))


def test_dirty_tracking_where_the_iommu_can(model: ModelKernel) -> None:
    model.tracks_dirty = True
    opened = model.open()
    assert opened.space.tracks_dirty
    opened.close()


def test_an_iommu_driver_that_says_nothing_of_itself(model: ModelKernel) -> None:
    model.tracks_dirty = True
    model.refuse[IommufdIoctl.HWPT_ALLOC] = errno.EOPNOTSUPP
    model._attach_iommufd_pt = lambda data: None  # type: ignore[method-assign]
    opened = model.open()
    assert not opened.space.tracks_dirty
    with pytest.raises(KernelRefusal, match="cannot tell"):
        opened.space.set_dirty_tracking(True)
    opened.close()


def test_more_ranges_than_expected(model: ModelKernel) -> None:
    model.ranges = [(n << 20, (n << 20) + 0xFFFF) for n in range(40)]
    for way in (Way.CDEV, Way.GROUP):
        opened = model.open(OpenOptions(way=way))
        assert opened.space.limits.ranges == tuple(model.ranges)
        opened.close()


def test_a_device_that_tells_nothing_is_closed(model: ModelKernel) -> None:
    model.refuse[DeviceIoctl.GET_INFO] = errno.ENODEV
    for way in (Way.CDEV, Way.GROUP):
        before = open_fds()
        with pytest.raises(KernelRefusal, match="has gone"):
            model.open(OpenOptions(way=way))
        assert open_fds() == before

"""How the owner reaches a PF that the kernel holds, and how one is opened for it, with its VFs."""

from __future__ import annotations

import errno
import gc
import os
from typing import TYPE_CHECKING

import pytest

from tests.backends.owner_function_rig import Pf, driven
from tests.backends.pci_tree import PF, PciTree
from tests.backends.vfio.model_kernel import ADDRESS
from vfio_user_virtio.backends.vfio import sysfs
from vfio_user_virtio.backends.vfio.kernel import KernelRefusal
from vfio_user_virtio.backends.vfio.opening import OpenOptions, Way
from vfio_user_virtio.backends.vfio.owner import OWNER_IOVA, owned
from vfio_user_virtio.backends.vfio.owner_access import KernelAccess
from vfio_user_virtio.backends.vfio.owner_opening import having_vfs, owned_function
from vfio_user_virtio.device import (
    DmaAccess,
    DmaMapping,
    IrqAction,
    IrqRequest,
    VfioIrq,
    VfioRegion,
)
from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.backends.vfio.model_kernel import ModelKernel

SIZE = 0x4000
BOTH = DmaAccess.READ | DmaAccess.WRITE


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("memory")
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("way", [Way.CDEV, Way.GROUP])
async def test_a_driver_reaches_all_it_needs(model: ModelKernel, memory: int, way: Way) -> None:
    opened = model.open(OpenOptions(way=way))
    access = KernelAccess(opened)
    config = await access.region_read(VfioRegion.CONFIG, 0, 256)
    assert config[:4] == bytes.fromhex("f41a4110")
    await access.region_write(VfioRegion.BAR4, 0x14, b"\x0f")
    assert model.registers(4, 0x14, 1) == b"\x0f"
    assert (await access.irq_info(VfioIrq.MSIX)).count == 4
    assert (await access.irq_info(99)).count == 0
    eventfd = os.eventfd(0)
    await access.set_irqs(IrqRequest(VfioIrq.MSIX, 0, 1, IrqAction.TRIGGER, eventfds=(eventfd,)))
    model.fire(VfioIrq.MSIX)
    assert os.eventfd_read(eventfd) == 1
    os.close(eventfd)
    await access.set_irqs(IrqRequest(VfioIrq.MSIX, 0, 0, IrqAction.TRIGGER))
    with pytest.raises(HostError, match="no driver's business"):
        await access.set_irqs(IrqRequest(VfioIrq.INTX, 0, 1, IrqAction.MASK))
    await access.dma_map(DmaMapping(OWNER_IOVA, SIZE, BOTH, memory))
    model.dma_write(OWNER_IOVA + 8, b"here")
    assert os.pread(memory, 4, 8) == b"here"
    await access.dma_unmap(OWNER_IOVA, SIZE)
    assert model.mappings == {}
    await access.reset()
    assert model.resets == 1
    model.resettable = False
    opened.close()
    access.close()
    gc.collect()


async def test_memory_that_the_iommu_cannot_map(model: ModelKernel, memory: int) -> None:
    opened = model.open()
    access = KernelAccess(opened)
    with pytest.raises(HostError, match="the IOMMU cannot map 0x4000 bytes at 0xfee00000"):
        await access.dma_map(DmaMapping(0xFEE0_0000, SIZE, BOTH, memory))
    model.memlock = SIZE - 1
    with pytest.raises(KernelRefusal) as caught:
        await access.dma_map(DmaMapping(OWNER_IOVA, SIZE, BOTH, memory))
    assert caught.value.errno == errno.ENOMEM
    opened.close()
    access.close()


async def test_what_is_no_pf_is_left_as_it_was(model: ModelKernel) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    opened = model.open()
    access = KernelAccess(opened)
    with pytest.raises(HostError, match=r"0000:01:00\.1: it has no COMMON structure"):
        async with owned(access, str(ADDRESS)):
            pass
    opened.close()
    access.close()
    assert model.mappings == {}
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_memory_that_cannot_be_locked(model: ModelKernel, memory: int) -> None:
    """The remedy is told, and undoing what was not done is no error."""
    model.memlock = SIZE - 1
    opened = model.open()
    access = KernelAccess(opened)
    with pytest.raises(KernelRefusal, match=r"RLIMIT_MEMLOCK .*LimitMEMLOCK=infinity"):
        await access.dma_map(DmaMapping(OWNER_IOVA, SIZE, BOTH, memory))
    await access.dma_unmap(OWNER_IOVA, SIZE)
    opened.close()
    access.close()


# --- opening ------------------------------------------------------------------------------------


async def test_a_group_with_a_driver_of_the_kernel_is_told(tmp_path: Path) -> None:
    tree = PciTree(tmp_path)
    (tree.path(PF) / "driver").unlink()
    tree._bind(PF, "vfio-pci")
    other = sysfs.PciAddress.parse("0000:03:00.1")
    tree.add(other, group=10, driver="virtio-pci")
    with pytest.raises(HostError, match=f"{PF}: its IOMMU group 10 is not viable.* bind {other}"):
        async with owned_function(PF, root=tmp_path):
            pass


async def test_vfs_come_with_the_owner_and_go_with_it(tmp_path: Path) -> None:
    tree = PciTree(tmp_path)
    async with driven(Pf(sr_iov=True)) as made:
        async with having_vfs(PF, 2, made.owner, tmp_path):
            assert sysfs.sriov(PF, tmp_path) == sysfs.Sriov(2, 3, False)
        assert sysfs.sriov(PF, tmp_path) == sysfs.Sriov(0, 3, True)
        async with having_vfs(PF, None, made.owner, tmp_path):
            assert sysfs.sriov(PF, tmp_path) == sysfs.Sriov(0, 3, True)
    assert tree.written == []


async def test_a_pf_that_does_not_offer_sr_iov_gets_no_vfs(tmp_path: Path) -> None:
    PciTree(tmp_path)
    async with driven(Pf()) as made:
        with pytest.raises(HostError, match="does not offer SR_IOV"):
            async with having_vfs(PF, 2, made.owner, tmp_path):
                pass
        async with having_vfs(PF, 0, made.owner, tmp_path):
            pass

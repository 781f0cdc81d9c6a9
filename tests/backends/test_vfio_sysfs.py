"""What is read from sysfs, and what discovery makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.backends.pci_tree import BRIDGE, PF, VFS, PciTree
from vfio_user_virtio.backends.vfio import discovery, sysfs
from vfio_user_virtio.backends.vfio.sysfs import Identifiers, PciAddress, Resource, Sriov
from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("text", ["0000:03:10.5", "03:10.5", "0000:03:10.5".upper()])
def test_an_address_is_read_as_lspci_writes_it(text: str) -> None:
    assert PciAddress.parse(text) == VFS[2]
    assert str(PciAddress.parse(text)) == "0000:03:10.5"


@pytest.mark.parametrize(
    "text", ["", "03:10", "0000:03:10.8", "0000:03:20.0", "3:10.0", "0000:03:10.0 ", "../03:10.0"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="lspci -D"):
        PciAddress.parse(text)


def test_a_large_domain_keeps_its_digits() -> None:
    assert str(PciAddress.parse("10000:01:00.0")) == "10000:01:00.0"


def test_a_function_says_who_it_is(tmp_path: Path) -> None:
    PciTree(tmp_path)
    assert sysfs.identifiers(PF, tmp_path) == Identifiers(0x1AF4, 0x1041, 0x020000)
    assert sysfs.iommu_group(PF, tmp_path) == 10
    assert sysfs.group_members(10, tmp_path) == (PF,)
    assert sysfs.group_members(99, tmp_path) == ()
    assert sysfs.driver(PF, tmp_path) == "virtio-pci"
    assert sysfs.driver_override(PF, tmp_path) is None
    assert sysfs.vfio_cdev(PF, tmp_path) is None
    assert sysfs.sriov(PF, tmp_path) == Sriov(0, 3, True)


def test_a_vf_has_no_sriov_and_no_driver_of_its_own(tmp_path: Path) -> None:
    PciTree(tmp_path, vfs=1)
    assert sysfs.sriov(VFS[0], tmp_path) is None
    assert sysfs.driver(VFS[0], tmp_path) is None
    assert sysfs.virtual_functions(VFS[0], tmp_path) == {}


def test_bars_have_the_size_that_the_kernel_gave_them(tmp_path: Path) -> None:
    PciTree(tmp_path)
    bars = sysfs.resources(PF, tmp_path)
    assert [bar.size for bar in bars] == [0, 0x1000, 0, 0, 0x4000, 0]
    assert bars[1] == Resource(0x1000, is_memory=True)
    assert not bars[0].is_memory


def test_without_an_iommu_there_is_no_group(tmp_path: Path) -> None:
    PciTree(tmp_path).add(BRIDGE, group=None)
    assert sysfs.iommu_group(BRIDGE, tmp_path) is None


def test_an_override_is_told(tmp_path: Path) -> None:
    PciTree(tmp_path).file(PF, "driver_override", "vfio-pci")
    assert sysfs.driver_override(PF, tmp_path) == "vfio-pci"


def test_member_ids_follow_the_links_of_the_pf(tmp_path: Path) -> None:
    PciTree(tmp_path, vfs=3)
    assert sysfs.virtual_functions(PF, tmp_path) == dict(enumerate(VFS))
    assert [sysfs.group_member_id(vf, tmp_path) for vf in VFS] == [1, 2, 3]
    assert sysfs.group_member_id(PF, tmp_path) is None


def test_a_vf_that_its_pf_does_not_know_has_no_member_id(tmp_path: Path) -> None:
    tree = PciTree(tmp_path, vfs=1)
    (tree.path(PF) / "virtfn0").unlink()
    assert sysfs.group_member_id(VFS[0], tmp_path) is None


def test_a_function_that_is_not_there_is_named(tmp_path: Path) -> None:
    PciTree(tmp_path)
    with pytest.raises(HostError, match=r"no PCI function 0000:00:1c\.0"):
        sysfs.driver(BRIDGE, tmp_path)


# --- discovery ----------------------------------------------------------------------------------


def test_a_vf_is_found_with_its_owner_and_its_number(tmp_path: Path) -> None:
    tree = PciTree(tmp_path, vfs=3)
    tree._bind(VFS[1], "vfio-pci")
    place = discovery.find_vf(VFS[1], tmp_path)
    assert (place.owner, place.member_id, place.owner_is_ours) == (PF, 2, False)
    assert (place.function.group, place.function.cdev) == (12, "vfio7")
    assert place.function.rivals == ()


def test_a_pf_on_vfio_pci_is_ours(tmp_path: Path) -> None:
    tree = PciTree(tmp_path, vfs=1)
    tree._bind(VFS[0], "vfio-pci")
    (tree.path(PF) / "driver").unlink()
    tree._bind(PF, "vfio-pci")
    assert discovery.find_vf(VFS[0], tmp_path).owner_is_ours
    assert discovery.find_pf(PF, tmp_path).group == 10


def test_a_vf_that_is_not_on_vfio_is_refused_with_the_remedy(tmp_path: Path) -> None:
    PciTree(tmp_path, vfs=1)
    with pytest.raises(HostError, match=r"no driver.*vfio-user-virtio bind 0000:03:10\.1"):
        discovery.find_vf(VFS[0], tmp_path)


def test_a_pf_of_the_kernel_is_refused_with_its_driver(tmp_path: Path) -> None:
    PciTree(tmp_path)
    with pytest.raises(HostError, match="belongs to the driver virtio-pci"):
        discovery.find_pf(PF, tmp_path)


def test_pf_and_vf_are_not_taken_for_each_other(tmp_path: Path) -> None:
    PciTree(tmp_path, vfs=1)
    with pytest.raises(HostError, match="is not a VF"):
        discovery.find_vf(PF, tmp_path)
    with pytest.raises(HostError, match=f"is a VF; its PF is {PF}"):
        discovery.find_pf(VFS[0], tmp_path)


def test_rivals_are_those_whom_the_kernel_drives(tmp_path: Path) -> None:
    tree = PciTree(tmp_path)
    others = [PciAddress.parse(f"0000:03:00.{n}") for n in (1, 2, 3)]
    for other, driver in zip(others, ("virtio-pci", "vfio-pci", None), strict=True):
        tree.add(other, group=10, driver=driver)
    (tmp_path / "bus/pci/drivers/pcieport").mkdir()
    tree.add(BRIDGE, group=10, driver="pcieport")
    assert discovery.rivals(PF, 10, tmp_path) == (others[0],)

"""Plans of writes to sysfs: what is written, in which order, and that undo puts everything back."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from tests.backends.pci_tree import PF, VFS, PciTree
from vfio_user_virtio.backends.vfio import binding, sysfs
from vfio_user_virtio.backends.vfio.binding import Write
from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    from pathlib import Path


def snapshot(tree: PciTree) -> dict[str, str]:
    """All files and links but those that a folder of the driver brings."""
    found = {}
    for path in sorted(tree.root.rglob("*")):
        name = str(path.relative_to(tree.root))
        if "vfio-dev" in name:
            continue
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_file():
            found[name] = path.read_text()
    return found


def test_a_vf_goes_to_vfio_pci_and_back(tmp_path: Path) -> None:
    tree = PciTree(tmp_path, vfs=1)
    tree._bind(VFS[0], "virtio-pci")
    before = snapshot(tree)
    plan = binding.bind(VFS[0], tmp_path)
    binding.execute(plan, tmp_path, tree.write)
    assert tree.written == [
        "devices/0000:03:10.1/driver_override vfio-pci",
        "devices/0000:03:10.1/driver/unbind 0000:03:10.1",
        "drivers_probe 0000:03:10.1",
    ]
    assert sysfs.driver(VFS[0], tmp_path) == "vfio-pci"
    binding.undo(plan, tree.write)
    assert snapshot(tree) == before


def test_a_function_without_a_driver_is_left_without_one(tmp_path: Path) -> None:
    tree = PciTree(tmp_path, vfs=1)
    before = snapshot(tree)
    plan = binding.bind(VFS[0], tmp_path)
    binding.execute(plan, tmp_path, tree.write)
    binding.undo(plan, tree.write)
    assert "devices/0000:03:10.1/driver/unbind 0000:03:10.1" in tree.written
    assert snapshot(tree) == before


def test_a_pf_may_enable_vfs_afterwards(tmp_path: Path) -> None:
    tree = PciTree(tmp_path)
    before = snapshot(tree)
    plan = binding.bind(PF, tmp_path)
    binding.execute(plan, tmp_path, tree.write)
    assert tree.written[0] == "module/vfio_pci/parameters/enable_sriov Y"
    assert tree.enable_sriov.read_text() == "Y\n"
    binding.undo(plan, tree.write)
    assert snapshot(tree) == before


def test_a_pf_keeps_its_vfs_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    tree = PciTree(tmp_path, vfs=2)
    with pytest.raises(HostError, match=r"has 2 VFs.*--disable-vfs"):
        binding.bind(PF, tmp_path)
    before = snapshot(tree)
    plan = binding.bind(PF, tmp_path, disable_vfs=True)
    binding.execute(plan, tmp_path, tree.write)
    assert sysfs.virtual_functions(PF, tmp_path) == {}
    binding.undo(plan, tree.write)
    assert len(sysfs.virtual_functions(PF, tmp_path)) == 2
    assert sysfs.driver(PF, tmp_path) == "virtio-pci"
    assert snapshot(tree).keys() == before.keys()


def test_what_is_bound_already_needs_nothing(tmp_path: Path) -> None:
    tree = PciTree(tmp_path, vfs=1)
    binding.execute(binding.bind(VFS[0], tmp_path), tmp_path, tree.write)
    assert binding.bind(VFS[0], tmp_path).writes == ()


def test_a_driver_that_is_not_loaded_is_named(tmp_path: Path) -> None:
    PciTree(tmp_path, vfs=1)
    with pytest.raises(HostError, match="modprobe virtio_vfio_pci"):
        binding.bind(VFS[0], tmp_path, driver="virtio_vfio_pci")


@pytest.mark.parametrize("refused", ["driver_override", "driver/unbind", "drivers_probe"])
def test_a_write_that_is_refused_undoes_the_others(tmp_path: Path, refused: str) -> None:
    tree = PciTree(tmp_path, vfs=1)
    tree._bind(VFS[0], "virtio-pci")
    before = snapshot(tree)
    plan = binding.bind(VFS[0], tmp_path)
    refusals = itertools.count()

    def write(each: Write) -> None:
        if str(each.path).endswith(refused) and next(refusals) == 0:
            raise HostError("refused")
        tree.write(each)

    with pytest.raises(HostError, match="refused"):
        binding.execute(plan, tmp_path, write)
    assert snapshot(tree) == before


def test_a_kernel_that_binds_another_driver_is_found_out(tmp_path: Path) -> None:
    tree = PciTree(tmp_path, vfs=1)
    plan = binding.bind(VFS[0], tmp_path)

    def write(each: Write) -> None:
        if not str(each.path).endswith("driver_override"):
            tree.write(each)

    with pytest.raises(HostError, match="has driver virtio-pci instead of vfio-pci"):
        binding.execute(plan, tmp_path, write)
    assert sysfs.driver(VFS[0], tmp_path) is None


def test_unbind_lets_the_kernel_choose(tmp_path: Path) -> None:
    tree = PciTree(tmp_path)
    binding.execute(binding.bind(PF, tmp_path), tmp_path, tree.write)
    plan = binding.unbind(PF, tmp_path)
    binding.execute(plan, tmp_path, tree.write)
    assert sysfs.driver(PF, tmp_path) == "virtio-pci"
    assert sysfs.driver_override(PF, tmp_path) is None
    binding.undo(plan, tree.write)
    assert sysfs.driver(PF, tmp_path) == "vfio-pci"


def test_unbind_can_leave_a_function_without_a_driver(tmp_path: Path) -> None:
    tree = PciTree(tmp_path, vfs=1)
    binding.execute(binding.bind(VFS[0], tmp_path), tmp_path, tree.write)
    binding.execute(binding.unbind(VFS[0], tmp_path, probe=False), tmp_path, tree.write)
    assert sysfs.driver(VFS[0], tmp_path) is None


def test_unbind_leaves_drivers_of_the_kernel_alone(tmp_path: Path) -> None:
    PciTree(tmp_path)
    plan = binding.unbind(PF, tmp_path)
    assert (plan.writes, plan.undo) == ((), ())


def test_an_override_that_bound_nothing_is_taken_back(tmp_path: Path) -> None:
    tree = PciTree(tmp_path, vfs=1)
    tree.file(VFS[0], "driver_override", "vfio-pci")
    binding.execute(binding.unbind(VFS[0], tmp_path, probe=False), tmp_path, tree.write)
    assert sysfs.driver_override(VFS[0], tmp_path) is None


def test_vfs_come_and_go(tmp_path: Path) -> None:
    tree = PciTree(tmp_path)
    before = snapshot(tree)
    plan = binding.vfs(PF, 2, tmp_path)
    binding.execute(plan, tmp_path, tree.write)
    assert tree.written == [
        f"devices/{PF}/sriov_drivers_autoprobe 0",
        f"devices/{PF}/sriov_numvfs 2",
    ]
    assert binding.vfs(PF, 2, tmp_path).writes == ()
    tree.written.clear()
    binding.execute(binding.vfs(PF, 3, tmp_path), tmp_path, tree.write)
    assert tree.written[0] == f"devices/{PF}/sriov_numvfs 0"
    assert len(sysfs.virtual_functions(PF, tmp_path)) == 3
    binding.undo(plan, tree.write)
    assert snapshot(tree).keys() >= before.keys()
    assert sysfs.virtual_functions(PF, tmp_path) == {}


def test_vfs_that_cannot_be_are_refused(tmp_path: Path) -> None:
    tree = PciTree(tmp_path, vfs=1)
    with pytest.raises(HostError, match="0 to 3 VFs, not 4"):
        binding.vfs(PF, 4, tmp_path)
    with pytest.raises(HostError, match="no SR-IOV capability"):
        binding.vfs(VFS[0], 1, tmp_path)
    assert tree.written == []


def test_a_write_that_fails_says_what_and_why(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"echo 1 > .*/gone/x: No such file") as caught:
        binding.perform(Write(tmp_path / "gone/x", "1"))
    assert "enable_sriov" in str(caught.value)
    binding.perform(Write(tmp_path / "x", ""))
    assert (tmp_path / "x").read_text() == "\n"
    assert str(Write(tmp_path / "x", "")) == f"echo > {tmp_path}/x"

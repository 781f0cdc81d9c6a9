"""``bind`` and ``unbind``: what they would write, and that several functions are one job."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.backends.pci_tree import PF, VFS, PciTree
from tests.server.server_process import run
from vfio_user_virtio.backends.vfio import sysfs
from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server import bind, main

if TYPE_CHECKING:
    import argparse
    from pathlib import Path


def parsed(*arguments: str) -> argparse.Namespace:
    return main._parser(arguments).parse_args(arguments)


def test_bind_and_unbind_are_there_and_back(tmp_path: Path) -> None:
    tree = PciTree(tmp_path, vfs=2)
    names = [str(address) for address in VFS[:2]]
    plans = bind.plans_of(parsed("bind", *names), tmp_path)
    assert bind.carry_out(plans, tmp_path, tree.write) == [
        f"{name}: no driver -> vfio-pci" for name in names
    ]
    assert bind.carry_out(bind.plans_of(parsed("bind", *names), tmp_path), tmp_path) == [
        f"{name}: vfio-pci" for name in names
    ]
    plans = bind.plans_of(parsed("unbind", names[0]), tmp_path)
    assert bind.carry_out(plans, tmp_path, tree.write) == [f"{names[0]}: vfio-pci -> virtio-pci"]
    plans = bind.plans_of(parsed("unbind", "--no-driver", names[1]), tmp_path)
    assert bind.carry_out(plans, tmp_path, tree.write) == [f"{names[1]}: vfio-pci -> no driver"]


def test_one_that_fails_undoes_the_others(tmp_path: Path) -> None:
    tree = PciTree(tmp_path, vfs=2)
    plans = bind.plans_of(parsed("bind", *(str(address) for address in VFS[:2])), tmp_path)
    tree.refuse = f"{VFS[1]}/driver_override"
    with pytest.raises(HostError, match="refused"):
        bind.carry_out(plans, tmp_path, tree.write)
    assert [sysfs.driver(address, tmp_path) for address in VFS[:2]] == [None, None]


def test_options_reach_the_plan(tmp_path: Path) -> None:
    PciTree(tmp_path, vfs=1)
    (tmp_path / "bus/pci/drivers/virtio_vfio_pci").mkdir()
    with pytest.raises(HostError, match="--disable-vfs"):
        bind.plans_of(parsed("bind", str(PF)), tmp_path)
    (plan,) = bind.plans_of(parsed("bind", "--disable-vfs", str(PF)), tmp_path)
    assert f"echo 0 > {tmp_path}/bus/pci/devices/{PF}/sriov_numvfs" in map(str, plan.writes)
    (plan,) = bind.plans_of(parsed("bind", "--driver", "virtio_vfio_pci", str(VFS[0])), tmp_path)
    assert plan.driver == "virtio_vfio_pci"


@pytest.mark.parametrize("command", ["bind", "unbind"])
def test_a_function_that_is_not_there_is_one_line(command: str) -> None:
    done = run(command, "--dry-run", "ffff:ff:1f.7")
    assert done.returncode == 69
    assert done.stderr.count("\n") == 1
    assert "no PCI function ffff:ff:1f.7" in done.stderr


def test_what_is_no_address_is_a_usage_error() -> None:
    done = run("bind", "eth0")
    assert done.returncode == 64
    assert "'eth0' is no PCI address" in done.stderr


def test_a_dry_run_shows_shell_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = PciTree(tmp_path, vfs=1)
    monkeypatch.setattr(bind.plans_of, "__defaults__", (tmp_path,))
    assert bind.run(parsed("bind", "--dry-run", str(VFS[0]))) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"echo vfio-pci > {tree.path(VFS[0])}/driver_override",
        f"echo {VFS[0]} > {tmp_path}/bus/pci/drivers_probe",
    ]
    assert sysfs.driver(VFS[0], tmp_path) is None

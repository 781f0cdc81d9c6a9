"""`check`: every line, good and bad, on trees of our own; and the command on this host."""

from __future__ import annotations

import gzip
import json
import os
import resource
from typing import TYPE_CHECKING, Final

import pytest

from tests.backends.pci_tree import PF, VFS, PciTree
from vfio_user_virtio.backends.vfio.sysfs import PciAddress
from vfio_user_virtio.errors import HostError
from vfio_user_virtio_server import check, host_facts, main
from vfio_user_virtio_server.host_facts import Fact, Roots, Verdict

if TYPE_CHECKING:
    from pathlib import Path

GOOD, LESS, BAD, UNKNOWN = Verdict
RELEASE: Final = os.uname().release
COMPLETE: Final = (
    "CONFIG_PCI_IOV=y\nCONFIG_VFIO_PCI=m\nCONFIG_IOMMUFD=m\nCONFIG_VFIO_DEVICE_CDEV=y\n"
)


class Host:
    """A host's trees below a folder; at first one with nothing."""

    def __init__(self, folder: Path) -> None:
        self.roots = Roots(*(folder / name for name in ("sys", "dev", "proc", "boot")))
        self.tree = PciTree(self.roots.sys, vfs=2)
        self.qemu = folder / "qemu"

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def program(self, version: str, devices: str) -> None:
        script = f"case $1 in --version) echo '{version}';; *) echo '{devices}' >&2;; esac\n"
        self.write(self.qemu, "#!/bin/sh\n" + script)
        self.qemu.chmod(0o755)

    def give_all(self) -> None:
        for name in ("vfio/vfio", "iommu", "net/tun", "vfio/11", "vfio/12"):
            self.write(self.roots.dev / name, "")
        (self.roots.sys / "class/iommu/dmar0").mkdir(parents=True)
        self.write(self.roots.boot / f"config-{RELEASE}", COMPLETE)
        self.write(self.roots.proc / "self/status", "CapEff:\t000001ffffffffff\n")
        self.program("QEMU emulator version 11.1.3 (Debian)", 'name "vfio-user-pci", bus PCI')

    def facts(self, *wanted: PciAddress) -> dict[str, Fact]:
        found = check.find(wanted, self.roots, str(self.qemu))
        assert len({fact.what for fact in found}) == len(found)
        for fact in found:
            assert fact.found
            assert fact.remedy or fact.verdict in (GOOD, UNKNOWN), fact
        return {fact.what: fact for fact in found}

    def verdict(self, what: str) -> Verdict:
        return self.facts()[what].verdict


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_host_that_has_everything(host: Host) -> None:
    host.give_all()
    for vf in VFS[:2]:
        host.tree._bind(vf, "vfio-pci")
    facts = host.facts(*VFS[:2])
    assert {fact.verdict for fact in facts.values()} == {GOOD}
    assert facts[f"VF {VFS[1]}, owner"].found == f"{PF}, to which it is member 2"


def test_a_host_that_has_nothing(host: Host) -> None:
    bad = {what for what, fact in host.facts(VFS[0]).items() if fact.verdict is BAD}
    assert bad >= {"IOMMU", "groups and containers", f"VF {VFS[0]}, driver"}
    assert host.facts(VFS[0])[f"VF {VFS[0]}, driver"].remedy == f"vfio-user-virtio bind {VFS[0]}"
    assert host.verdict("options of the kernel") is UNKNOWN
    assert host.verdict("iommufd") is LESS


def test_the_kernels_options_come_from_either_place(host: Host) -> None:
    partly = "CONFIG_PCI_IOV=y\n# CONFIG_VFIO_PCI is not set\nCONFIG_VFIO_DEVICE_CDEV=y\n"
    host.roots.proc.mkdir()
    (host.roots.proc / "config.gz").write_bytes(gzip.compress(partly.encode()))
    assert host.verdict("kernel with CONFIG_VFIO_PCI") is BAD
    assert host.verdict("kernel with CONFIG_IOMMUFD") is LESS
    host.write(host.roots.boot / f"config-{RELEASE}", COMPLETE)
    assert host.verdict("options of the kernel") is GOOD


def test_noiommu_is_told(host: Host) -> None:
    what = "devices without an IOMMU"
    assert host.verdict(what) is GOOD
    host.write(host.roots.sys / "module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n")
    assert host.verdict(what) is LESS


def test_a_node_that_this_user_may_not_use(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.give_all()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    facts = host.facts(VFS[0])
    assert facts["groups and containers"].verdict is BAD
    assert facts["groups and containers"].remedy.startswith("setfacl -m u:")


@pytest.mark.parametrize(
    ("soft", "hard", "capabilities", "verdict", "remedy"),
    [
        (-1, -1, 0, GOOD, ""),
        (8 << 20, -1, 0, BAD, "ulimit -l unlimited"),
        (8 << 20, 8 << 20, 0, BAD, "LimitMEMLOCK=infinity in the unit of the service"),
        (8 << 20, 8 << 20, 1 << 14, GOOD, ""),
    ],
)
def test_memory_that_may_be_locked(
    host: Host,
    monkeypatch: pytest.MonkeyPatch,
    soft: int,
    hard: int,
    capabilities: int,
    verdict: Verdict,
    remedy: str,
) -> None:
    assert resource.RLIM_INFINITY == -1
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    host.write(host.roots.proc / "self/status", f"Name:\tx\nCapEff:\t{capabilities:016x}\n")
    fact = host_facts.locked_memory(host.roots)
    assert (fact.verdict, fact.remedy) == (verdict, remedy)


@pytest.mark.parametrize(
    ("version", "devices", "verdict"),
    [
        ("QEMU emulator version 10.1.0", 'name "vfio-user-pci"', GOOD),
        ("QEMU emulator version 10.0.3", 'name "vfio-user-pci"', BAD),
        ("QEMU emulator version 11.1.3", 'name "vfio-pci"', BAD),
        ("something else", "", UNKNOWN),
    ],
)
def test_qemu(host: Host, version: str, devices: str, verdict: Verdict) -> None:
    assert host.verdict("QEMU") is LESS
    host.program(version, devices)
    assert host.verdict("QEMU") is verdict


def test_a_qemu_that_cannot_run_is_unknown(host: Host) -> None:
    host.write(host.qemu, "neither a program nor a script")
    host.qemu.chmod(0o755)
    assert host.verdict("QEMU") is UNKNOWN


def test_a_pf(host: Host) -> None:
    what = f"PF {PF}"
    assert host.facts()[f"{what}, driver"].verdict is LESS
    assert host.facts()[f"{what}, VFs"].found == "2 of 3"
    assert host.facts()[f"{what}, administration virtqueue"].verdict is UNKNOWN
    features = host.tree.path(PF) / "virtio0/features"
    for bit, verdict in (("0", BAD), ("1", GOOD)):
        host.write(features, "0" * 41 + bit + "0" * 22 + "\n")
        assert host.facts()[f"{what}, administration virtqueue"].verdict is verdict
    host.tree.file(PF, "sriov_numvfs", "0")
    assert "sriov_numvfs" in host.facts()[f"{what}, VFs"].remedy
    (host.tree.path(PF) / "driver").unlink()
    host.tree._bind(PF, "vfio-pci")
    assert host.facts()[f"{what}, driver"].verdict is GOOD


def test_a_function_without_sriov_that_is_no_vf(host: Host) -> None:
    (host.tree.path(PF) / "sriov_totalvfs").unlink()
    assert host.facts(PF)[f"PF {PF}, VFs"].verdict is BAD


def test_a_vf_in_a_group_with_others(host: Host) -> None:
    host.tree._bind(VFS[0], "vfio-pci")
    other = PciAddress.parse("0000:03:1f.0")
    host.tree.add(other, group=11)
    host.tree._bind(other, "e1000e")
    fact = host.facts()[f"VF {VFS[0]}, IOMMU group"]
    assert fact.verdict is BAD
    assert fact.remedy == f"vfio-user-virtio bind {other}"


def test_a_vf_without_a_group_or_a_node(host: Host) -> None:
    host.tree._bind(VFS[0], "vfio-pci")
    assert host.facts()[f"VF {VFS[0]}, node"].verdict is BAD
    (host.tree.path(VFS[0]) / "iommu_group").unlink()
    assert host.facts()[f"VF {VFS[0]}, IOMMU group"].verdict is BAD


def test_a_function_that_is_not_there(host: Host) -> None:
    with pytest.raises(HostError, match="lspci -D"):
        host.facts(PciAddress.parse("0000:7f:1f.7"))


def test_the_command_on_this_host(capfd: pytest.CaptureFixture[str]) -> None:
    code = main.main(["check", "--json"])
    facts = json.loads(capfd.readouterr().out)["facts"]
    assert code == (os.EX_UNAVAILABLE if any(f["verdict"] == "BAD" for f in facts) else 0)
    assert main.main(["check"]) == code
    table = capfd.readouterr().out
    for fact in facts:
        assert f"{fact['what']} " in table
        assert fact["found"] in table
    assert all(set(fact) == {"what", "verdict", "found", "remedy"} for fact in facts)


def test_a_wrong_address_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["check", "eth0"])
    assert caught.value.code == os.EX_USAGE
    assert "lspci -D" in capsys.readouterr().err

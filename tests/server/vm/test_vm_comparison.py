"""What is said of two QEMUs before anything is touched."""

from __future__ import annotations

import attrs
import pytest

from vfio_user_virtio_server.vm.comparison import compare, compare_served
from vfio_user_virtio_server.vm.control import ServedDevice
from vfio_user_virtio_server.vm.qemu import NEEDED, Facts, PciDevice

DEVICE = PciDevice("vf", "/machine/peripheral/vf", "00.0", "/machine/peripheral/port1/port1")
SOURCE = Facts(
    version=(11, 1, 3),
    machine="pc-q35-11.1-machine",
    status="running",
    migration="none",
    blockers=(),
    cpus=("max-x86_64-cpu",) * 2,
    memory={"ram": (1 << 28, True)},
    peripherals={"vf": "vfio-user-pci", "port1": "pcie-root-port", "device[0]": "virtio-rng-pci"},
    devices={"vf": DEVICE},
    offered=frozenset({*NEEDED, "xbzrle", "postcopy-ram"}),
    capabilities=frozenset(),
)
TARGET = attrs.evolve(SOURCE, status="inmigrate")


def test_two_that_fit() -> None:
    assert compare(SOURCE, TARGET, ["vf"]) == []
    newer = attrs.evolve(TARGET, version=(12, 0, 0), memory={"other": (1 << 28, True)})
    assert compare(attrs.evolve(SOURCE, migration="failed"), newer, ["vf"]) == []


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ({"version": (9, 2, 0)}, {}, "the source is QEMU 9.2.0; 10.1 is the first"),
        ({}, {"version": (10, 2, 9)}, "the target is QEMU 10.2.9, older than the source, 11.1.3"),
        ({}, {"machine": "pc-q35-11.0-machine"}, "machine is pc-q35-11.1-machine at the source"),
        ({}, {"cpus": ("max-x86_64-cpu",)}, "2 max-x86_64-cpu at the source, 1 max-x86_64-cpu"),
        ({"status": "paused"}, {}, "guest is paused; it has to be running"),
        ({"migration": "active"}, {}, "being migrated already (active)"),
        ({"blockers": ("a disk",)}, {}, "cannot be migrated: a disk"),
        ({}, {"status": "running"}, "start it with -S -incoming defer"),
        ({}, {"migration": "setup"}, "start it with -S -incoming defer"),
        ({"memory": {"ram": (1 << 28, False)}}, {}, "memory ram of the source is not shared"),
        ({}, {"memory": {"ram": (1 << 29, True)}}, "memory: [268435456] bytes at the source"),
        ({"capabilities": frozenset({"postcopy-ram"})}, {}, "postcopy-ram of the source off"),
        ({}, {"capabilities": frozenset({"xbzrle"})}, "xbzrle is on at one end only"),
        ({}, {"offered": frozenset()}, "lacks the migration capability pause-before-switchover"),
        ({}, {"peripherals": {}}, "device port1 is pcie-root-port at the source, not there"),
        ({}, {"peripherals": {"device[0]": "x"}}, "devices without an id are not the same"),
        ({"peripherals": {"i": "intel-iommu"}}, {}, "the guest has an IOMMU (intel-iommu)"),
        ({"peripherals": {"v": "vfio-pci"}}, {}, "a vfio-pci is not moved"),
        ({}, {"devices": {}}, "the target has no vfio-user-pci with id vf"),
        ({}, {"devices": {"vf": attrs.evolve(DEVICE, address="01.0")}}, "address 00.0 at the"),
        ({}, {"devices": {"vf": attrs.evolve(DEVICE, bus="/p2")}}, "on /p2 at the target"),
    ],
)
def test_what_does_not_fit(source: dict[str, object], target: dict[str, object], said: str) -> None:
    here = attrs.evolve(SOURCE, **source)  # type: ignore[arg-type]  # any of its fields
    there = attrs.evolve(TARGET, **target)  # type: ignore[arg-type]  # likewise
    problems = compare(here, there, ["vf"])
    assert [problem for problem in problems if said in problem], problems


def test_what_a_server_says() -> None:
    good = ServedDevice(name="vm1", connected=True)
    assert list(compare_served(good, good)) == []
    for bad, said in (
        (attrs.evolve(good, connected=False), "device vm1 of the target's server has no client"),
        (attrs.evolve(good, missing=("dirty_log",)), "does not offer dirty_log: pages that it"),
        (attrs.evolve(good, missing=("migration",)), "the same server owns its PF (serve --pf,"),
        (attrs.evolve(good, busy="migration of client"), "in use: migration of client"),
        (attrs.evolve(good, state="STOP"), "migration state STOP; it has to be RUNNING"),
    ):
        (problem,) = compare_served(good, bad)
        assert said in problem

"""Migration of physical VFs, and what can go wrong with them, inside an inner host whose hardware
is our own: two served PFs with members, and a few functions of QEMU's.

Every administration command of these tests goes through a real virtqueue in memory that an IOMMU
maps.  Stock Debian has groups only: there one whole migration between owners is enough.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import pytest

from tests.e2e.inner_cases import report_cases
from tests.testbed.inner_host import boot_inner_host
from tests.testbed.inner_machine import InnerMachine, Kernel
from tests.testbed.server_process import serve

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SHARED_GROUP: Final = (
    *("-device", "pcie-root-port,id=shared,slot=30,chassis=30,addr=0x1c"),
    *("-device", "virtio-rng-pci,bus=shared,addr=0x0.0,multifunction=on,disable-legacy=on"),
    *("-device", "virtio-rng-pci,bus=shared,addr=0x0.1,disable-legacy=on"),
)
"""Two functions that no IOMMU tells apart."""
CONFIG: Final = """
[[owner]]
name = "first"
pf = {{ socket_path = "{folder}/pf1" }}
[[owner.member]]
socket_path = "{folder}/a"
mac = "02:00:00:00:00:01"
[[owner.member]]
socket_path = "{folder}/b"
mac = "02:00:00:00:00:02"
[[owner.member]]
socket_path = "{folder}/peer1"
mac = "02:00:00:00:00:f0"
[[owner]]
name = "second"
pf = {{ socket_path = "{folder}/pf2" }}
[[owner.member]]
socket_path = "{folder}/c"
mac = "02:00:00:00:00:03"
[[owner.member]]
socket_path = "{folder}/peer2"
mac = "02:00:00:00:00:f1"
"""
SOCKETS: Final = ("pf1", "a", "b", "peer1", "pf2", "c", "peer2")
CASES: Final = [
    pytest.param(
        InnerMachine(kernel=Kernel.OWN, vfs=2, devices=SHARED_GROUP),
        ("tests/inner/migration", "tests/inner/faults"),
        id="own",
    ),
    pytest.param(
        InnerMachine(kernel=Kernel.DEBIAN, vfs=0),
        ("tests/inner/migration", "-k", "two_owners"),
        id="debian",
    ),
]


@pytest.mark.parametrize(("machine", "tests"), CASES)
async def test_migration(
    bed: Bed,
    tmp_path: Path,
    machine: InnerMachine,
    tests: tuple[str, ...],
    subtests: pytest.Subtests,
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(folder=tmp_path))
    machine = attrs.evolve(machine, sockets=tuple(tmp_path / name for name in SOCKETS))
    async with (
        serve(tmp_path, "--config", str(config)),
        boot_inner_host(bed, machine, tmp_path / "host") as host,
    ):
        for address in machine.function_addresses:
            await host.bind(address)
        cases = await host.pytest(*tests, seconds=400)
        complaints = await host.guest.kernel_complaints()
    report_cases(cases, machine.ways, subtests)
    assert complaints == []

"""Real kernel VFIO: the tests of `tests/inner`, inside one inner host for each configuration.

Its "hardware" is QEMU's own SR-IOV device, its VFs bound to vfio-pci and cabled to each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from tests.e2e.inner_cases import report_cases
from tests.testbed.inner_host import boot_inner_host
from tests.testbed.inner_machine import InnerIommu, InnerMachine, Kernel

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SECONDS: Final = 300
"""Limit of all that runs inside one host."""

MACHINES: Final = (
    InnerMachine(kernel=Kernel.OWN, iommu=InnerIommu.INTEL),
    InnerMachine(kernel=Kernel.OWN, iommu=InnerIommu.VIRTIO),
    InnerMachine(kernel=Kernel.OWN, iommu=InnerIommu.NONE),
    InnerMachine(kernel=Kernel.DEBIAN, iommu=InnerIommu.INTEL),
)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
async def test_inner(
    bed: Bed, tmp_path: Path, machine: InnerMachine, subtests: pytest.Subtests
) -> None:
    async with boot_inner_host(bed, machine, tmp_path) as host:
        await host.enable_vfs()
        async with host.vfs_cabled():
            cases = await host.pytest("tests/inner", seconds=SECONDS)
        complaints = await host.guest.kernel_complaints()
    report_cases(cases, machine.ways, subtests)
    assert complaints == []

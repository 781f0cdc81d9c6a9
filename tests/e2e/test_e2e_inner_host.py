"""Real kernel VFIO: the tests of `tests/inner`, inside one inner host for each configuration.

Every test inside is a subtest here, under its own name and with its own traceback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from tests.testbed.inner_host import boot_inner_host
from tests.testbed.inner_machine import InnerIommu, InnerMachine, Kernel

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

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
            cases = await host.pytest("tests/inner", seconds=300)
        complaints = await host.guest.kernel_complaints()
    assert {case.outcome for case in cases} <= {"passed", "failed"}, "a test inside was skipped"
    for way in machine.ways:
        assert any(f"[{way}]" in case.name for case in cases), f"no test inside ran by {way}"
    for case in cases:
        with subtests.test(case.name):
            if case.outcome == "failed":
                pytest.fail(case.text, pytrace=False)
    assert complaints == []

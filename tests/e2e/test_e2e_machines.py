"""The kinds of machine that a device is put into: firmware, IOMMU, memory that cannot be mapped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import pytest

from tests.e2e import traffic
from tests.e2e.served import SLOT_1, TAP_MACHINE, guest_on_tap
from tests.testbed.machine import Boot, Iommu

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed
    from tests.testbed.netns import Netns

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.mark.parametrize("firmware", [Boot.SEABIOS, Boot.OVMF])
async def test_firmware(bed: Bed, netns: Netns, tmp_path: Path, firmware: Boot) -> None:
    machine = attrs.evolve(TAP_MACHINE, boot=firmware, restartable=True)
    async with guest_on_tap(bed, netns, tmp_path, machine=machine) as guest:
        await traffic.check_ping(guest, netns)
        await guest.reboot()
        await traffic.configure(guest)
        await traffic.check_ping(guest, netns)
        await traffic.check_tcp(guest, netns)


@pytest.mark.parametrize("iommu", Iommu)
async def test_iommu(bed: Bed, netns: Netns, tmp_path: Path, iommu: Iommu) -> None:
    """The driver's addresses are the IOMMU's, mapped and unmapped for each packet (strict)."""
    machine = attrs.evolve(TAP_MACHINE, iommu=iommu, append="iommu.passthrough=0 iommu.strict=1")
    async with guest_on_tap(bed, netns, tmp_path, machine=machine) as guest:
        group = (await guest.run(f"cat /sys/bus/pci/devices/{SLOT_1}/iommu_group/type")).strip()
        assert group == "DMA"
        await traffic.check_ping(guest, netns)
        await traffic.check_tcp(guest, netns, mebibytes=2)
        await traffic.check_integrity(guest, netns, mebibytes=1)


async def test_memory_without_descriptor(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    """Plain `-m`: the server reaches the guest's memory by DMA_READ and DMA_WRITE alone."""
    machine = attrs.evolve(TAP_MACHINE, shared_memory=False)
    async with guest_on_tap(bed, netns, tmp_path, machine=machine) as guest:
        await traffic.check_ping(guest, netns)
        await traffic.check_tcp(guest, netns, mebibytes=2)
        await traffic.check_integrity(guest, netns, mebibytes=1)

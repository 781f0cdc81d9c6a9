"""A real guest in real QEMU on the engine that libvfio-user is: it pings, moves TCP, and resets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import pytest

from tests.e2e import moving, traffic
from tests.e2e.served import TAP_MACHINE, guest_on_tap
from tests.testbed.machine import Iommu
from vfio_user_virtio.libvfio_user import LibraryError, load

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed
    from tests.testbed.netns import Netns

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ENGINE: Final = ("--engine", "libvfio-user")


@pytest.fixture(autouse=True)
def _installed() -> None:
    try:
        load()
    except LibraryError as error:
        pytest.skip(str(error))


async def test_traffic_and_a_reboot(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    machine = attrs.evolve(TAP_MACHINE, restartable=True)
    async with guest_on_tap(bed, netns, tmp_path, *ENGINE, machine=machine) as guest:
        await traffic.check_ping(guest, netns)
        await traffic.check_tcp(guest, netns, mebibytes=16)
        await traffic.check_integrity(guest, netns, mebibytes=1)
        interrupts = await guest.run("grep virtio0 /proc/interrupts")
        assert "MSIX" in interrupts, interrupts
        await guest.reboot()
        await traffic.configure(guest)
        await traffic.check_ping(guest, netns)


@pytest.mark.parametrize("iommu", Iommu)
async def test_iommu(bed: Bed, netns: Netns, tmp_path: Path, iommu: Iommu) -> None:
    """The driver's addresses are mapped and unmapped for each packet: many, and exactly."""
    machine = attrs.evolve(TAP_MACHINE, iommu=iommu, append="iommu.passthrough=0 iommu.strict=1")
    async with guest_on_tap(bed, netns, tmp_path, *ENGINE, machine=machine) as guest:
        await traffic.check_ping(guest, netns)
        await traffic.check_integrity(guest, netns, mebibytes=1)


async def test_it_moves_under_traffic(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    """By `migrate-vm`, which has the devices by their servers' control sockets."""
    async with moving.open_mover(bed, netns, tmp_path, *ENGINE) as mover:
        here = await mover.end(incoming=False)
        async with moving.running_traffic(netns, here.guest) as passing:
            for _ in range(2):
                there = await mover.end(incoming=True)
                done = await moving.move(here, there)
                assert done.target_runs
                await passing.pass_more(4)
                here = there
            await passing.check(here.guest, moves=2)
        assert await here.guest.kernel_complaints() == []

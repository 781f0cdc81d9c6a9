"""A guest whose virtio_pci is told to be a legacy driver, on a member's transitional view."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import pytest

from tests.e2e import traffic
from tests.e2e.served import SLOT_1, TAP_MACHINE, guest_on_tap

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed
    from tests.testbed.netns import Netns

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

VERSION_1 = 32


@pytest.mark.parametrize("append", ["", "pci=nomsi"])
async def test_a_legacy_driver(bed: Bed, netns: Netns, tmp_path: Path, append: str) -> None:
    machine = attrs.evolve(TAP_MACHINE, append=f"virtio_pci.force_legacy=1 {append}")
    async with guest_on_tap(bed, netns, tmp_path, "--legacy", machine=machine) as guest:
        assert "0x1000" in await guest.run(f"cat /sys/bus/pci/devices/{SLOT_1}/device")
        features = (await guest.run("cat /sys/bus/virtio/devices/virtio0/features")).strip()
        assert features[VERSION_1:].strip("0") == "", "nothing from bit 32 on"
        interrupts = await guest.run("grep virtio0 /proc/interrupts")
        assert ("MSI" in interrupts) == (not append), interrupts
        await traffic.check_ping(guest, netns)
        await traffic.check_tcp(guest, netns)
        await traffic.check_integrity(guest, netns, mebibytes=2)
        await guest.run(f"echo {SLOT_1} >/sys/bus/pci/drivers/virtio-pci/unbind")
        await guest.run(f"echo {SLOT_1} >/sys/bus/pci/drivers/virtio-pci/bind")
        await traffic.configure(guest)
        await traffic.check_ping(guest, netns)


async def test_a_modern_driver_on_the_same_view(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    async with guest_on_tap(bed, netns, tmp_path, "--legacy") as guest:
        features = (await guest.run("cat /sys/bus/virtio/devices/virtio0/features")).strip()
        assert features[VERSION_1] == "1"
        await traffic.check_ping(guest, netns)
        await traffic.check_tcp(guest, netns)

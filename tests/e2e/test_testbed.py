"""The test bed itself, with QEMU's own virtio-net device: what fails here is not the server's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from tests.testbed.guest import GuestFailed, boot
from tests.testbed.machine import Boot, Iommu, Machine
from tests.testbed.netns import CommandFailed

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed
    from tests.testbed.netns import Netns

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

TAP_NIC = (
    *("-netdev", "tap,id=net,ifname=tap0,script=no,downscript=no"),
    *("-device", "virtio-net-pci,netdev=net"),
)
NIC_BEHIND_IOMMU = "virtio-net-pci,iommu_platform=on,disable-legacy=on"


async def test_guest_and_host_reach_each_other(bed: Bed, netns: Netns, tmp_path: Path) -> None:
    await netns.add_tap("tap0", "10.0.0.1/24")
    machine = Machine(devices=TAP_NIC, programs=("ip",), restartable=True)
    async with boot(bed, machine, tmp_path, netns.wrap) as guest:
        await guest.run("ip address add 10.0.0.2/24 dev eth0 && ip link set eth0 up")
        await guest.run("ping -c 2 -i 0.2 10.0.0.1")
        await netns.run("ping", "-c", "2", "-i", "0.2", "10.0.0.2")
        with pytest.raises(CommandFailed):
            await netns.run("ping", "-c", "1", "-W", "1", "10.0.0.3")
        await guest.reboot()
        assert "eth0" in await guest.run("ip -brief link")
        assert await guest.kernel_complaints() == []


@pytest.mark.parametrize("firmware", [Boot.SEABIOS, Boot.OVMF])
async def test_firmware_boots(bed: Bed, tmp_path: Path, firmware: Boot) -> None:
    machine = Machine(boot=firmware, modules=(), shared_memory=False)
    async with boot(bed, machine, tmp_path) as guest:
        efi = await guest.execute("test -d /sys/firmware/efi")
        assert (efi.code == 0) == (firmware is Boot.OVMF)


@pytest.mark.parametrize("iommu", Iommu)
async def test_iommu_is_driven(bed: Bed, tmp_path: Path, iommu: Iommu) -> None:
    machine = Machine(iommu=iommu, devices=("-device", NIC_BEHIND_IOMMU))
    async with boot(bed, machine, tmp_path) as guest:
        assert (await guest.run("ls /sys/class/iommu")).split() != []
        await guest.run("test -e /sys/class/net/eth0/device/../iommu_group")


async def test_commands_run_side_by_side_and_tell_their_end(bed: Bed, tmp_path: Path) -> None:
    outputs: dict[str, str] = {}
    async with boot(bed, Machine(modules=()), tmp_path) as guest:

        async def talk(word: str) -> None:
            outputs[word] = await guest.run(f"seq 2000 | sed s/$/{word}/")

        async with trio.open_nursery() as nursery:
            for word in ("one", "two", "three"):
                nursery.start_soon(talk, word)
        assert {word: text.count(word) for word, text in outputs.items()} == dict.fromkeys(
            ("one", "two", "three"), 2000
        )
        assert (await guest.execute("echo said; exit 3")).code == 3
        with pytest.raises(GuestFailed, match="failed with"):
            await guest.run("sleep 60", seconds=0)
        await guest.kill()
        with pytest.raises(GuestFailed, match="QEMU ended"):
            await guest.run("true")

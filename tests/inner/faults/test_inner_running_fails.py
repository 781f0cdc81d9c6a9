"""Physical VFs whose device, owner or client goes wrong while a session runs: who is told what, and
what is left."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests.backends.member_rig import MAC_A, frame, ping_pong, receive
from tests.inner.physical_rig import (
    addresses,
    config_of,
    left_at_owner,
    physical_devices,
    physical_rig,
    place,
    started_guest,
)
from tests.migration.guest_move_network import MAC_HOST
from tests.migration.served_rig import go, state_of
from tests.migration.test_guest_move_failures import at_the_change_to
from vfio_user_virtio.backends.vfio import binding, sysfs
from vfio_user_virtio.backends.vfio.owner import VfioOwner
from vfio_user_virtio.backends.vfio.physical import physical_functions
from vfio_user_virtio.device import DmaAccess, DmaMapping, IrqAction, IrqRequest, VfioIrq
from vfio_user_virtio.errors import RemoteError
from vfio_user_virtio.migration.states import PRE_COPY, RUNNING, STOP_COPY
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.loopback import served

if TYPE_CHECKING:
    from tests.inner.conftest import InnerFacts
    from vfio_user_virtio.backends.vfio.sysfs import PciAddress

PATIENCE: Final = 15
READ_WRITE: Final = DmaAccess.READ | DmaAccess.WRITE
ENTRY_LIMIT: Final = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")
FEW: Final = 4


async def write(path: Path, text: str) -> None:
    await trio.to_thread.run_sync(path.write_text, text)


def device_file(address: PciAddress, name: str) -> Path:
    return sysfs.device_path(address) / name


# --- what a client does ---------------------------------------------------------------------------


async def test_eventfds_that_are_closed(inner: InnerFacts, best_way: str) -> None:
    """An interrupt that nobody hears harms nobody; what is no eventfd is refused."""
    async with (
        physical_devices(inner, best_way, ("a", "peer1")) as devices,
        started_guest(devices["a"]) as guest,
        started_guest(devices["peer1"]) as peer,
    ):
        client = guest.client
        await ping_pong(guest.driver, peer.driver, 1, sender=MAC_A, to=MAC_HOST)
        count = (await client.irq_info(VfioIrq.MSIX)).count
        eventfds = tuple(os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count))
        trigger = IrqAction.TRIGGER
        await client.set_irqs(IrqRequest(VfioIrq.MSIX, 0, count, trigger, eventfds=eventfds))
        for eventfd in eventfds:
            os.close(eventfd)
        await guest.driver.send(frame(MAC_HOST, MAC_A))
        await receive(peer.driver)
        sent = frame(MAC_A, MAC_HOST, b"nobody hears of it")
        await peer.driver.send(sent)
        await peer.driver.flush()
        null = os.open("/dev/null", os.O_RDONLY)
        with pytest.raises(RemoteError, match="Invalid argument"):
            await client.set_irqs(IrqRequest(VfioIrq.MSIX, 0, 1, trigger, eventfds=(null,)))
        os.close(null)
        await guest.driver.pci.arm(client)
        interrupt = guest.driver.interrupt(0)
        seen = interrupt.count
        # the kernel's loopback: as if the device had signalled all of them
        await client.set_irqs(IrqRequest(VfioIrq.MSIX, 0, count, trigger))
        with trio.fail_after(PATIENCE):
            await interrupt.wait(seen)
        assert (await receive(guest.driver)).data == sent


async def test_more_mappings_than_the_kernel_allows(
    inner: InnerFacts, caplog: pytest.LogCaptureFixture
) -> None:
    """A container's limit; iommufd has none but memory."""
    before = ENTRY_LIMIT.read_text()
    await write(ENTRY_LIMIT, str(FEW))
    try:
        async with physical_functions(config_of(inner, "group", "a", pf=None)) as (device,):
            with GuestRam(1 << 20) as ram:
                async with served(device) as client:
                    pages = [
                        DmaMapping(ram.iova + page * 8192, 4096, READ_WRITE, ram.fd, page * 8192)
                        for page in range(FEW + 1)
                    ]
                    for page in pages[:FEW]:
                        await client.dma_map(page)
                    with pytest.raises(RemoteError, match="No space left"):
                        await client.dma_map(pages[FEW])
                    await client.dma_unmap(pages[0].iova, 4096)
                    await client.dma_map(pages[FEW])
        assert f"the limit of {FEW} mappings is reached" in caplog.text
        assert "raise vfio_iommu_type1.dma_entry_limit" in caplog.text
    finally:
        await write(ENTRY_LIMIT, before)


async def test_memory_that_cannot_be_mapped(
    inner: InnerFacts, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the host's interrupts are, beyond the IOMMU's width, and what cannot be written: each
    is refused with its reason, and nothing else suffers."""
    async with physical_functions(config_of(inner, way, "a", pf=None)) as (device,):
        with GuestRam(1 << 20) as ram:
            sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
            os.ftruncate(sealed, 4096)
            fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
            async with served(device) as client:
                await ram.map(client)
                for iova, fd in ((0xFEE0_0000, ram.fd), (1 << 60, ram.fd), (1 << 33, sealed)):
                    with pytest.raises(RemoteError):
                        await client.dma_map(DmaMapping(iova, 4096, READ_WRITE, fd))
                await client.dma_unmap(ram.iova, ram.size)
                await ram.map(client)
            os.close(sealed)
    assert "is not in what the host's IOMMU can map" in caplog.text
    assert "is sealed against writing" in caplog.text
    assert "Traceback" not in caplog.text


# --- the owner ------------------------------------------------------------------------------------


async def test_a_pf_is_reset_during_a_migration(
    inner: InnerFacts, best_way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By somebody else: the migration fails, the guest goes on, the owner is brought up again, and
    the next migration is done."""
    pf = addresses(inner)["pf1"]
    execute = VfioOwner.execute
    resets = False

    async def after_a_reset(owner: VfioOwner, readable: bytes, writable: int) -> bytes:
        nonlocal resets
        if resets:
            resets = False
            await write(device_file(pf, "reset"), "1")
        return await execute(owner, readable, writable)

    monkeypatch.setattr(VfioOwner, "execute", after_a_reset)
    async with physical_rig(inner, best_way, "ab") as made:
        rig = made.rig
        await rig.start()
        parts = made.devices["a"].migration._owner

        def reset() -> None:
            nonlocal resets
            resets = True

        at_the_change_to(rig.places["a"].client, STOP_COPY, reset)
        with pytest.raises(RemoteError, match="the change to STOP_COPY"):
            await rig.move()
        assert rig.here == "a"
        await rig.traffic.goes_on("a")
        with trio.fail_after(PATIENCE):
            while parts.support.lack is not None:  # noqa: ASYNC110 - nothing tells of it
                await trio.sleep(0.02)
        await rig.move()
        await rig.traffic.goes_on("b")
        await rig.finish()
        assert await left_at_owner(made.devices["a"].migration) == 0


async def test_the_owner_is_lost(
    inner: InnerFacts, best_way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its VFs go on, and say why they cannot be migrated; the host gets the PF back."""
    pf = addresses(inner)["pf1"]
    async with (
        physical_devices(inner, best_way, ("a", "peer1")) as devices,
        started_guest(devices["a"]) as guest,
        started_guest(devices["peer1"]) as peer,
    ):
        await go(guest.client, PRE_COPY)
        plan = binding.unbind(pf, probe=False)
        with trio.fail_after(PATIENCE):
            await trio.to_thread.run_sync(binding.execute, plan, abandon_on_cancel=True)
        try:
            assert f"{pf}: the host wants it back" in caplog.text
            await ping_pong(guest.driver, peer.driver, 2, sender=MAC_A, to=MAC_HOST)
            with pytest.raises(RemoteError, match="No such device"):
                await go(guest.client, STOP_COPY)
            assert f"{pf}: " in caplog.text.splitlines()[-1]
            assert await state_of(guest.client) is PRE_COPY
            await go(guest.client, RUNNING)
            await ping_pong(guest.driver, peer.driver, 2, sender=MAC_A, to=MAC_HOST)
            await guest.client.reset()
        finally:
            binding.undo(plan)
    async with physical_devices(inner, best_way, "a") as devices, place(devices["a"]) as made:
        await go(made.client, STOP_COPY, RUNNING)


# --- the device -----------------------------------------------------------------------------------


async def test_a_vf_is_removed(
    inner: InnerFacts, best_way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its session ends, those of other VFs go on, and when it is back it can be had again."""
    address = addresses(inner)["a"]
    async with physical_devices(inner, best_way, ("a", "b", "peer1")) as devices:
        async with (
            started_guest(devices["peer1"]) as peer,
            started_guest(devices["b"]) as other,
            trio.open_nursery() as nursery,
        ):
            mac = (await other.driver.config()).mac
            await ping_pong(other.driver, peer.driver, 1, sender=mac, to=MAC_HOST)
            async with started_guest(devices["a"]) as guest:
                await ping_pong(guest.driver, peer.driver, 1, sender=MAC_A, to=MAC_HOST)
                nursery.start_soon(write, device_file(address, "remove"), "1")
                with trio.fail_after(PATIENCE):
                    await guest.client.lost.wait()
            await ping_pong(other.driver, peer.driver, 1, sender=mac, to=MAC_HOST)
        assert f"{address}: the kernel wants the device back" in caplog.text
        async with served(devices["a"]) as client:
            with trio.fail_after(PATIENCE):
                await client.lost.wait()
        assert "Traceback" not in caplog.text
    await write(sysfs.SYS / "bus/pci/rescan", "1")
    binding.execute(binding.bind(address))
    async with (
        physical_devices(inner, best_way, ("a", "peer1")) as devices,
        started_guest(devices["a"]) as guest,
        started_guest(devices["peer1"]) as peer,
    ):
        await ping_pong(guest.driver, peer.driver, 1, sender=MAC_A, to=MAC_HOST)

"""Migration states, and what may be asked in them, on both engines."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, Final

import attrs
import pytest

from tests.backends.member_rig import MAC_A
from tests.migration.served_rig import go, read_all, state_of
from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.backends.software.migratable import migratable_members
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.device import FeatureOperation, IrqAction, IrqRequest, ResetCause, VfioIrq
from vfio_user_virtio.errors import ClientError, RemoteError
from vfio_user_virtio.migration.states import EVERYTHING, STOP_AND_COPY, WITHOUT_PRE_COPY
from vfio_user_virtio.protocol.feature import Feature
from vfio_user_virtio.protocol.migration import MigrationState, decode_migration_flags_untrusted
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.loopback import served, ungrouped_nursery
from vfio_user_virtio.testing.net_driver import NetDriver
from vfio_user_virtio.testing.virtio_pci import COMMAND, VirtioPci

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vfio_user_virtio.migration.migratable_device import MigratableDevice
    from vfio_user_virtio.migration.states import Options
    from vfio_user_virtio.transport.client import Client

pytestmark = pytest.mark.usefixtures("engine")

STOP: Final = MigrationState.STOP
RUNNING: Final = MigrationState.RUNNING
STOP_COPY: Final = MigrationState.STOP_COPY
RESUMING: Final = MigrationState.RESUMING
PRE_COPY: Final = MigrationState.PRE_COPY
STATES: Final = (STOP, STOP_COPY, RESUMING, PRE_COPY)


@attrs.frozen
class Served:
    """A device, its client, and the memory that it has."""

    device: MigratableDevice
    client: Client
    ram: GuestRam

    async def driver(self) -> NetDriver:
        """One that is up."""
        driver = NetDriver(await VirtioPci.open(self.client), self.ram, rx_buffers=4)
        await driver.start()
        return driver


@contextlib.asynccontextmanager
async def one(options: Options = EVERYTHING) -> AsyncIterator[Served]:
    owner = Owner("owner")
    owner.add_member(MemberConfig(mac=MAC_A))
    async with ungrouped_nursery() as nursery:
        nursery.start_soon(owner.run)
        (device,) = (await migratable_members(owner, options=options)).values()
        with GuestRam(1 << 20) as ram:
            async with served(device, memory=ram) as client:
                await ram.map(client)
                yield Served(device, client, ram)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.name)
async def test_reset_leads_back_to_running(state: MigrationState) -> None:
    """The device is as new then, and can be used and migrated as any other."""
    async with one() as made:
        driver = await made.driver()
        await go(made.client, state)
        await made.client.reset()
        assert await state_of(made.client) is RUNNING
        assert made.device.migration.state is RUNNING
        assert await driver.pci.status() == 0
        driver.pci.close()
        for other in STATES:
            await go(made.client, other)
            assert await state_of(made.client) is other
            await made.client.reset()
        driver = await made.driver()
        await go(made.client, PRE_COPY, STOP_COPY)
        assert await read_all(made.client)
        driver.pci.close()


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.name)
async def test_a_reset_that_the_device_refuses_changes_nothing(
    state: MigrationState, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with one() as made:
        await go(made.client, state)

        async def refuse(cause: ResetCause) -> None:
            raise ClientError(errno.EBUSY, f"{cause}: not now")

        with monkeypatch.context() as patch:
            patch.setattr(made.device, "reset", refuse)
            with pytest.raises(RemoteError) as refused:
                await made.client.reset()
        assert refused.value.errno == errno.EBUSY
        assert await state_of(made.client) is made.device.migration.state is state
        await made.client.reset()
        assert await state_of(made.client) is made.device.migration.state is RUNNING


@pytest.mark.parametrize("options", [STOP_AND_COPY, WITHOUT_PRE_COPY])
async def test_a_device_without_pre_copy_says_so(options: Options) -> None:
    async with one(options) as made:
        get = FeatureOperation.GET
        flags = decode_migration_flags_untrusted(
            await made.client.feature(Feature.MIGRATION, get, room=8)
        )
        assert flags == options
        with pytest.raises(RemoteError):
            await go(made.client, PRE_COPY)


@pytest.mark.parametrize("state", [STOP, STOP_COPY], ids=lambda state: state.name)
async def test_registers_of_a_stopped_device(state: MigrationState) -> None:
    async with one() as made:
        pci = await VirtioPci.open(made.client)
        command = await pci.config_read(COMMAND, 2)
        await go(made.client, state)
        assert await pci.config_read(COMMAND, 2) == command


@pytest.mark.parametrize("state", [STOP, STOP_COPY], ids=lambda state: state.name)
async def test_interrupts_of_a_stopped_device(state: MigrationState) -> None:
    eventfd = os.eventfd(0)
    async with one() as made:
        await go(made.client, state)
        await made.client.set_irqs(IrqRequest(VfioIrq.MSIX, 0, 1, IrqAction.TRIGGER, (eventfd,)))
    os.close(eventfd)


@pytest.mark.parametrize("state", [STOP, STOP_COPY], ids=lambda state: state.name)
async def test_memory_of_a_stopped_device(state: MigrationState) -> None:
    async with one() as made:
        await go(made.client, state)
        await made.ram.unmap(made.client)
        await made.ram.map(made.client)

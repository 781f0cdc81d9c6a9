"""What the proxy keeps of the device's state, without the library."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests.backends.member_rig import MAC_A
from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.backends.software.migratable import migratable_members
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.device import FeatureOperation
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.libvfio_user.arrival import Message
from vfio_user_virtio.libvfio_user.declarations import MigrationState
from vfio_user_virtio.libvfio_user.proxy import DeviceProxy
from vfio_user_virtio.migration.states import STOP_AND_COPY
from vfio_user_virtio.protocol.header import HEADER_SIZE, Command
from vfio_user_virtio.testing.loopback import ungrouped_nursery

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vfio_user_virtio.migration.migratable_device import MigratableDevice

COUNT: Final = 1 << 20
PRE_COPY: Final = MigrationState.PRE_COPY
STOP_COPY: Final = MigrationState.STOP_AND_COPY


class Told:
    """A proxy of a device without PRE_COPY, and who tells it what the library does."""

    def __init__(self, device: MigratableDevice) -> None:
        self.device = device
        self.proxy = DeviceProxy(device, "vm1")

    async def go(self, state: MigrationState) -> None:
        await trio.to_thread.run_sync(self.proxy.transition, state)

    async def read(self) -> bytes:
        return bytes(await trio.to_thread.run_sync(self.proxy.read_data, COUNT))


@pytest.fixture
async def told() -> AsyncIterator[Told]:
    owner = Owner("owner")
    owner.add_member(MemberConfig(mac=MAC_A))
    async with ungrouped_nursery() as nursery:
        nursery.start_soon(owner.run)
        (device,) = (await migratable_members(owner, options=STOP_AND_COPY)).values()
        yield Told(device)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("held", "asked"), [(PRE_COPY, STOP_COPY), (STOP_COPY, PRE_COPY)])
async def test_a_transition_that_the_device_refuses_changes_nothing(
    told: Told, held: MigrationState, asked: MigrationState, monkeypatch: pytest.MonkeyPatch
) -> None:
    await told.go(held)
    feature = told.device.feature

    async def no_set(index: int, operation: FeatureOperation, data: bytes) -> bytes:
        if operation == FeatureOperation.SET:
            raise ClientError(errno.EBUSY, "not now")
        return await feature(index, operation, data)

    monkeypatch.setattr(told.device, "feature", no_set)
    with pytest.raises(OSError, match="not now") as refused:
        await told.go(asked)
    assert refused.value.errno == errno.EBUSY
    assert bool(await told.read()) == (held is STOP_COPY), "PRE_COPY that it does not have: no data"
    assert told.proxy.refusals == 1


async def test_pre_copy_that_the_device_does_not_have_ends_with_the_next_state(told: Told) -> None:
    await told.go(PRE_COPY)
    assert await told.read() == b""
    await told.go(STOP_COPY)
    assert await told.read()


async def test_pre_copy_that_the_device_does_not_have_ends_with_a_reset(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library is led to RUNNING, and the device has been reset already."""
    await told.go(PRE_COPY)
    commands: list[int] = []

    def tell(command: int, _: bytes) -> None:
        commands.append(command)
        told.proxy.transition(MigrationState.RUNNING)

    def reset() -> None:
        with Message(0, Command.DEVICE_RESET, 0, HEADER_SIZE, b"", []) as message:
            told.proxy.prepare(message)
        told.proxy.settle()

    monkeypatch.setattr(told.proxy, "_tell", tell)
    await trio.to_thread.run_sync(reset)
    assert commands == [Command.DEVICE_FEATURE]
    with pytest.raises(OSError, match="read from in RUNNING") as refused:
        await told.read()
    assert refused.value.errno == errno.EINVAL

"""Members of one owner as they are served: sessions, guests, a migration each, and an owner whose
queue can fail or hold commands back."""

from __future__ import annotations

import contextlib
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import trio

from tests.migration.owner_rig import OwnerRig
from vfio_user_virtio.device import FeatureOperation
from vfio_user_virtio.migration.migratable_device import MigratableDevice
from vfio_user_virtio.protocol.feature import Feature
from vfio_user_virtio.protocol.migration import (
    MigrationState,
    decode_device_state_reply_untrusted,
    encode_device_state,
)
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.loopback import served, ungrouped_nursery
from vfio_user_virtio.testing.net_driver import NetDriver
from vfio_user_virtio.testing.virtio_pci import VirtioPci

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vfio_user_virtio.backends.software.member import Member
    from vfio_user_virtio.transport.client import Client
    from vfio_user_virtio.virtio.admin import Answer, Command

RAM_SIZE: Final = 4 << 20


@attrs.frozen
class Place:
    """A member, and the guest that is its client."""

    member: Member
    client: Client
    ram: GuestRam
    driver: NetDriver

    async def go(self, *states: MigrationState) -> None:
        await go(self.client, *states)

    async def state(self) -> MigrationState:
        return await state_of(self.client)

    async def read(self) -> bytes:
        return await read_all(self.client)


async def go(client: Client, *states: MigrationState) -> None:
    """Ask for states, one by one."""
    for state in states:
        await client.feature(
            Feature.MIG_DEVICE_STATE, FeatureOperation.SET, encode_device_state(state)
        )


async def state_of(client: Client) -> MigrationState:
    data = await client.feature(Feature.MIG_DEVICE_STATE, FeatureOperation.GET, room=8)
    return decode_device_state_reply_untrusted(data)


async def read_all(client: Client) -> bytes:
    """What is there of the stream."""
    stream = b""
    while len(piece := await client.migration_read(4096)) == 4096:
        stream += piece
    return stream + piece


class ServedRig:
    """An owner that runs, with devices that nobody is the client of."""

    def __init__(self, members: int = 3, *, objects: int = 255) -> None:
        self.owner_rig = OwnerRig(members, objects=objects)
        self.devices = [
            MigratableDevice(member, migration, member.logging)
            for member, migration in zip(self.members, self.owner_rig.migrations, strict=True)
        ]

    @property
    def members(self) -> list[Member]:
        return self.owner_rig.members

    @property
    def objects(self) -> tuple[int, int]:
        """Resource objects: as the driver of the owner counts them, and as the owner does."""
        return self.owner_rig.parts_owner.objects_in_use, len(self.owner_rig.administration.objects)

    @contextlib.asynccontextmanager
    async def guest(self, number: int, ram: GuestRam | None = None) -> AsyncIterator[Place]:
        """A guest on device `number`, from 0; its driver is not started.  Its memory is `ram`, or
        its own."""
        member = self.members[number]
        with contextlib.ExitStack() as stack:
            ram = ram or stack.enter_context(GuestRam(RAM_SIZE))
            async with served(self.devices[number], memory=ram) as client:
                await ram.map(client)
                pci = await VirtioPci.open(client)
                stack.callback(pci.close)
                yield Place(member, client, ram, NetDriver(pci, ram))

    def hold_command(self, number: int) -> tuple[trio.Event, trio.Event]:
        """Hold the `number`th command from now on: it has been sent; let it go on."""
        queue = self.owner_rig.queue
        reached, goes_on = trio.Event(), trio.Event()
        execute, left = queue.execute, number

        async def hold(readable: bytes, writable: int) -> bytes:
            nonlocal left
            left -= 1
            if not left:
                reached.set()
                await goes_on.wait()
            return await execute(readable, writable)

        queue.execute = hold  # type: ignore[method-assign]  # in front of the real one
        return reached, goes_on

    def do_not_hold(self) -> None:
        vars(self.owner_rig.queue).pop("execute", None)

    def fail(self, number: int) -> None:
        """Let the owner fail its `number`th command from now on."""
        self.owner_rig.queue.fail_command(number)

    def do_not_fail(self) -> None:
        def pass_all(_: Command) -> Answer | None:
            return None

        self.owner_rig.queue.fault = pass_all


@contextlib.asynccontextmanager
async def served_rig(members: int = 3, *, objects: int = 255) -> AsyncIterator[ServedRig]:
    """A rig whose owner runs and has been asked what it can do."""
    made = ServedRig(members, objects=objects)
    async with ungrouped_nursery() as nursery:
        nursery.start_soon(made.owner_rig.owner.run)
        await made.owner_rig.discover()
        yield made
        nursery.cancel_scope.cancel()


def holdings() -> tuple[int, int]:
    """Fds of this process, and its mappings of guest memory."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().count("memfd")
    return len(os.listdir("/proc/self/fd")), maps

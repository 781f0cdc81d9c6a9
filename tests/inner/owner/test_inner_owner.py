"""The owner over kernel VFIO: every command through a real virtqueue in memory that an IOMMU maps.

Functions, in their order: member 1 of the first owner, its PF, member 1 of the second, its PF; then
members 2 and 3 of the first, which are for `test_inner_move`.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import pytest
import trio

from vfio_user_virtio import limits
from vfio_user_virtio.backends.vfio import binding, sysfs
from vfio_user_virtio.backends.vfio.opening import OpenOptions, Way, open_function
from vfio_user_virtio.backends.vfio.owner import destroy_stale_objects
from vfio_user_virtio.backends.vfio.owner_access import KernelAccess
from vfio_user_virtio.backends.vfio.owner_opening import owned_function
from vfio_user_virtio.backends.vfio.owner_transport import OwnerTransport, Register
from vfio_user_virtio.backends.vfio.sysfs import PciAddress
from vfio_user_virtio.errors import HostError
from vfio_user_virtio.migration.admin_client import AdminClient, AdminError
from vfio_user_virtio.migration.member_migration import MemberMigration
from vfio_user_virtio.migration.parts_owner import PartsOwner
from vfio_user_virtio.protocol.migration import MigrationState
from vfio_user_virtio.virtio import admin_commands as commands
from vfio_user_virtio.virtio.admin import STATUS_SIZE, GroupType, encode_command
from vfio_user_virtio.virtio.admin_commands import MetadataKind, ObjectKind
from vfio_user_virtio.virtio.common_config import Status
from vfio_user_virtio.virtio.features import Feature, feature_names, mask_of
from vfio_user_virtio.virtio.parts import parse_parts_untrusted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.inner.conftest import InnerFacts
    from vfio_user_virtio.backends.vfio.owner import VfioOwner

VF_FEATURES: Final = mask_of((Feature.VERSION_1, Feature.ACCESS_PLATFORM))
QUERY: Final = encode_command(commands.list_query(GroupType.SR_IOV))


@attrs.frozen
class Owned:
    """A PF that is ours."""

    address: PciAddress
    owner: VfioOwner
    admin: AdminClient
    parts: PartsOwner


def function(inner: InnerFacts, index: int) -> PciAddress:
    return PciAddress.parse(inner.functions[index])


@contextlib.asynccontextmanager
async def pf(inner: InnerFacts, way: str, number: int = 0) -> AsyncIterator[Owned]:
    """The PF of owner `number`, asked what it can do."""
    address = function(inner, 2 * number + 1)
    async with owned_function(address, way=Way[way.upper()]) as owner:
        admin = AdminClient(owner)
        parts = PartsOwner(admin)
        assert (await parts.discover()).lack is None
        yield Owned(address, owner, admin, parts)


@contextlib.asynccontextmanager
async def vf(inner: InnerFacts, way: str, number: int = 0) -> AsyncIterator[OwnerTransport]:
    """The registers of the member of owner `number`."""
    address = function(inner, 2 * number)
    options = OpenOptions(way=Way[way.upper()])
    opened = await trio.to_thread.run_sync(open_function, address, options)
    try:
        transport = OwnerTransport(KernelAccess(opened), str(address))
        await transport.open()
        await transport.reset()
        yield transport
    finally:
        opened.close()


async def negotiate(registers: OwnerTransport) -> None:
    """What a driver of the member does first, so that its image has something to tell."""
    started = Status.ACKNOWLEDGE | Status.DRIVER
    await registers.write(Register.DEVICE_STATUS, started)
    for select in range(2):
        await registers.write(Register.DRIVER_FEATURE_SELECT, select)
        word = VF_FEATURES >> 32 * select & 0xFFFF_FFFF
        await registers.write(Register.DRIVER_FEATURE, word)
    await registers.write(Register.DEVICE_STATUS, started | Status.FEATURES_OK)
    await registers.write(Register.QUEUE_SELECT, 1)


async def image(made: Owned, member: int = 1) -> bytes:
    object_id = await made.parts.create(member, ObjectKind.GET)
    asked = commands.metadata_get(member, object_id, MetadataKind.SIZE)
    size = commands.decode_count_untrusted(await made.admin.execute(asked, 8))
    found = await made.admin.execute(commands.parts_get(member, object_id), size)
    await made.parts.destroy(member, object_id)
    return found


async def test_it_is_brought_up(inner: InnerFacts, way: str) -> None:
    async with pf(inner, way) as made:
        names = feature_names(made.owner.features)
        assert names == ["VERSION_1", "ACCESS_PLATFORM", "ADMIN_VQ"]
        assert made.owner.failure is None


async def test_every_command(inner: InnerFacts, way: str) -> None:
    async with vf(inner, way) as registers, pf(inner, way) as made:
        await negotiate(registers)
        run = made.admin.execute
        await run(commands.mode_set(1, stopped=True))
        get = await made.parts.create(1, ObjectKind.GET)
        set_ = await made.parts.create(1, ObjectKind.SET)
        assert (await run(commands.object_query(1, get), 8))[0] == ObjectKind.GET
        await run(commands.object_modify(1, get, ObjectKind.GET))
        size, count = [
            commands.decode_count_untrusted(await run(commands.metadata_get(1, get, kind), 8))
            for kind in (MetadataKind.SIZE, MetadataKind.COUNT)
        ]
        listed = await run(commands.metadata_get(1, get, MetadataKind.LIST), 8 + 16 * count)
        assert commands.decode_count_untrusted(listed) == count
        everything = await run(commands.parts_get(1, get), size)
        assert len(parse_parts_untrusted(everything)) == count
        selected = await run(commands.parts_get(1, get, listed[8:24]), size)
        assert parse_parts_untrusted(selected) == parse_parts_untrusted(everything)[:1]
        await run(commands.parts_set(1, set_, everything))
        await run(commands.mode_set(1, stopped=False))
        for object_id in (get, set_):
            await made.parts.destroy(1, object_id)
        with pytest.raises(AdminError, match="INVALID_MEMBER"):
            await run(commands.mode_set(9, stopped=True))


async def test_a_whole_image_goes_from_one_owner_to_another(inner: InnerFacts, way: str) -> None:
    async with (
        vf(inner, way) as here,
        vf(inner, way, 1) as there,
        pf(inner, way) as source,
        pf(inner, way, 1) as target,
    ):
        await negotiate(here)
        for made in (source, target):
            await made.admin.execute(commands.mode_set(1, stopped=True))
        moved = await image(source)
        assert parse_parts_untrusted(moved) != parse_parts_untrusted(await image(target))
        object_id = await target.parts.create(1, ObjectKind.SET)
        await target.admin.execute(commands.parts_set(1, object_id, moved))
        await target.parts.destroy(1, object_id)
        await target.admin.execute(commands.mode_set(1, stopped=False))
        assert parse_parts_untrusted(await image(target)) == parse_parts_untrusted(moved)
        for register in (Register.DEVICE_STATUS, Register.QUEUE_SELECT):
            assert await there.read(register) == await here.read(register)
        await source.admin.execute(commands.mode_set(1, stopped=False))


async def test_a_member_migrates(inner: InnerFacts, way: str) -> None:
    """By the code that does it in process, over two virtqueues."""
    async with (
        vf(inner, way) as here,
        vf(inner, way, 1) as there,
        pf(inner, way) as source,
        pf(inner, way, 1) as target,
    ):
        await negotiate(here)
        leaving, coming = (
            MemberMigration(made.parts, 1, name="vf", clock=trio.current_time)
            for made in (source, target)
        )
        await leaving.set_state(MigrationState.PRE_COPY)
        await leaving.set_state(MigrationState.STOP_COPY)
        await coming.set_state(MigrationState.RESUMING)
        while data := leaving.read(1 << 16):
            await coming.write(data)
        await coming.set_state(MigrationState.RUNNING)
        await leaving.set_state(MigrationState.RUNNING)
        assert await there.read(Register.DEVICE_STATUS) == await here.read(Register.DEVICE_STATUS)
        assert source.parts.objects_in_use == target.parts.objects_in_use == 0


async def test_many_commands_at_once(inner: InnerFacts, way: str) -> None:
    async with pf(inner, way) as made, trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(made.owner.execute, QUERY, STATUS_SIZE + 8)


async def test_nothing_of_an_earlier_owner_is_left(inner: InnerFacts, way: str) -> None:
    async with pf(inner, way) as made:
        await made.parts.create(1, ObjectKind.GET)
        assert await destroy_stale_objects(made.admin, (1,), range(4)) == 1
        await made.admin.execute(commands.object_create(1, 3, ObjectKind.GET))
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    async with pf(inner, way) as made:
        assert await destroy_stale_objects(made.admin, (1,), range(4)) == 0
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_command_that_is_given_up_harms_nobody(inner: InnerFacts, way: str) -> None:
    async with pf(inner, way) as made:
        for _ in range(3):
            with trio.move_on_after(0.000_1):
                await made.owner.execute(QUERY, STATUS_SIZE + 8)
        assert len(await made.owner.execute(QUERY, STATUS_SIZE + 8)) == 16
        assert made.owner.failure is None


async def test_a_reset_by_somebody_else_is_mended(inner: InnerFacts, way: str) -> None:
    async with pf(inner, way) as made:
        reset = Path("/sys/bus/pci/devices", str(made.address), "reset")
        await trio.to_thread.run_sync(reset.write_text, "1")
        with pytest.raises((AdminError, HostError)):
            await AdminClient(made.owner, seconds=1).execute(commands.list_query(GroupType.SELF), 8)
        with trio.fail_after(5):
            while made.owner.failure is None:  # noqa: ASYNC110 - the device tells nobody
                await trio.sleep(0.01)
        with pytest.raises(HostError, match="somebody else has reset it"):
            await made.owner.execute(QUERY, 16)
        await made.owner.recover()
        assert (await PartsOwner(made.admin).discover()).lack is None


async def test_a_command_that_is_too_long_is_refused_here(inner: InnerFacts, way: str) -> None:
    async with pf(inner, way) as made:
        with pytest.raises(AdminError) as caught:
            await made.owner.execute(bytes(limits.MAX_ADMIN_COMMAND_SIZE + 8), 8)
        assert caught.value.errno == errno.EMSGSIZE
        most = await made.owner.execute(QUERY + bytes(limits.MAX_ADMIN_COMMAND_SIZE - 24), 16)
        assert len(most) == 16


async def test_a_member_is_no_owner(inner: InnerFacts, way: str) -> None:
    with pytest.raises(HostError, match="does not offer ADMIN_VQ"):
        async with owned_function(function(inner, 0), way=Way[way.upper()]):
            pass


async def test_a_pf_that_the_host_wants_back_is_given_back(inner: InnerFacts, way: str) -> None:
    """The kernel waits in `unbind` until the device has been closed."""
    address = function(inner, 1)
    plan = binding.unbind(address, probe=False)

    async def take_back() -> None:
        await trio.to_thread.run_sync(binding.execute, plan)

    async with trio.open_nursery() as nursery, pf(inner, way) as made:
        nursery.start_soon(take_back)
        with trio.fail_after(10):
            await made.owner.lost.wait()
        with pytest.raises(HostError, match="the host wants it back"):
            await made.owner.execute(QUERY, 16)
    assert sysfs.driver(address) is None
    binding.undo(plan)
    assert sysfs.driver(address) == "vfio-pci"

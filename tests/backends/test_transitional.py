"""A member seen by a driver of before virtio 1.0: by the owner's commands, and by a BAR0."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, Final

import pytest

from tests.backends.administration_rig import a_config, ready
from vfio_user_virtio.backends.software.function import LEGACY_NOTIFY, VIRTIO_BAR
from vfio_user_virtio.backends.software.migratable import administered
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.backends.transitional import BAR0_SIZE, TransitionalDevice, transitional
from vfio_user_virtio.device import IrqAction, IrqRequest, ResetCause, VfioIrq, VfioRegion
from vfio_user_virtio.errors import ClientError, HostError
from vfio_user_virtio.virtio import admin_commands as commands
from vfio_user_virtio.virtio.admin import Opcode, Qualifier, Status
from vfio_user_virtio.virtio.admin_commands import NotifyInfo, NotifyPlace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_user_virtio.backends.software.member import Member

CONFIG: Final = VfioRegion.CONFIG
BAR0: Final = VfioRegion.BAR0
INVALID_FIELD: Final = (Status.EINVAL, Qualifier.INVALID_FIELD)


# --- the owner's commands -------------------------------------------------------------------------


def test_the_owner_reads_and_writes_a_members_legacy_registers() -> None:
    driver = ready(a_config(1), a_config(2), objects=False)
    select = commands.legacy_write(Opcode.LEGACY_COMMON_CFG_WRITE, 1, 14, b"\2\0")
    assert driver.status(select) == (Status.OK, Qualifier.OK)
    read = commands.legacy_read(Opcode.LEGACY_COMMON_CFG_READ, 1, 14)
    assert driver.result(read, 8 + 2) == b"\2\0"
    other = commands.legacy_read(Opcode.LEGACY_COMMON_CFG_READ, 2, 14)
    assert driver.result(other, 8 + 2) == b"\0\0", "the other member has its own"


@pytest.mark.parametrize(("offset", "size"), [(0, 6), (0, 1), (5, 1), (2, 3), (6, 2), (8, 2)])
def test_fields_of_the_configuration(offset: int, size: int) -> None:
    driver = ready(a_config(), objects=False)
    read = commands.legacy_read(Opcode.LEGACY_DEV_CFG_READ, 1, offset)
    assert driver.result(read, 8 + size) == driver.member().device_config()[offset:][:size]


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 0), (0, 7), (5, 2), (6, 1), (7, 2), (6, 4), (17, 1), (255, 1)]
)
def test_what_is_not_one_field_of_the_configuration_is_refused(offset: int, size: int) -> None:
    driver = ready(a_config(), objects=False)
    before = driver.member().device_config()
    read = commands.legacy_read(Opcode.LEGACY_DEV_CFG_READ, 1, offset)
    assert driver.status(read, 8 + size) == INVALID_FIELD
    write = commands.legacy_write(Opcode.LEGACY_DEV_CFG_WRITE, 1, offset, b"\2" * size)
    assert driver.status(write, 8) == INVALID_FIELD
    assert driver.member().device_config() == before


def test_a_legacy_driver_may_write_the_address_byte_by_byte_and_nothing_else() -> None:
    driver = ready(a_config(), objects=False)
    for offset, byte in enumerate(bytes.fromhex("020304050607")):
        write = commands.legacy_write(Opcode.LEGACY_DEV_CFG_WRITE, 1, offset, bytes((byte,)))
        driver.result(write)
    write = commands.legacy_write(Opcode.LEGACY_DEV_CFG_WRITE, 1, 6, b"\xff\xff")
    driver.result(write)
    assert driver.member().device_config()[:8].hex() == "0203040506070100"


def test_notifications_have_a_place_in_the_member() -> None:
    driver = ready(a_config(), objects=False)
    entries = commands.decode_notify_info_untrusted(driver.result(commands.legacy_notify_info(1)))
    assert entries == [NotifyInfo(NotifyPlace.MEMBER, VIRTIO_BAR, LEGACY_NOTIFY)]


def test_a_register_that_is_not_one_is_refused() -> None:
    driver = ready(a_config(), objects=False)
    read = commands.legacy_read(Opcode.LEGACY_COMMON_CFG_READ, 1, 20)
    assert driver.status(read, 8 + 2) == INVALID_FIELD, "the vectors are there only with MSI-X"
    assert driver.status(read, 8) == INVALID_FIELD


# --- the transitional view ------------------------------------------------------------------------


async def a_view() -> tuple[TransitionalDevice, Member]:
    owner = Owner("owner")
    member = owner.add_member(a_config())
    view = await transitional(member, (await administered(owner)).client, 1)
    return view, member


async def read(view: TransitionalDevice, offset: int, size: int, region: int = BAR0) -> int:
    return int.from_bytes(await view.region_read(region, offset, size), "little")


async def write(
    view: TransitionalDevice, offset: int, value: int, size: int, region: int = BAR0
) -> None:
    await view.region_write(region, offset, value.to_bytes(size, "little"))


@contextlib.contextmanager
def refused(number: int) -> Iterator[None]:
    with pytest.raises(ClientError) as caught:
        yield
    assert caught.value.errno == number


async def test_configuration_space_is_a_transitional_devices() -> None:
    view, member = await a_view()
    assert await read(view, 0, 4, CONFIG) == 0x1000_1AF4
    assert await read(view, 8, 1, CONFIG) == 0
    assert await read(view, 0x2C, 4, CONFIG) == 0x0001_1AF4
    whole = await view.region_read(CONFIG, 0, 0x40)
    pieces = b"".join([await view.region_read(CONFIG, at, 1) for at in range(0x40)])
    assert pieces == whole, "bytes, words and all at once agree"
    real = member.function.read(CONFIG, 0, 0x40)
    differs = [at for at in range(0x40) if whole[at] != real[at]]
    assert differs == [0x02, 0x08, 0x10, 0x2E, 0x2F]
    assert view.region_info(BAR0).size == BAR0_SIZE
    assert view.region_info(VIRTIO_BAR) == member.region_info(VIRTIO_BAR)


async def test_bar0_can_be_sized_and_placed() -> None:
    view, _ = await a_view()
    await write(view, 0x10, 0xFFFF_FFFF, 4, CONFIG)
    assert await read(view, 0x10, 4, CONFIG) == 0xFFFF_FFE1
    await write(view, 0x10, 0xC040, 4, CONFIG)
    assert await read(view, 0x10, 4, CONFIG) == 0xC041
    assert await read(view, 0x0E, 4, CONFIG) == 0xC041_0000


async def test_io_space_reads_back_as_the_client_wrote_it_until_a_reset() -> None:
    view, member = await a_view()
    await write(view, 4, 0x0107, 2, CONFIG)
    assert await read(view, 4, 2, CONFIG) & 1
    assert not member.function.read(CONFIG, 4, 2)[0] & 1
    await view.reset(ResetCause.CLIENT)
    assert not await read(view, 4, 2, CONFIG) & 1


async def test_bar0_needs_io_space() -> None:
    view, _ = await a_view()
    with refused(errno.EIO):
        await read(view, 0, 4)
    with refused(errno.EIO):
        await write(view, 16, 0, 2)


async def test_registers_configuration_and_the_split_between_them() -> None:
    view, member = await a_view()
    await write(view, 4, 1, 2, CONFIG)
    await write(view, 14, 1, 2)
    assert await read(view, 14, 2) == 1
    assert member.function.common.state.queue_select == 1
    mac = int.from_bytes(member.state.filter.mac, "little")
    assert await read(view, 20, 6) == mac, "without MSI-X"
    eventfds = (os.eventfd(0, os.EFD_NONBLOCK),)
    arm = IrqRequest(VfioIrq.MSIX, 0, 1, IrqAction.TRIGGER, eventfds=eventfds)
    await view.set_irqs(arm)
    assert await read(view, 24, 6) == mac, "with MSI-X"
    with refused(errno.EINVAL):
        await read(view, 20, 6)
    with refused(errno.EINVAL):
        await write(view, 3, 0, 2)
    await view.set_irqs(IrqRequest(VfioIrq.MSIX, 0, 1, IrqAction.TRIGGER, bools=(True,)))
    assert await read(view, 24, 6) == mac, "an injected interrupt switches nothing"
    await view.set_irqs(IrqRequest(VfioIrq.MSIX, 0, 0, IrqAction.TRIGGER))
    assert await read(view, 20, 6) == mac
    await view.release()


async def test_a_notification_costs_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    view, member = await a_view()
    await write(view, 4, 1, 2, CONFIG)
    kicked: list[int] = []
    monkeypatch.setattr(member, "kick", kicked.append)
    await write(view, 16, 1, 2)
    assert kicked == [1]
    assert await read(view, 16, 2) == 0
    with refused(errno.EINVAL):
        await write(view, 16, 1, 4)
    with refused(errno.EINVAL):
        await read(view, 16, 1)


async def test_an_owner_without_legacy_commands_says_so() -> None:
    owner = Owner("owner")
    member = owner.add_member(a_config())
    client = (await administered(owner)).client
    with pytest.raises(HostError, match="serve it without legacy"):
        await transitional(member, client, 2)
    view = await transitional(member, client, 1)
    with pytest.raises(HostError, match="BAR0 of its own"):
        await transitional(view, client, 1)

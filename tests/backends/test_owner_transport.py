"""What the owner makes of a PF whose registers say what no device should say."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.backends.owner_function_rig import Pf
from vfio_user_virtio.backends.software.function import COMMON, VIRTIO_BAR
from vfio_user_virtio.backends.vfio.owner import VfioOwner, owned
from vfio_user_virtio.backends.vfio.owner_transport import (
    Register,
    capabilities_untrusted,
    structures_untrusted,
)
from vfio_user_virtio.device import IrqFlags, IrqInfo, VfioIrq, VfioRegion
from vfio_user_virtio.errors import HostError
from vfio_user_virtio.testing.loopback import served
from vfio_user_virtio.virtio.pci_capabilities import CfgType

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import trio.testing

    from vfio_user_virtio.device import DmaMapping, IrqRequest
    from vfio_user_virtio.transport.client import Client

HEADER = bytes.fromhex("f41a4110")


class Meddler:
    """A `FunctionAccess` to a real PF that reads differently at some places.

    `common` has other values of registers, `config` other bytes by their offset, `vectors` another
    number of MSI-X vectors.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self.common: dict[Register, int] = {}
        self.config: dict[int, bytes] = {}
        self.vectors: int | None = None
        self.resets = 0
        self.written: set[int] = set()
        """Regions."""

    async def region_read(self, index: int, offset: int, count: int) -> bytes:
        data = await self.client.region_read(index, offset, count)
        if index == VfioRegion.CONFIG and offset == 0:
            for place, other in self.config.items():
                data = data[:place] + other + data[place + len(other) :]
        elif index == VIRTIO_BAR:
            for register, value in self.common.items():
                if register.value == (offset - COMMON.offset, count):
                    return value.to_bytes(count, "little")
        return data

    async def region_write(self, index: int, offset: int, data: bytes) -> None:
        self.written.add(index)
        await self.client.region_write(index, offset, data)

    async def irq_info(self, index: int) -> IrqInfo:
        if index == VfioIrq.MSIX and self.vectors is not None:
            return IrqInfo(self.vectors, IrqFlags.EVENTFD)
        return await self.client.irq_info(index)

    async def set_irqs(self, request: IrqRequest) -> None:
        await self.client.set_irqs(request)

    async def dma_map(self, mapping: DmaMapping) -> None:
        await self.client.dma_map(mapping)

    async def dma_unmap(self, iova: int, size: int) -> None:
        await self.client.dma_unmap(iova, size)

    async def reset(self) -> None:
        self.resets += 1
        self.common.clear()
        await self.client.reset()


@contextlib.asynccontextmanager
async def meddled() -> AsyncIterator[Meddler]:
    async with served(Pf().function, name="pf") as client:
        yield Meddler(client)


async def refusal(access: Meddler) -> str:
    """Why the owner does not take the PF."""
    with pytest.raises(HostError) as caught:
        async with owned(access, "0000:03:00.0"):
            pass
    assert str(caught.value).startswith("0000:03:00.0: ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("register", "value", "problem"),
    [
        (Register.ADMIN_QUEUE_NUM, 0, "offers ADMIN_VQ, but admin_queue_num is 0"),
        (Register.QUEUE_SIZE, 0, "administration virtqueue 2 has size 0"),
        (Register.QUEUE_NOTIFY_OFF, 0x1000, "queue 2 is to be notified at 0x4000, outside"),
        (Register.CONFIG_MSIX_VECTOR, 0xFFFF, "no room for vector 0 in CONFIG_MSIX_VECTOR"),
        (Register.QUEUE_MSIX_VECTOR, 0xFFFF, "no room for vector 1 in QUEUE_MSIX_VECTOR"),
        (Register.DEVICE_STATUS, 0xFF, "the device has gone"),
        (Register.DEVICE_STATUS, 0, "it refuses the features VERSION_1, ACCESS_PLATFORM"),
        (Register.DEVICE_FEATURE, 0, "does not offer VERSION_1, ADMIN_VQ"),
    ],
)
async def test_registers_that_cannot_be(register: Register, value: int, problem: str) -> None:
    async with meddled() as access:
        access.common[register] = value
        assert problem in await refusal(access)


@pytest.mark.parametrize(
    ("place", "other", "problem"),
    [
        (0, b"\xff\xff\xff\xff", "the device has gone"),
        (0, b"\x86\x80\x41\x10", "8086:1041 is no virtio device"),
        (2, b"\x00\x10", "1af4:1000 is no virtio device"),
        (0x34, b"\0", "it has no COMMON structure"),
    ],
)
async def test_configuration_space_that_cannot_be(place: int, other: bytes, problem: str) -> None:
    async with meddled() as access:
        access.config[place] = other
        assert problem in await refusal(access)
        assert access.written == set(), "it may be anything"


async def test_a_pf_with_one_vector_is_refused() -> None:
    async with meddled() as access:
        access.vectors = 1
        assert "it has 1 MSI-X vectors; an owner needs 2" in await refusal(access)


async def test_a_reset_that_does_not_end(autojump_clock: trio.testing.MockClock) -> None:
    async with meddled() as access:
        access.common[Register.DEVICE_STATUS] = 1
        assert "device_status is not 0 5 s after a reset" in await refusal(access)


async def test_a_device_that_hangs_is_reset_whole(autojump_clock: trio.testing.MockClock) -> None:
    async with meddled() as access, owned(access, "pf") as owner:
        access.common[Register.DEVICE_STATUS] = 1
        await owner.recover()
        assert access.resets == 1
        assert owner.failure is None


async def test_an_owner_that_has_not_been_started_says_so() -> None:
    async with meddled() as access:
        owner = VfioOwner(access, "pf")
        with pytest.raises(HostError, match="has not been started"):
            await owner.execute(b"x", 8)
        await owner.close()


@given(st.binary(min_size=256, max_size=256))
def test_any_capabilities(config: bytes) -> None:
    positions = capabilities_untrusted(config)
    assert len(set(positions)) == len(positions)
    for location in structures_untrusted(config, positions).values():
        assert location.bar <= 5


def test_a_list_of_capabilities_that_is_a_loop_ends() -> None:
    config = bytearray(256)
    config[0x34], config[0x41], config[0x51] = 0x40, 0x50, 0x40
    assert capabilities_untrusted(bytes(config)) == [0x40, 0x50]


def test_a_capability_at_the_end_has_no_multiplier() -> None:
    config = bytearray(256)
    config[0xF0:0xF5] = bytes((0x09, 0, 20, CfgType.NOTIFY, 4))
    found = structures_untrusted(bytes(config), [0xF0, 0xFC])
    assert found[CfgType.NOTIFY].multiplier == 0

"""Dirty tracking as a client asks for it: the DMA logging features, and the bitmap of DMA_UNMAP."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backends.dirty_rig import PAGE, bits
from tests.backends.member_rig import BROADCAST, MAC_A, frame
from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.backends.software.migratable import migratable_members
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.device import FeatureOperation, LoggingReport, LoggingStart
from vfio_user_virtio.errors import RemoteError
from vfio_user_virtio.limits import MAX_DATA_XFER_SIZE
from vfio_user_virtio.protocol.dma_logging import (
    decode_logging_report_reply_untrusted,
    encode_logging_report_request,
    encode_logging_start,
    logging_report_reply_size,
)
from vfio_user_virtio.protocol.feature import Feature
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.loopback import served
from vfio_user_virtio.testing.net_driver import NetDriver
from vfio_user_virtio.testing.virtio_pci import VirtioPci

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vfio_user_virtio.backends.software.member import Member
    from vfio_user_virtio.transport.client import Client

pytestmark = pytest.mark.usefixtures("engine")

GET, SET, PROBE = FeatureOperation.GET, FeatureOperation.SET, FeatureOperation.PROBE
RAM = 1 << 20


@attrs.frozen
class Logged:
    """A guest on a device that logs, by its client."""

    member: Member
    client: Client
    ram: GuestRam

    async def driver(self) -> NetDriver:
        """One that has its rings, and no receive buffers."""
        pci = await VirtioPci.open(self.client)
        driver = NetDriver(pci, self.ram)
        await driver.start(rx=False)
        return driver

    async def start(self, *ranges: tuple[int, int]) -> None:
        data = encode_logging_start(LoggingStart(PAGE, ranges))
        assert await self.client.feature(Feature.DMA_LOGGING_START, SET, data) == data

    async def report(self, iova: int, length: int, page_size: int, room: int = 1 << 16) -> bytes:
        asked = LoggingReport(iova, length, page_size)
        reply = await self.client.feature(
            Feature.DMA_LOGGING_REPORT, GET, encode_logging_report_request(asked), room=room
        )
        return decode_logging_report_reply_untrusted(reply, asked)


@contextlib.asynccontextmanager
async def logged() -> AsyncIterator[Logged]:
    owner = Owner("owner")
    member = owner.add_member(MemberConfig(mac=MAC_A))
    device = (await migratable_members(owner))[1]
    with GuestRam(RAM) as ram:
        async with served(device, memory=ram) as client:
            await ram.map(client)
            yield Logged(member, client, ram)


async def test_what_is_offered() -> None:
    async with logged() as one:
        for feature, operation in (
            (Feature.DMA_LOGGING_START, SET),
            (Feature.DMA_LOGGING_STOP, SET),
            (Feature.DMA_LOGGING_REPORT, GET),
        ):
            await one.client.feature(feature, PROBE | operation)


async def test_a_ring_that_is_written() -> None:
    """Read and cleared, and found again when it is written again."""
    async with logged() as one:
        driver = await one.driver()
        used = driver.queue(1).ring.device
        await one.start()
        iova, pages = one.ram.iova, RAM // PAGE
        assert not any(await one.report(iova, RAM, PAGE))
        for _ in range(3):
            await driver.send(frame(BROADCAST, MAC_A))
            await driver.flush()
            bitmap = await one.report(iova, RAM, PAGE)
            assert len(bitmap) == pages // 8
            assert (used - iova) // PAGE in bits(bitmap)
            assert not any(await one.report(iova, RAM, PAGE))
        await one.client.feature(Feature.DMA_LOGGING_STOP, SET)
        with pytest.raises(RemoteError) as refused:
            await one.report(iova, RAM, PAGE)
        assert refused.value.errno == errno.EINVAL
        await one.start()
        assert not any(await one.report(iova, RAM, PAGE))
        with pytest.raises(RemoteError) as refused:
            await one.start()
        assert refused.value.errno == errno.EINVAL


async def test_a_client_without_room_for_the_report_has_not_had_it() -> None:
    """It asks again with the room that is needed, and what is dirty must still be there."""
    async with logged() as one:
        driver = await one.driver()
        await one.start()
        await driver.send(frame(BROADCAST, MAC_A))
        await driver.flush()
        for room in (0, 24, 24 + RAM // PAGE // 8 - 1):
            assert any(await one.report(one.ram.iova, RAM, PAGE, room=room))
            await driver.send(frame(BROADCAST, MAC_A))
            await driver.flush()


async def test_a_bitmap_of_all_that_a_message_may_carry() -> None:
    """Its heads come on top of max_data_xfer_size; of one more bit nothing is looked at."""
    length = 8 * MAX_DATA_XFER_SIZE * PAGE
    async with logged() as one:
        driver = await one.driver()
        await one.start()
        await driver.send(frame(BROADCAST, MAC_A))
        await driver.flush()
        with pytest.raises(RemoteError) as refused:
            await one.report(0, length + PAGE, PAGE)
        assert refused.value.errno == errno.EINVAL
        bitmap = await one.report(0, length, PAGE)
        assert len(bitmap) == MAX_DATA_XFER_SIZE
        assert any(bitmap)
        await driver.send(frame(BROADCAST, MAC_A))
        await driver.flush()
        unmapped = await one.client.dma_unmap_dirty(0, length, PAGE)
        assert len(unmapped) == MAX_DATA_XFER_SIZE
        assert any(unmapped)


@given(
    written=st.lists(st.integers(0, RAM - 1), max_size=8),
    start=st.integers(0, RAM - 1),
    length=st.integers(1, RAM),
    shift=st.integers(9, 20),
)
@settings(max_examples=60, deadline=None)
async def test_any_range_and_page_size(
    written: list[int], start: int, length: int, shift: int
) -> None:
    """Bit k is set if a page that was written overlaps page k of the range; then they are clean."""
    page_size = 1 << shift
    async with logged() as one:
        await one.start()
        for offset in written:
            one.member.logging.wrote(one.ram.iova + offset, 1)
        dirty = {(one.ram.iova + offset) // PAGE for offset in written}
        first = one.ram.iova + start
        asked = LoggingReport(first, length, page_size)
        bitmap = await one.report(first, length, page_size)
        assert len(bitmap) == logging_report_reply_size(asked) - 24
        expected = set()
        for k in range(-(-length // page_size)):
            begin = first + k * page_size
            end = min(begin + page_size, first + length)
            if any(begin < (page + 1) * PAGE and page * PAGE < end for page in dirty):
                expected.add(k)
        assert bits(bitmap) == expected
        inside = {p for p in dirty if first <= p * PAGE and (p + 1) * PAGE <= first + length}
        left = await one.report(one.ram.iova, RAM, PAGE)
        assert {one.ram.iova // PAGE + bit for bit in bits(left)} == dirty - inside


# --- the bitmap of DMA_UNMAP ----------------------------------------------------------------------


async def test_unmap_tells_what_was_written() -> None:
    async with logged() as one:
        driver = await one.driver()
        used = driver.queue(1).ring.device
        await one.start()
        await driver.send(frame(BROADCAST, MAC_A))
        await driver.flush()
        bitmap = await one.client.dma_unmap_dirty(one.ram.iova, RAM, PAGE)
        assert (used - one.ram.iova) // PAGE in bits(bitmap)
        assert one.member.memory.statistics().maps == 0
        assert not any(await one.report(one.ram.iova, RAM, PAGE)), "they have been told"
        assert not any(await one.client.dma_unmap_dirty(0, 1 << 30, PAGE)), "of no mapping at all"


async def test_unmap_that_cannot_tell_unmaps_nothing() -> None:
    async with logged() as one:
        with pytest.raises(RemoteError) as refused:
            await one.client.dma_unmap_dirty(one.ram.iova, RAM, PAGE)
        assert refused.value.errno == errno.EOPNOTSUPP
        assert one.member.memory.statistics().maps == 1


async def test_unmap_that_is_refused_forgets_nothing() -> None:
    async with logged() as one:
        await one.start()
        one.member.logging.wrote(one.ram.iova, 1)
        with pytest.raises(RemoteError) as refused:
            await one.client.dma_unmap_dirty(one.ram.iova, PAGE, PAGE)
        assert refused.value.errno == errno.EINVAL, "half a mapping"
        assert bits(await one.report(one.ram.iova, RAM, PAGE)) == {0}

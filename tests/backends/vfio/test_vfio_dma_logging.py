"""What a function has written: told by an IOMMU that tracks it, or assumed."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.backends.vfio.model_kernel import ModelKernel
from tests.backends.vfio.test_vfio_function import function_of
from vfio_user_virtio.backends.vfio.iommufd_uapi import IommufdIoctl
from vfio_user_virtio.device import DmaAccess, DmaMapping, LoggingReport, LoggingStart
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.limits import PAGE_SIZE
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.loopback import served

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_user_virtio.backends.vfio.function import VfFunction

BASE = 0x4000_0000
SIZE = 1 << 20
PAGES = SIZE // PAGE_SIZE
START = LoggingStart(PAGE_SIZE)


@pytest.fixture
def tracking(model: ModelKernel) -> Iterator[VfFunction]:
    """A function behind an IOMMU that tracks."""
    model.tracks_dirty = True
    with function_of(model) as function:
        yield function


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    with GuestRam(SIZE, iova=BASE) as memory:
        yield memory


def pages(function: VfFunction, iova: int = BASE, length: int = SIZE) -> set[int]:
    """The pages from `BASE` on that a report tells."""
    bitmap = function.logging.report_logging(LoggingReport(iova, length, PAGE_SIZE))
    bits = int.from_bytes(bitmap, "little")
    first = (iova - BASE) // PAGE_SIZE
    return {first + index for index in range(bits.bit_length()) if bits >> index & 1}


async def test_writes_are_told_once(
    model: ModelKernel, tracking: VfFunction, ram: GuestRam
) -> None:
    async with served(tracking) as client:
        await ram.map(client)
        model.dma_write(BASE, b"before")
        tracking.logging.start_logging(START)
        model.dma_write(BASE + 3 * PAGE_SIZE, b"after")
        assert pages(tracking) == {3}
        assert pages(tracking) == set()
        model.dma_write(BASE + 5 * PAGE_SIZE - 1, b"two")
        assert pages(tracking, length=5 * PAGE_SIZE) == {4}
        assert pages(tracking) == {5}
        tracking.logging.stop_logging()
        assert not model.tracking


async def test_gaps_between_mappings_hide_nothing(
    model: ModelKernel, tracking: VfFunction, ram: GuestRam
) -> None:
    async with served(tracking) as client:
        tracking.logging.start_logging(START)
        for page in (1, 2, 4, 9):
            iova = BASE + page * PAGE_SIZE
            await client.dma_map(
                DmaMapping(iova, PAGE_SIZE, DmaAccess.READ | DmaAccess.WRITE, ram.fd)
            )
            model.dma_write(iova, b"x")
        await client.dma_map(DmaMapping(BASE, PAGE_SIZE, DmaAccess.READ, ram.fd))
        await client.dma_map(DmaMapping(BASE + 6 * PAGE_SIZE, PAGE_SIZE, DmaAccess.READ))
        assert pages(tracking) == {1, 2, 4, 9}


async def test_what_was_written_before_an_unmap_is_told_after_it(
    model: ModelKernel, tracking: VfFunction, ram: GuestRam
) -> None:
    async with served(tracking) as client:
        await ram.map(client, step=SIZE // 4)
        tracking.logging.start_logging(START)
        model.dma_write(BASE + 7 * PAGE_SIZE, b"x")
        model.dma_write(BASE + SIZE // 2, b"x")
        await ram.unmap(client)
        assert pages(tracking) == {7, PAGES // 2}
        assert pages(tracking) == set()


async def test_unmap_with_a_bitmap_over_the_wire(
    model: ModelKernel, tracking: VfFunction, ram: GuestRam
) -> None:
    async with served(tracking) as client:
        await ram.map(client)
        with pytest.raises(Exception, match="not supported"):
            await client.dma_unmap_dirty(BASE, SIZE, PAGE_SIZE)
        assert len(model.mappings) == 1


async def test_an_iommu_that_tracks_nothing(
    model: ModelKernel, ram: GuestRam, caplog: pytest.LogCaptureFixture
) -> None:
    """All that the device may write counts as written, each time; one message."""
    with function_of(model) as function:
        async with served(function) as client:
            half = SIZE // 2
            await client.dma_map(DmaMapping(BASE, half, DmaAccess.READ, ram.fd))
            await client.dma_map(
                DmaMapping(BASE + half, half, DmaAccess.READ | DmaAccess.WRITE, ram.fd)
            )
            function.logging.start_logging(START)
            written = set(range(PAGES // 2, PAGES))
            assert pages(function) == written
            assert pages(function) == written
            assert pages(function, BASE + half + 100, 10) != set()
            await client.dma_unmap(BASE, SIZE)
            assert pages(function) == written
            assert pages(function) == set()
    told = [r for r in caplog.records if "cannot tell which pages" in r.message]
    assert len(told) == 1


async def test_logging_is_started_and_stopped_in_turn(tracking: VfFunction) -> None:
    logging = tracking.logging
    with pytest.raises(ClientError, match="logging is off"):
        pages(tracking)
    logging.start_logging(START)
    assert logging.active
    with pytest.raises(ClientError, match="logging is on"):
        logging.start_logging(START)
    logging.stop_logging()
    logging.stop_logging()
    assert not logging.active


@pytest.mark.parametrize(
    "request_number",
    [IommufdIoctl.HWPT_SET_DIRTY_TRACKING, IommufdIoctl.HWPT_GET_DIRTY_BITMAP],
)
async def test_what_the_kernel_refuses_is_an_answer(
    model: ModelKernel, tracking: VfFunction, ram: GuestRam, request_number: IommufdIoctl
) -> None:
    async with served(tracking) as client:
        await ram.map(client)
        model.refuse[request_number] = errno.EINVAL

        def start_and_report() -> None:
            tracking.logging.start_logging(START)
            pages(tracking)

        with pytest.raises(ClientError) as caught:
            start_and_report()
        assert caught.value.errno == errno.EINVAL
        tracking.logging.stop_logging()
        model.refuse.clear()


async def test_a_session_ends_its_logging(
    model: ModelKernel, tracking: VfFunction, ram: GuestRam
) -> None:
    async with served(tracking) as client:
        await ram.map(client)
        tracking.logging.start_logging(START)
    assert model.calls[-3:] == ["RESET", "HWPT_SET_DIRTY_TRACKING", "IOAS_UNMAP"]
    assert not model.tracking
    assert not tracking.logging.active


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, SIZE - 8)),
        st.tuples(st.just("report"), st.integers(0, PAGES - 1)),
        st.tuples(st.just("remap"), st.integers(0, 3)),
    ),
    max_size=20,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(steps=STEPS, tracks=st.booleans())
async def test_no_write_is_ever_forgotten(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[tuple[str, int]],
    tracks: bool,
) -> None:
    model = ModelKernel(tmp_path_factory.mktemp("model"))
    monkeypatch.setattr("fcntl.ioctl", model.ioctl)
    model.tracks_dirty = tracks
    owed: set[int] = set()
    quarter = SIZE // 4
    with function_of(model) as function, GuestRam(SIZE, iova=BASE) as ram:
        async with served(function) as client:
            await ram.map(client, step=quarter)
            function.logging.start_logging(START)
            for step, number in steps:
                if step == "write":
                    count = min(8, quarter - number % quarter)
                    model.dma_write(BASE + number, bytes(count))
                    owed |= {number // PAGE_SIZE, (number + count - 1) // PAGE_SIZE}
                elif step == "report":
                    found = pages(function, BASE + number * PAGE_SIZE, SIZE - number * PAGE_SIZE)
                    assert {page for page in owed if page >= number} <= found
                    assert found <= owed or not tracks
                    owed = {page for page in owed if page < number}
                else:
                    await client.dma_unmap(BASE + number * quarter, quarter)
                    await client.dma_map(list(ram.mappings(step=quarter))[number])
            assert owed <= pages(function)

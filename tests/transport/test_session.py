"""Every command end to end: client, two sockets, session, a device of plain memory."""

from __future__ import annotations

import errno
import logging
import os
import select

import attrs
import pytest

from tests.transport.memory_device import (
    BAR0_SIZE,
    BAR2_FD_OFFSET,
    BAR2_SIZE,
    CONFIG_SIZE,
    READ_WRITE,
)
from tests.transport.payloads import sealed
from tests.transport.served import RawClient, client_of, open_fds, served
from vfio_user_virtio.device import (
    U64_END,
    DeviceFlags,
    DeviceInfo,
    DmaAccess,
    DmaMapping,
    FeatureOperation,
    IrqAction,
    IrqFlags,
    IrqInfo,
    IrqRequest,
    RegionFlags,
    RegionInfo,
    SparseArea,
    VfioIrq,
    VfioRegion,
)
from vfio_user_virtio.errors import RemoteError
from vfio_user_virtio.limits import MAX_VERSION_REPLY_SIZE
from vfio_user_virtio.protocol.header import HEADER_SIZE
from vfio_user_virtio.transport.client import PROPOSAL
from vfio_user_virtio.transport.session_state import SessionState

pytestmark = pytest.mark.usefixtures("engine")

BOTH = DmaAccess.READ | DmaAccess.WRITE


def is_signalled(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


async def test_version_is_negotiated_and_kept_for_a_successor(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with served() as one, client_of(one) as client:
        assert client.version.capabilities.max_msg_fds == 16
        assert client.version.capabilities.write_multiple
        assert one.session.state.version == client.version
        assert one.session.statistics().version == client.version
    assert "vfio-user 0.0, max_data_xfer_size 1048576, max_msg_fds 16" in caplog.text
    assert caplog.messages[-1] == "test: session over: the client closed the connection"


async def test_nothing_is_granted_beyond_what_was_proposed() -> None:
    proposal = attrs.evolve(PROPOSAL, max_data_xfer_size=64, write_multiple=False, max_msg_fds=3)
    async with served() as one, client_of(one, capabilities=proposal) as client:
        granted = client.version.capabilities
        assert (granted.max_data_xfer_size, granted.write_multiple) == (64, False)
        assert await client.region_read(VfioRegion.BAR0, 0, 64) == bytes(64)
        with pytest.raises(RemoteError):
            await client.region_read(VfioRegion.BAR0, 0, 65)
        fds = [os.eventfd(0) for _ in range(4)]
        request = IrqRequest(VfioIrq.MSIX, 0, 4, IrqAction.TRIGGER, tuple(fds))
        with pytest.raises(RemoteError):
            await client.set_irqs(request)
        await client.set_irqs(attrs.evolve(request, count=3, eventfds=tuple(fds[:3])))
        for fd in fds:
            os.close(fd)


async def test_the_reply_to_version_fits_the_buffer_of_qemu() -> None:
    async with served() as one:
        raw = RawClient(one)
        reply = await raw.negotiate()
        raw.endpoint.close()
    assert HEADER_SIZE + len(reply.payload) <= MAX_VERSION_REPLY_SIZE


async def test_device_info() -> None:
    async with served() as one, client_of(one) as client:
        info = await client.device_info()
    assert info == DeviceInfo(DeviceFlags.RESET | DeviceFlags.PCI, 9, 5)


async def test_region_info_without_and_with_an_fd() -> None:
    async with served() as one, client_of(one) as client:
        assert await client.region_info(VfioRegion.BAR0) == RegionInfo(BAR0_SIZE, READ_WRITE)
        assert await client.region_info(VfioRegion.ROM) == RegionInfo(0, RegionFlags(0))
        whole = await client.region_info(VfioRegion.BAR4)
        assert whole.fd is not None
        os.close(whole.fd)

        before = open_fds()
        sparse = await client.region_info(VfioRegion.BAR2)
        assert open_fds() == before + 1
        assert sparse.fd is not None
        assert sparse.fd != one.device.fd
        assert not os.get_inheritable(sparse.fd)
        os.pwrite(sparse.fd, b"mapped", sparse.fd_offset + 0x1000)
        os.close(sparse.fd)
        assert await client.region_read(VfioRegion.BAR2, 0x1000, 6) == b"mapped"
    areas = (SparseArea(0x1000, 0x1000), SparseArea(0x3000, 0x1000))
    flags = READ_WRITE | RegionFlags.MMAP
    expected = RegionInfo(BAR2_SIZE, flags, sparse.fd, BAR2_FD_OFFSET, areas)
    assert sparse == expected


async def test_region_io_fds_has_none() -> None:
    async with served() as one, client_of(one) as client:
        assert await client.region_io_fds(VfioRegion.BAR0) == ((), [])


async def test_a_register_is_written_and_read() -> None:
    async with served() as one, client_of(one) as client:
        await client.region_write(VfioRegion.BAR0, 8, b"\x01\x02\x03\x04")
        assert await client.region_read(VfioRegion.BAR0, 6, 8) == b"\0\0\x01\x02\x03\x04\0\0"
        assert await client.region_read(VfioRegion.CONFIG, 0, CONFIG_SIZE) == bytes(CONFIG_SIZE)
    assert one.device.writes == [(0, 8, b"\x01\x02\x03\x04")]


async def test_the_largest_access_goes_through_both_ways() -> None:
    data = os.urandom(1 << 20)
    async with served() as one, client_of(one) as client:
        await client.region_write(VfioRegion.BAR0, 0x1000, data)
        assert await client.region_read(VfioRegion.BAR0, 0x1000, len(data)) == data


async def test_accesses_of_nothing_are_answered_and_do_not_reach_the_device() -> None:
    async with served() as one, client_of(one) as client:
        assert await client.region_read(VfioRegion.BAR0, BAR0_SIZE, 0) == b""
        await client.region_write(VfioRegion.BAR0, 0, b"")
        assert await client.region_write_multi([(0, VfioRegion.BAR0, b"")]) == 1
    assert one.device.calls == ["release"]


async def test_write_multi_writes_in_order() -> None:
    writes = [(i * 8, VfioRegion.BAR0, bytes([i]) * (i % 8 + 1)) for i in range(200)]
    async with served() as one, client_of(one) as client:
        assert await client.region_write_multi(writes) == 200
        await client.region_write_multi([(0, VfioRegion.CONFIG, b"x")], no_reply=True)
        await client.device_info()
    assert one.device.writes == [
        *((region, offset, data) for offset, region, data in writes),
        (VfioRegion.CONFIG, 0, b"x"),
    ]


async def test_a_thousand_posted_writes_then_a_read() -> None:
    async with served() as one, client_of(one) as client:
        for number in range(1000):
            data = number.to_bytes(4, "little")
            await client.region_write(VfioRegion.BAR0, 4 * number, data, no_reply=True)
        last = await client.region_read(VfioRegion.BAR0, 4 * 999, 4)
        assert last == (999).to_bytes(4, "little")
        statistics = one.session.statistics()
    assert [offset for _, offset, _ in one.device.writes] == list(range(0, 4000, 4))
    assert 0 < one.device.works < 1000, "the device works once per batch, not per command"
    assert statistics.commands == {"VERSION": 1, "REGION_WRITE": 1000, "REGION_READ": 1}
    assert statistics.errors == 0
    assert statistics.bytes_received >= 1000 * 36
    assert statistics.bytes_sent > 0


async def test_irq_info() -> None:
    async with served() as one, client_of(one) as client:
        assert await client.irq_info(VfioIrq.MSIX) == IrqInfo(20, IrqFlags.EVENTFD)
        assert await client.irq_info(VfioIrq.REQ) == IrqInfo(0, IrqFlags(0))


async def test_eventfds_reach_the_device_and_stay_open() -> None:
    async with served() as one, client_of(one) as client:
        fds = [os.eventfd(0) for _ in range(16)]
        await client.set_irqs(IrqRequest(VfioIrq.MSIX, 4, 16, IrqAction.TRIGGER, tuple(fds)))
        (armed,) = one.device.irqs
        assert armed.eventfds is not None
        assert (armed.index, armed.start, armed.count) == (VfioIrq.MSIX, 4, 16)
        for theirs, ours in zip(fds, armed.eventfds, strict=True):
            assert not os.get_inheritable(ours)
            assert not os.get_blocking(ours), "signalling a full eventfd must not block"
            assert not is_signalled(theirs)
            os.eventfd_write(ours, 1)
            assert is_signalled(theirs)
            os.close(theirs)


@pytest.mark.parametrize(
    "request_",
    [
        IrqRequest(VfioIrq.INTX, 0, 1, IrqAction.UNMASK),
        IrqRequest(VfioIrq.INTX, 0, 1, IrqAction.MASK, bools=(True,)),
        IrqRequest(VfioIrq.MSIX, 3, 2, IrqAction.TRIGGER, bools=(True, False)),
        IrqRequest(VfioIrq.MSIX, 0, 1, IrqAction.TRIGGER, eventfds=()),
        IrqRequest(VfioIrq.INTX, 0, 0, IrqAction.TRIGGER),
        IrqRequest(VfioIrq.REQ, 0, 0, IrqAction.TRIGGER),
    ],
)
async def test_set_irqs_without_eventfds(request_: IrqRequest) -> None:
    async with served() as one, client_of(one) as client:
        await client.set_irqs(request_)
    assert one.device.irqs == [request_]


async def test_memory_is_mapped_and_unmapped() -> None:
    async with served() as one, client_of(one) as client:
        fd = sealed(0x3000)
        await client.dma_map(DmaMapping(0x10000, 0x2000, BOTH, fd, 0x1000))
        await client.dma_map(DmaMapping(U64_END - 0x1000, 0x1000, BOTH))
        view = one.device.guest.view(0x10000, 0x1000, True)
        assert view is not None
        view[:5] = b"hello"
        assert os.pread(fd, 5, 0x1000) == b"hello"
        os.close(fd)
        del view
        await client.dma_unmap(0x10000, 0x2000)
        await client.dma_unmap(0x8000_0000_0000, 0x8000_0000_0000)
        await client.dma_unmap(0, U64_END)
        assert one.device.guest.statistics().maps == 0


async def test_reset() -> None:
    async with served() as one, client_of(one) as client:
        await client.reset()
    assert one.device.calls == ["reset CLIENT", "release"]


async def test_device_features() -> None:
    get, set_, probe = FeatureOperation.GET, FeatureOperation.SET, FeatureOperation.PROBE
    async with served() as one, client_of(one) as client:
        assert await client.feature(2, set_, b"8 bytes!") == b"8 bytes!"
        assert await client.feature(2, get) == b"8 bytes!", "asked again with the argsz needed"
        assert await client.feature(2, get, room=8) == b"8 bytes!"
        assert await client.feature(1, probe | get | set_) == b""
        with pytest.raises(RemoteError) as refused:
            await client.feature(99, probe | get)
        assert refused.value.errno == errno.ENOTTY
    assert one.device.feature_data == b"8 bytes!"


async def test_migration_data() -> None:
    async with served() as one, client_of(one) as client:
        await client.migration_write(b"device ")
        await client.migration_write(b"state")
        assert await client.migration_read(7) == b"device "
        assert await client.precopy_info() == (5, 0)
        assert await client.migration_read(100) == b"state"
        assert await client.migration_read(100) == b""


async def test_an_error_of_the_device_is_answered_and_counted() -> None:
    async with served() as one, client_of(one) as client:
        with pytest.raises(RemoteError, match="REGION_READ was refused") as refused:
            await client.region_read(VfioRegion.BAR0, BAR0_SIZE, 1)
        assert refused.value.errno == errno.EINVAL
        assert one.session.statistics().errors == 1
        assert await client.region_read(VfioRegion.BAR0, BAR0_SIZE - 1, 1) == b"\0"


def test_what_a_successor_needs_is_plain_data() -> None:
    assert attrs.asdict(SessionState()) == {"version": None, "message_ids": {"next": 0}}

"""Members as a guest's driver finds them: features, frames, queue pairs and memory, through real
sessions and a real switch."""

from __future__ import annotations

import itertools
import struct

import pytest
import trio

from tests.backends.member_rig import (
    BROADCAST,
    LONG,
    MAC_A,
    MAC_B,
    MAC_C,
    VERSION_1,
    configs,
    frame,
    guests,
    nothing_comes,
    ping_pong,
    receive,
    receive_on_any,
    without,
)
from vfio_user_virtio.testing.net_driver import KNOWN_FEATURES
from vfio_user_virtio.testing.net_header import (
    F_NEEDS_CSUM,
    GSO_TCPV4,
    GSO_UDP_L4,
    NetHeader,
)
from vfio_user_virtio.testing.virtio_pci import FeaturesRefused, Register
from vfio_user_virtio.virtio.common_config import Status
from vfio_user_virtio.virtio.features import Feature, feature_names, mask_of
from vfio_user_virtio.virtio.net_config import NetStatus

pytestmark = pytest.mark.usefixtures("engine")

# --- features -----------------------------------------------------------------------------------


RING_FEATURES = [
    mask_of(chosen)
    for n in range(4)
    for chosen in itertools.combinations(
        (Feature.MRG_RXBUF, Feature.INDIRECT_DESC, Feature.EVENT_IDX), n
    )
]


@pytest.mark.parametrize("features", RING_FEATURES, ids=lambda word: "+".join(feature_names(word)))
@pytest.mark.parametrize("segment", [None, 500])
async def test_frames_with_every_kind_of_ring(features: int, segment: int | None) -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        drivers = [
            guest.driver(features=VERSION_1 | features, segment=segment, queue_size=64)
            for guest in (a, b)
        ]
        for driver in drivers:
            await driver.start()
            assert driver.features == VERSION_1 | features
        await ping_pong(drivers[0], drivers[1])
        await ping_pong(drivers[0], drivers[1], size=1514)
        for driver in drivers:
            await driver.flush()
            await driver.stop()


@pytest.mark.parametrize("bit", [bit for bit in Feature if bit is not Feature.VERSION_1])
async def test_each_feature_can_be_left_out(bit: Feature) -> None:
    async with guests(*configs(MAC_A, MAC_B, mtu=1500, queue_pairs=2)) as (a, b):
        drivers = [guest.driver(features=without(bit), max_pairs=2) for guest in (a, b)]
        for driver in drivers:
            await driver.start()
            assert not driver.has(bit)
        await ping_pong(drivers[0], drivers[1], size=1514)


async def test_what_may_not_be_negotiated_is_refused() -> None:
    async with guests(*configs(MAC_A)) as (guest,):
        offered = await guest.pci.offered()
        assert offered & VERSION_1
        for features in (
            0,
            offered & ~VERSION_1,
            offered | Feature.RING_PACKED.mask,
            offered | 1 << 127,
            offered & ~Feature.CTRL_VQ.mask,
            offered & ~Feature.GUEST_CSUM.mask,
        ):
            with pytest.raises(FeaturesRefused):
                await guest.pci.negotiate(features)
        await guest.pci.negotiate(offered)


async def test_configuration_is_what_the_member_was_made_with() -> None:
    (config,) = configs(MAC_A, mtu=9000, queue_pairs=4, speed=25_000)
    async with guests(config) as (guest,):
        driver = guest.driver()
        await driver.start()
        found = await driver.config()
        assert found.mac == MAC_A
        assert (found.mtu, found.max_virtqueue_pairs) == (9000, 4)
        assert (found.speed, found.duplex) == (25_000, 1)
        assert found.status == NetStatus.LINK_UP
        assert await guest.pci.read(Register.NUM_QUEUES) == 9
        assert await guest.pci.msix_vectors() == 10


# --- frames -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mergeable", [True, False])
@pytest.mark.parametrize("size", [14, 59, 60, 61, 1514, 2036, 2037, 9014])
async def test_frames_of_many_sizes(size: int, mergeable: bool) -> None:
    features = KNOWN_FEATURES if mergeable else without(Feature.MRG_RXBUF)
    async with guests(*configs(MAC_A, MAC_B, mtu=9000)) as (a, b):
        drivers = [
            guest.driver(features=features, rx_buffer_size=None if mergeable else 9026)
            for guest in (a, b)
        ]
        for driver in drivers:
            await driver.start()
        sent = frame(MAC_B, MAC_A, bytes(i % 251 for i in range(size)), size=size)[:size]
        await drivers[0].send(sent)
        got = await receive(drivers[1])
        assert got.data == sent
        assert got.buffers == (-(-(size + 12) // 2048) if mergeable else 1)


async def test_frames_go_where_they_belong() -> None:
    async with guests(*configs(MAC_A, MAC_B, MAC_C)) as (a, b, c):
        da, db, dc = (guest.driver() for guest in (a, b, c))
        for driver in (da, db, dc):
            await driver.start()
        await da.send(frame(BROADCAST, MAC_A, b"who has"))
        for driver in (db, dc):
            assert (await receive(driver)).data[14:21] == b"who has"
        await db.send(frame(MAC_A, MAC_B, b"I have"))
        assert (await receive(da)).data[14:20] == b"I have"
        await da.send(frame(MAC_B, MAC_A, b"thanks"))
        assert (await receive(db)).data[14:20] == b"thanks"
        assert not dc.received()


@pytest.mark.parametrize("segments", [(12,), (1,) * 30, (11, 1, 13, 5), (40, 0, 20), ()])
async def test_a_frame_may_be_cut_anywhere(segments: tuple[int, ...]) -> None:
    for indirect in (True, False):
        features = KNOWN_FEATURES if indirect else without(Feature.INDIRECT_DESC)
        async with guests(*configs(MAC_A, MAC_B)) as (a, b):
            da, db = a.driver(features=features), b.driver(features=features)
            await da.start()
            await db.start()
            sent = frame(MAC_B, MAC_A, b"in pieces", size=300)
            await da.send(sent, segments=segments)
            assert (await receive(db)).data == sent


async def test_a_burst_larger_than_the_rings_arrives_whole_and_in_order() -> None:
    async with guests(*configs(MAC_A, MAC_B, queue_size=32)) as (a, b):
        da, db = a.driver(), b.driver(rx_buffers=8)
        await da.start()
        await db.start()
        count = 500

        async def send_all() -> None:
            for number in range(count):
                await da.send(frame(MAC_B, MAC_A, struct.pack("<I", number)))
            await da.flush()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all)
            for number in range(count):
                got = await receive(db)
                assert struct.unpack_from("<I", got.data, 14) == (number,)


async def test_unfinished_frames_go_to_those_who_take_them() -> None:
    """A TSO frame between two members is never segmented, if the receiver negotiated it."""
    ip = bytes.fromhex("4500" + "0fdc" + "0000000040060000" + "0a000001" + "0a000002")
    tcp = bytes.fromhex("04d2 162e 00000001 00000000 5010 ffff 0000 0000")
    sent = MAC_B + MAC_A + b"\x08\x00" + ip + tcp + bytes(i % 255 for i in range(4000))
    header = NetHeader(F_NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16)
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        await da.send(sent, header)
        got = await receive(db)
        assert got.data == sent
        assert got.header.gso_type == GSO_TCPV4
        assert got.header.gso_size == 1448
        await db.control.set_offloads(0)
        await da.send(sent, header)
        pieces = [await receive(db) for _ in range(3)]
        assert all(piece.header.gso_type == 0 for piece in pieces)
        assert all(not piece.header.flags & F_NEEDS_CSUM for piece in pieces)
        assert b"".join(piece.data[54:] for piece in pieces) == sent[54:]
        assert await nothing_comes(db)


@pytest.mark.parametrize(
    "header",
    [
        NetHeader(gso_type=GSO_TCPV4, gso_size=1448),
        NetHeader(F_NEEDS_CSUM, 2, 0, 100, 34, 16),
        NetHeader(F_NEEDS_CSUM, GSO_TCPV4, 0, 0, 34, 16),
        NetHeader(F_NEEDS_CSUM, 0, 0, 0, 0xFFFF, 0xFFFF),
        NetHeader(0xFF, 0xFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF),
    ],
)
async def test_a_senseless_header_harms_nobody(header: NetHeader) -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver(features=VERSION_1)
        await da.start()
        await db.start()
        await da.send(frame(MAC_B, MAC_A, size=1000), header)
        await da.send(frame(MAC_B, MAC_A, b"and on"))
        with trio.fail_after(LONG):
            while (got := await db.receive()).data[14:20] != b"and on":
                assert got.header.gso_type == 0
        await da.flush()


async def test_offloads_that_were_not_negotiated_are_dropped() -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(features=VERSION_1), b.driver()
        await da.start()
        await db.start()
        await da.send(frame(MAC_B, MAC_A, size=200), NetHeader(F_NEEDS_CSUM, 0, 0, 0, 34, 16))
        await da.send(
            frame(MAC_B, MAC_A, size=2000), NetHeader(F_NEEDS_CSUM, GSO_UDP_L4, 42, 500, 34, 6)
        )
        assert await nothing_comes(db)
        await ping_pong(da, db)


@pytest.mark.parametrize("size", [0, 1, 11, 12, 25])
async def test_a_runt_is_dropped(size: int) -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        await da.send(b"", bytes(size))
        await da.flush()
        await ping_pong(da, db)


# --- several queue pairs ------------------------------------------------------------------------


async def test_each_pair_sends_and_the_answer_comes_to_the_same_pair() -> None:
    async with guests(*configs(MAC_A, MAC_B, queue_pairs=4)) as (a, b):
        da, db = a.driver(max_pairs=4), b.driver(max_pairs=4)
        await da.start()
        await db.start()
        assert da.pairs == 4
        assert da.control_index == 8

        def udp(to: bytes, sender: bytes, source: int, target: int) -> bytes:
            ends = (b"\x0a\0\0" + sender[-1:], b"\x0a\0\0" + to[-1:])
            ip = bytes.fromhex("45000030000000004011") + b"\0\0" + ends[0] + ends[1]
            ports = struct.pack(">HHHH", source, target, 28, 0)
            return to + sender + b"\x08\x00" + ip + ports + bytes(20)

        await da.send(udp(BROADCAST, MAC_A, 1, 2))  # so that the switch knows where A is
        await receive_on_any(db)
        for pair in range(4):
            await da.send(udp(MAC_B, MAC_A, 5000 + pair, 7), pair=pair)
            await receive_on_any(db)
            await db.send(udp(MAC_A, MAC_B, 7, 5000 + pair))
            await receive(da, pair)
        assert not any(da.received(pair) for pair in range(4))


async def test_the_control_queue_is_the_third_without_mq() -> None:
    async with guests(*configs(MAC_A, queue_pairs=4)) as (guest,):
        driver = guest.driver(features=without(Feature.MQ), max_pairs=4)
        await driver.start()
        assert (driver.pairs, driver.control_index) == (1, 2)
        await driver.control.set_rx_mode("promisc", True)


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("step", [None, 4096 * 3])
async def test_memory_however_it_was_given(remote: bool, step: int | None) -> None:
    async with guests(*configs(MAC_A, MAC_B), remote=remote, step=step, ram_size=1 << 22) as (a, b):
        da, db = a.driver(queue_size=32), b.driver(queue_size=32)
        await da.start()
        await db.start()
        await ping_pong(da, db, count=5)
        await ping_pong(da, db, size=9000)
        await da.control.set_rx_mode("promisc", True)
        await da.flush()
        await da.stop()
        await da.start()
        await ping_pong(da, db)


async def test_memory_that_goes_and_comes_back_under_traffic() -> None:
    async with guests(*configs(MAC_A, MAC_B)) as (a, b):
        da, db = a.driver(), b.driver()
        await da.start()
        await db.start()
        for _ in range(5):
            await ping_pong(da, db)
            await b.ram.unmap(b.client)
            await da.send(frame(MAC_B, MAC_A, b"meanwhile"))
            await b.ram.map(b.client)
            assert (await receive(db)).data[14:23] == b"meanwhile"
        assert not await b.pci.status() & Status.DEVICE_NEEDS_RESET

"""The endpoint on real socketpairs: fds, pieces, patience, and headers that are never split."""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest
import trio

from tests.transport.served import PATIENCE, message, open_fds
from vfio_user_virtio.errors import ConnectionLost
from vfio_user_virtio.limits import MAX_ANCILLARY_FDS, MIB, PARTIAL_MESSAGE_SECONDS
from vfio_user_virtio.protocol.header import HEADER, HEADER_SIZE
from vfio_user_virtio.transport.endpoint import Endpoint, close_fds

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from vfio_user_virtio.protocol.framing import Frame


class Pair:
    """An endpoint, and a plain socket at the other end."""

    def __init__(self) -> None:
        ours, self.peer = socket.socketpair()
        self.endpoint = Endpoint(ours)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        if fds:
            assert socket.send_fds(self.peer, [data], list(fds)) == len(data)
        else:
            self.peer.sendall(data)

    async def receive(self, count: int) -> list[tuple[Frame, list[int]]]:
        """`count` messages, each with the inodes of its fds."""
        found: list[tuple[Frame, list[int]]] = []
        while len(found) < count:
            with trio.fail_after(PATIENCE):
                frames = await self.endpoint.receive()
            assert frames
            found += [(frame, [inode(fd) for fd in frame.fds]) for frame in frames]
        assert len(found) == count
        return found


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


@pytest.fixture(autouse=True)
def _no_fd_is_left() -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    made = Pair()
    yield made
    made.peer.close()
    made.endpoint.close()


@pytest.fixture
def files() -> Iterator[list[int]]:
    """Files to send, with different inodes."""
    fds = [os.memfd_create(f"file {number}") for number in range(8)]
    yield fds
    for fd in fds:
        os.close(fd)


async def test_several_messages_in_one_read(pair: Pair) -> None:
    pair.send(b"".join(message(number, bytes(number)) for number in range(100)))
    frames = await pair.endpoint.receive()
    assert [(frame.command, len(frame.payload)) for frame in frames] == [
        (number, number) for number in range(100)
    ]
    assert pair.endpoint.bytes_received == sum(HEADER_SIZE + number for number in range(100))


async def test_fds_go_to_the_message_they_were_sent_with(pair: Pair, files: list[int]) -> None:
    """Three messages and one fd in one read: the kernel ends a read after data with fds."""
    pair.send(message(1))
    pair.send(message(2))
    pair.send(message(3), [files[0]])
    pair.send(message(4))
    pair.send(message(5), files[1:3])
    pair.send(message(6), [files[3]])
    assert [inodes for _, inodes in await pair.receive(6)] == [
        [],
        [],
        [inode(files[0])],
        [],
        [inode(files[1]), inode(files[2])],
        [inode(files[3])],
    ]


@pytest.mark.parametrize("size", [0, 1, 15, 17, 40_000, 100_000])
async def test_fds_of_a_message_that_comes_in_pieces(
    pair: Pair, files: list[int], size: int
) -> None:
    """Those of each piece, the first of which shares a read with another message."""
    large = message(2, os.urandom(size))
    pieces = [large[:7], *(large[start : start + 50_000] for start in range(7, len(large), 50_000))]
    pair.send(message(1) + pieces[0])
    for piece, fd in zip(pieces[1:], files, strict=False):
        pair.send(piece, [fd])
    (_, none), (frame, inodes) = await pair.receive(2)
    assert none == []
    assert frame.payload == large[HEADER_SIZE:]
    assert inodes == [inode(fd) for fd in files[: len(pieces) - 1]]


async def test_fds_that_nobody_claims_are_closed(pair: Pair, files: list[int]) -> None:
    before = open_fds()
    pair.send(message(1), files)
    pair.send(message(2), files * 20)
    (frame,) = await pair.endpoint.receive()
    assert len(frame.fds) == len(files)
    assert all(not os.get_inheritable(fd) for fd in frame.fds)
    kept = frame.fds.pop()
    (frame,) = await pair.endpoint.receive()
    assert open_fds() == before + 20 * len(files) + 1
    pair.endpoint.close()
    os.close(kept)
    assert open_fds() == before - 1


async def test_fds_of_a_message_that_never_completes_are_closed(
    pair: Pair, files: list[int]
) -> None:
    pair.send(message(1)[:5], files)
    pair.peer.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionLost, match="closed the connection in mid-message"):
        await pair.endpoint.receive()
    pair.endpoint.close()


async def test_more_fds_than_any_message_may_bring(pair: Pair, files: list[int]) -> None:
    pair.send(message(1, b"xyz")[:-2], [files[0]] * MAX_ANCILLARY_FDS)
    pair.send(b"x", [files[1]])
    pair.send(b"x", [files[1]])
    with pytest.raises(ConnectionLost, match="brought 254 file descriptors"):
        await pair.receive(1)
    with pytest.raises(ConnectionLost):
        await pair.endpoint.receive()


async def test_end_between_messages(pair: Pair) -> None:
    pair.send(message(1))
    pair.peer.close()
    assert len(await pair.endpoint.receive()) == 1
    assert await pair.endpoint.receive() == []
    with pytest.raises(ConnectionLost, match="peer closed"):
        await pair.endpoint.send(message(1))


async def test_peer_that_closes_without_reading_is_gone_like_any_other(pair: Pair) -> None:
    await pair.endpoint.send(message(1))
    pair.peer.close()
    assert await pair.endpoint.receive() == []


async def test_patience_is_counted_per_message(
    pair: Pair, autojump_clock: trio.testing.MockClock
) -> None:
    """A message that begins behind the end of another has its own time."""
    pair.send(message(1)[:8])
    async with trio.open_nursery() as nursery:

        async def rest() -> None:
            await trio.sleep(PARTIAL_MESSAGE_SECONDS - 1)
            pair.send(message(1)[8:] + message(2)[:8])
            await trio.sleep(PARTIAL_MESSAGE_SECONDS - 1)
            pair.send(message(2)[8:])

        nursery.start_soon(rest)
        assert [frame.command for frame, _ in await pair.receive(2)] == [1, 2]
    pair.send(message(3)[:1])
    with pytest.raises(ConnectionLost, match="not complete 10 s after its first byte"):
        await pair.endpoint.receive()


async def test_waiting_without_a_message_begun_has_no_end(
    pair: Pair, autojump_clock: trio.testing.MockClock
) -> None:
    with trio.move_on_after(3600) as hour:
        await pair.endpoint.receive()
    assert hour.cancelled_caught


def read_all(peer: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        data += peer.recv(size - len(data))
    return bytes(data)


async def test_posted_messages_leave_in_one_send(pair: Pair) -> None:
    messages = [message(number, bytes(number)) for number in range(50)]
    for one in messages:
        pair.endpoint.post(one)
    assert not pair.endpoint.full
    await pair.endpoint.flush()
    assert pair.peer.recv(1 * MIB) == b"".join(messages)
    assert pair.endpoint.bytes_sent == sum(map(len, messages))


@pytest.mark.parametrize("sndbuf", [0, 5_000])
@pytest.mark.parametrize("size", [0, 20, 1000, 4_912, 31_000, 33_000, 500_000])
async def test_a_header_is_never_split(size: int, sndbuf: int) -> None:
    """Whatever the peer reads first of a message has at least its header, also when it is slow.

    Linux cuts what is sent every 4,936 bytes if SO_SNDBUF was set to 5,000: inside the header of
    the second message, if two of 4,912 bytes and a header are sent together.
    """
    ours, peer = socket.socketpair()
    if sndbuf:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf)
    endpoint = Endpoint(ours)
    count = 60
    peer.setblocking(False)

    async def send() -> None:
        for number in range(count):
            endpoint.post(message(number, bytes(size + number % 7)))
            if endpoint.full:
                await endpoint.flush()
        await endpoint.flush()

    async def read() -> None:
        for number in range(count):
            await trio.lowlevel.wait_readable(peer)
            head = peer.recv(HEADER_SIZE)
            assert len(head) == HEADER_SIZE, f"{len(head)} bytes of header {number}"
            _, command, total, _, _ = HEADER.unpack(head)
            assert command == number
            missing = total - HEADER_SIZE
            while missing:
                await trio.lowlevel.wait_readable(peer)
                missing -= len(peer.recv(missing))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        nursery.start_soon(read)
    endpoint.close()
    peer.close()


async def test_writers_take_turns_and_messages_stay_whole(pair: Pair) -> None:
    pair.peer.setblocking(False)
    writers, rounds, size = 8, 5, 150_000
    sizes = [HEADER_SIZE + size + number for number in range(writers)]

    async def write(number: int) -> None:
        for _ in range(rounds):
            await pair.endpoint.send(message(number, bytes([number]) * (size + number)))

    data = bytearray()
    async with trio.open_nursery() as nursery:
        for number in range(writers):
            nursery.start_soon(write, number)
        while len(data) < rounds * sum(sizes):
            await trio.lowlevel.wait_readable(pair.peer)
            data += pair.peer.recv(100_000)
    seen = [0] * writers
    position = 0
    while position < len(data):
        _, number, total, _, _ = HEADER.unpack_from(data, position)
        assert total == sizes[number]
        payload = data[position + HEADER_SIZE : position + total]
        assert payload == bytes([number]) * (size + number)
        seen[number] += 1
        position += total
    assert seen == [rounds] * writers


TAILS = [0, 1, 5, 4_900, 40_000, 300_000]


@pytest.mark.parametrize("sndbuf", [0, 5_000])
async def test_messages_with_a_tail(
    sndbuf: int, files: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order with those that have none, with fds, in whatever pieces they leave."""
    ours, peer = socket.socketpair()
    if sndbuf:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf)
    endpoint, reader = Endpoint(ours), Endpoint(peer)
    monkeypatch.setattr(endpoint, "_roomy", True)  # and so the buffer as it is
    posted = []
    for number, size in enumerate(TAILS * 3):
        head = HEADER.pack(7, number, HEADER_SIZE + 3 + size, 0, 0) + b"abc"
        tail = os.urandom(size)
        endpoint.post(head, files[: number % 3], memoryview(tail))
        endpoint.post(message(number, bytes(number)))
        posted += [(b"abc" + tail, number % 3), (bytes(number), 0)]
    total = sum(HEADER_SIZE + len(payload) for payload, _ in posted)
    assert endpoint.full
    found: list[tuple[bytes, int]] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.flush)
        while len(found) < len(posted):
            found += [(frame.payload, len(frame.fds)) for frame in await reader.receive()]
    assert found == posted
    assert (endpoint.bytes_sent, reader.bytes_received) == (total, total)
    endpoint.close()
    reader.close()


async def test_bulk_makes_room_in_the_socket(pair: Pair) -> None:
    def size() -> int:
        sock = pair.endpoint._socket
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)

    before = size()
    pair.endpoint.post(message(1, bytes(100_000)))
    pair.endpoint.post(message(2), tail=bytes(1_000))
    assert size() == before
    pair.endpoint.post(message(3), tail=bytes(100_000))
    assert size() > before


async def test_cancelled_flush_is_carried_on_by_the_next(pair: Pair) -> None:
    large, small = message(1, os.urandom(1 * MIB)), message(2)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.endpoint.send, large)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    data = bytearray()
    pair.peer.setblocking(False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair.endpoint.send, small)
        while len(data) < len(large) + len(small):
            await trio.lowlevel.wait_readable(pair.peer)
            data += pair.peer.recv(1 * MIB)
    assert data == large + small


async def test_fds_out_go_with_the_first_byte_of_their_message(
    pair: Pair, files: list[int]
) -> None:
    pair.endpoint.post(message(1))
    pair.endpoint.post(message(2, bytes(10)), files[:2])
    pair.endpoint.post(message(3))
    await pair.endpoint.flush()
    first, fds, _, _ = socket.recv_fds(pair.peer, HEADER_SIZE, 8)
    assert (HEADER.unpack(first)[1], fds) == (1, [])
    second, fds, _, _ = socket.recv_fds(pair.peer, HEADER_SIZE, 8)
    assert HEADER.unpack(second)[1] == 2
    assert [inode(fd) for fd in fds] == [inode(fd) for fd in files[:2]]
    rest, more, _, _ = socket.recv_fds(pair.peer, 100, 8)
    assert (len(rest), more) == (10, []) or (len(rest), more) == (10 + HEADER_SIZE, [])
    for fd in fds:
        os.close(fd)


async def test_closing_wakes_reader_and_writer(pair: Pair) -> None:
    async def read() -> None:
        with pytest.raises(ConnectionLost, match="closed on our side"):
            await pair.endpoint.receive()

    async def write() -> None:
        with pytest.raises(ConnectionLost, match="closed on our side"):
            await pair.endpoint.send(message(1, bytes(1 * MIB)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        nursery.start_soon(write)
        await trio.testing.wait_all_tasks_blocked()
        pair.endpoint.close()
    assert pair.endpoint.closed
    with pytest.raises(ConnectionLost, match="closed on our side"):
        await pair.endpoint.receive()
    with pytest.raises(ConnectionLost, match="closed on our side"):
        await pair.endpoint.send(message(1))


async def test_reader_with_much_to_read_lets_others_run(pair: Pair) -> None:
    """A peer that keeps its socket full does not keep other tasks from running."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(100):
            pair.send(message(1, struct.pack("<Q", 1)))
            await pair.endpoint.receive()
        nursery.cancel_scope.cancel()
    assert turns >= 90


def test_closing_what_is_closed_already_is_a_bug_that_shows() -> None:
    fd = os.eventfd(0)
    close_fds([fd])
    with pytest.raises(OSError, match="Bad file descriptor"):
        close_fds([fd])

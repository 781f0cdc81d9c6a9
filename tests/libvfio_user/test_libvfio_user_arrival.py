"""What is seen of a message before the library takes it, however it comes."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Final

import pytest

from vfio_user_virtio.errors import ConnectionLost
from vfio_user_virtio.libvfio_user.arrival import Incomplete, Message, peek, prepare, refuse
from vfio_user_virtio.protocol.header import HEADER, Command, encode_command

if TYPE_CHECKING:
    from collections.abc import Iterator

WANTED: Final = frozenset({Command.DMA_MAP})
PAYLOAD: Final = bytes(range(32))
MAP: Final = encode_command(7, Command.DMA_MAP, PAYLOAD)
READ: Final = encode_command(8, Command.REGION_READ, bytes(16))


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        prepare(ours)
        yield ours, theirs


def seen(sock: socket.socket) -> Message:
    found = peek(sock, WANTED)
    assert isinstance(found, Message)
    return found


def test_nothing_then_a_part_then_all(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    assert peek(ours, WANTED) is None
    for size, byte in enumerate(MAP[:-1], 1):
        theirs.send(bytes([byte]))
        assert peek(ours, WANTED) == Incomplete(size)
    theirs.send(MAP[-1:] + READ)
    assert seen(ours).payload == PAYLOAD
    assert seen(ours).payload == PAYLOAD, "it is still there"
    assert ours.recv(len(MAP)) == MAP
    message = seen(ours)
    assert (message.command, message.size, message.payload) == (Command.REGION_READ, 32, b"")


@pytest.mark.parametrize("cut", [16, 20, len(MAP)])
def test_fds_are_copied_wherever_the_message_is_cut(
    pair: tuple[socket.socket, socket.socket], cut: int
) -> None:
    ours, theirs = pair
    read_end, write_end = os.pipe()
    socket.send_fds(theirs, [MAP[:cut]], [write_end])
    theirs.send(MAP[cut:])
    with seen(ours) as message:
        assert message.payload == PAYLOAD
        (copy,) = message.fds
        os.write(copy, b"same pipe")
    assert os.read(read_end, 9) == b"same pipe"
    _, (original,), _, _ = socket.recv_fds(ours, 16, 1)
    for fd in (read_end, write_end, original):
        os.close(fd)


def test_a_body_that_comes_later_is_waited_for_by_a_plain_read(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    theirs.send(READ[:20])
    assert seen(ours).command == Command.REGION_READ
    theirs.send(READ[20:])
    assert ours.recv(len(READ)) == READ, "in one piece, as the library reads"


def test_a_refusal_takes_the_message_away(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.send(MAP + encode_command(9, Command.DMA_MAP, PAYLOAD, no_reply=True) + READ)
    refuse(ours, seen(ours), 22)
    refuse(ours, seen(ours), 22)
    assert theirs.recv(100) == HEADER.pack(7, Command.DMA_MAP, 16, 0x21, 22)
    assert seen(ours).command == Command.REGION_READ


@pytest.mark.parametrize(
    "data",
    [
        b"",
        READ[:5],
        MAP[:-1],
        HEADER.pack(1, Command.REGION_READ, 15, 0, 0),
        HEADER.pack(1, Command.REGION_READ, 1 << 31, 0, 0),
        HEADER.pack(1, Command.REGION_READ, 32, 1, 0),
        HEADER.pack(1, Command.REGION_READ, 32, 2, 0),
    ],
)
def test_who_has_gone_or_is_out_of_step(
    pair: tuple[socket.socket, socket.socket], data: bytes
) -> None:
    ours, theirs = pair
    theirs.sendall(data)
    theirs.close()
    with pytest.raises(ConnectionLost):
        peek(ours, WANTED)

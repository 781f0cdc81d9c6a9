"""A client that means ill: bytes and messages that nobody should send, with descriptors on them.

Seeded, so that a failure can be run again.  It speaks in raw bytes, since the project's own client
would refuse to.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from pathlib import Path

HEADER: Final = struct.Struct("<HHIII")
"""message id, command, size of the whole message, flags, errno (vfio-user, Header)."""

VERSION: Final = struct.pack("<HH", 0, 0) + b'{"capabilities":{}}\0'
LAST_COMMAND: Final = 20
NO_REPLY: Final = 0x10
WORDS: Final = (0, 1, 2, 3, 4, 7, 9, 16, 20, 32, 0x21, 0x24, 4096, 1 << 31, (1 << 32) - 1)
"""Sizes, indices, flags and edges; two of them make a 64-bit number."""
SIZES: Final = (0, 3, 8, 16, 20, 24, 32, 36, 40, 56)
HUNG_UP: Final = (errno.ECONNRESET, errno.EPIPE)


def message(command: int, payload: bytes, size: int | None = None, flags: int = 0) -> bytes:
    whole = HEADER.size + len(payload) if size is None else size
    return HEADER.pack(7, command, whole, flags, 0) + payload


def any_message(chance: random.Random) -> bytes:
    """Mostly framed right, so that what is inside is reached."""
    if chance.random() < 0.01:
        return chance.randbytes(200)
    words = chance.choices(WORDS, k=14) if chance.random() < 0.9 else list(chance.randbytes(14))
    payload = struct.pack("<14I", *words)[: chance.choice(SIZES)]
    size = chance.getrandbits(32) if chance.random() < 0.01 else None
    flags = chance.getrandbits(6) if chance.random() < 0.02 else chance.choice((0, 0, NO_REPLY))
    return message(chance.randrange(LAST_COMMAND + 1), payload, size, flags)


async def attack(path: Path, seed: int, messages: int = 50) -> None:
    """One connection, until it is hung up or all is said; three of four negotiate first."""
    chance = random.Random(seed)
    descriptors = [os.memfd_create("hostile"), os.eventfd(0, os.EFD_NONBLOCK), *os.pipe()]
    sock = trio.socket.socket(socket.AF_UNIX)
    try:
        with sock, trio.move_on_after(2):
            await sock.connect(str(path))
            if seed % 4:
                await sock.send(message(1, VERSION))
            for _ in range(messages):
                fds = chance.sample(descriptors, chance.choice((0, 0, 1, 4)))
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))
                await sock.sendmsg([any_message(chance)], [rights] if fds else [])
                if chance.random() < 0.5:
                    await _take_answers(sock)
    except OSError as error:
        if error.errno not in HUNG_UP:
            raise
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


async def _take_answers(sock: trio.socket.SocketType) -> None:
    """Takes some of what the server said, if it says anything soon."""
    with trio.move_on_after(0.005):
        await sock.recv(1 << 16)

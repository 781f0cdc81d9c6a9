"""The peer of migration streams: bytes through a UNIX socket, and nothing else.

    python plain_copy.py PATH SIZE

A client that sends ``r`` is sent SIZE bytes; one that sends ``s`` or ``w`` and then SIZE bytes is
sent one byte when they have been received: into one buffer again and again (``s``), or into new
memory (``w``), which an image needs that is to be kept.  Blocking calls of at most 1 MiB, which is
what a message of vfio-user can carry.  A program of its own that imports nothing of the project.
"""

from __future__ import annotations

import socket
import sys
from typing import Final

CHUNK: Final = 1 << 20


def send(sock: socket.socket, memory: memoryview) -> None:
    for start in range(0, len(memory), CHUNK):
        sock.sendall(memory[start : start + CHUNK])


def keep(sock: socket.socket, size: int) -> None:
    memory = memoryview(bytearray(size))
    while memory:
        memory = memory[sock.recv_into(memory[:CHUNK]) :]


def drop(sock: socket.socket, size: int) -> None:
    buffer = memoryview(bytearray(CHUNK))
    while size:
        size -= sock.recv_into(buffer[: min(size, CHUNK)])


def main(path: str, size: int) -> None:
    memory = memoryview(b"x" * size)  # zeros would be one page of memory, over and over
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()
        sock, _ = listener.accept()
        with sock:
            while wish := sock.recv(1):
                if wish == b"r":
                    send(sock, memory)
                    continue
                receive = keep if wish == b"w" else drop
                receive(sock, size)
                sock.sendall(b".")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

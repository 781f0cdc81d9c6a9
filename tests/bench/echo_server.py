"""The peer of register accesses and of the process: the least that a trio server can be.

    python echo_server.py PATH

sends back whatever a client of the UNIX socket at PATH sends, by `trio.SocketStream`.  A program
of its own that imports nothing of the project, so that its start and its memory are trio's.
"""

from __future__ import annotations

import functools
import socket
import sys

import trio


async def echo(stream: trio.SocketStream) -> None:
    while data := await stream.receive_some(4096):
        await stream.send_all(data)


async def main(path: str) -> None:
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await sock.bind(path)
    sock.listen()
    listener = trio.SocketListener(sock)
    await trio.serve_listeners(echo, [listener])


if __name__ == "__main__":
    trio.run(functools.partial(main, sys.argv[1]))

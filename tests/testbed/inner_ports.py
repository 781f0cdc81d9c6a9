"""The cables of an inner host's SR-IOV functions: raw Ethernet frames, by datagram sockets.

They are QEMU's `-netdev dgram`, which needs neither root nor a network namespace.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from pathlib import Path

MAX_FRAME: Final = 65536


def port_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """The sockets of the test's end and of QEMU's end; `number` is the VF's, 0 the PF's."""
    return folder / f"port{number}.test", folder / f"port{number}.qemu"


class FramePort:
    """The test's end of a cable: whole Ethernet frames, nothing before the header."""

    def __init__(self, folder: Path, number: int) -> None:
        self._ours, self._theirs = map(str, port_paths(folder, number))
        self._socket = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_DGRAM)

    async def open(self) -> None:
        """Before QEMU starts, which wants a receiver."""
        await self._socket.bind(self._ours)

    async def send(self, frame: bytes) -> None:
        await self._socket.sendto(frame, self._theirs)

    async def receive(self) -> bytes:
        return await self._socket.recv(MAX_FRAME)

    def close(self) -> None:
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._ours)

"""Writes "newc" cpio archives, as the kernel unpacks them into its initial RAM file system.

The format is Documentation/driver-api/early-userspace/buffer-format.rst's: a header of "070701"
and thirteen 32-bit numbers in hexadecimal, the name with its NUL, the data, each padded to four
bytes.  Written here because the cpio program is not part of a minimal system and because names,
modes and device nodes need no root this way.
"""

from __future__ import annotations

import stat
from pathlib import PurePosixPath


class Archive:
    """An archive in memory; parent folders are added as they are needed."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._names: set[str] = set()

    def folder(self, name: str) -> None:
        self._parents(name)
        self._put(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, mode: int = 0o755, time: int = 0) -> None:
        """`time` is that of its last change, in seconds since 1970."""
        self._parents(name)
        self._put(name, stat.S_IFREG | mode, data, time=time)

    def link(self, name: str, target: str) -> None:
        self._parents(name)
        self._put(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int) -> None:
        self._parents(name)
        self._put(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def finish(self) -> bytes:
        self._put("TRAILER!!!", 0)
        return bytes(self._data)

    def _parents(self, name: str) -> None:
        for parent in reversed(PurePosixPath(name).parents[:-1]):
            self._put(str(parent), stat.S_IFDIR | 0o755)

    def _put(
        self,
        name: str,
        mode: int,
        data: bytes = b"",
        device: tuple[int, int] = (0, 0),
        time: int = 0,
    ) -> None:
        if name in self._names:
            return
        self._names.add(name)
        path = name.encode() + b"\0"
        inode, owner, links, checksum = len(self._names), 0, 1, 0
        numbers = (inode, mode, owner, owner, links, time, len(data), 0, 0, *device)
        self._data += b"070701"
        self._data += b"".join(b"%08X" % number for number in (*numbers, len(path), checksum))
        for piece in (path, data):
            self._data += piece
            self._data += b"\0" * (-len(self._data) % 4)

"""Payloads as the specification lays them out, without the library; and memory to map."""

from __future__ import annotations

import fcntl
import os
import struct


def dma_map(iova: int, size: int, *, argsz: int = 32, flags: int = 3, offset: int = 0) -> bytes:
    return struct.pack("<IIQQQ", argsz, flags, offset, iova, size)


def dma_unmap(iova: int, size: int, *, argsz: int = 24, flags: int = 0) -> bytes:
    return struct.pack("<IIQQ", argsz, flags, iova, size)


def set_irqs(flags: int, index: int, start: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IIIII", 20 + len(data), flags, index, start, count) + data


def access(offset: int, region: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<QII", offset, region, count) + data


def sealed(size: int = 0x2000) -> int:
    fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd

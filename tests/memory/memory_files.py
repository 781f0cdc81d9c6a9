"""Real files for the tests of guest memory: memfds, with the seals QEMU puts on them."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

PAGE = 4096
QEMU_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def memfd(pages: int, *, seals: int = QEMU_SEALS, stamp: bool = False) -> int:
    """A memfd; with `stamp`, each page begins with its number, as 8 bytes."""
    fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, pages * PAGE)
    if stamp:
        for page in range(pages):
            os.pwrite(fd, page.to_bytes(8, "little"), page * PAGE)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def reopened(fd: int, flags: int) -> int:
    """Another open file description of the same file."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


def open_fds() -> int:
    """How many fds this process has."""
    return len(os.listdir("/proc/self/fd"))


def guest_mappings() -> int:
    """How many kernel mappings of guest memory this process has."""
    return Path("/proc/self/maps").read_text().count("/memfd:guest-ram")

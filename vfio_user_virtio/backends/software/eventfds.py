"""Signalling eventfds that a hostile client shares."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import Final

from vfio_user_virtio.errors import ClientError

_LINK: Final = "anon_inode:[eventfd]"
_ONE: Final = (1).to_bytes(8, "little")


def check_eventfd_untrusted(fd: int) -> None:
    """Raise ClientError (EINVAL) unless `fd` is an eventfd; make it non-blocking."""
    try:
        link = os.readlink(f"/proc/self/fd/{fd}")
    except OSError as error:
        link = os.strerror(error.errno or 0)
    if link != _LINK:
        raise ClientError(errno.EINVAL, f"an interrupt needs an eventfd, this fd is {link!r}")
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_NONBLOCK)


def signal_eventfd(eventfd: int) -> bool:
    """Add 1 to the counter; False if that is full."""
    try:
        os.write(eventfd, _ONE)
    except BlockingIOError:
        return False
    return True

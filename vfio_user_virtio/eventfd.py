"""Whether an fd is an eventfd, for all that take them from a client.

A session refuses what is none before a device sees it; a device asks again, because another engine
than ours may hand it the fds.  How an eventfd is signalled without waiting for its hostile owner is
the device's business (`vfio_user_virtio.backends.software.eventfds`).
"""

from __future__ import annotations

import errno
import os
from typing import Final

from vfio_user_virtio.errors import ClientError

_LINK: Final = "anon_inode:[eventfd]"


def check_eventfd_untrusted(fd: int) -> None:
    """Raise ClientError (EINVAL) unless `fd` is an eventfd; make it non-blocking."""
    try:
        link = os.readlink(f"/proc/self/fd/{fd}")
    except OSError as error:
        link = os.strerror(error.errno or 0)
    if link != _LINK:
        raise ClientError(errno.EINVAL, f"an interrupt needs an eventfd, this fd is {link!r}")
    os.set_blocking(fd, False)

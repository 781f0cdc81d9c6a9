"""Is what a client calls its memory a file that the kernel can pin without harm to us?

Only shared memory is (memfd, tmpfs, hugetlbfs): pinning a page of a file on a disk, or on a file
system that is a process of somebody's (FUSE), may wait as long as that somebody likes.  Unlike the
software device, no byte of it is ever touched by this process, so it need not be sealed against
shrinking: pages that are pinned stay, whatever becomes of the file.

Seals are asked for first, because even `fstat` may wait for ever on a file that is not ours.

Source: fcntl(2), F_GET_SEALS; Linux, drivers/iommu/iommufd/pages.c (memfd_pin_folios).
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING, Final

from vfio_user_virtio import limits
from vfio_user_virtio.device import DmaAccess
from vfio_user_virtio.errors import ClientError

if TYPE_CHECKING:
    from vfio_user_virtio.device import DmaMapping

_F_SEAL_FUTURE_WRITE: Final = 0x10  # not in Python's fcntl
_READ_ONLY: Final = fcntl.F_SEAL_WRITE | _F_SEAL_FUTURE_WRITE
_REMEDY: Final = "start the guest with memory-backend-memfd,share=on"


def check_memory_file_untrusted(fd: int, mapping: DmaMapping) -> None:
    """Raises ClientError: EINVAL for what is no shared memory, or a range outside of it; EACCES
    if `fd` is not open for what `mapping` allows the device."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        size = os.fstat(fd).st_size
    except OSError as error:
        raise ClientError(
            errno.EINVAL,
            f"DMA_MAP: fd {fd} is not shared memory (memfd, tmpfs or hugetlbfs): "
            f"{error.strerror}; {_REMEDY}",
        ) from error
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    if mode != os.O_RDWR and (mode != os.O_RDONLY or mapping.access & DmaAccess.WRITE):
        raise ClientError(
            errno.EACCES,
            f"DMA_MAP: fd {fd} is open with mode {mode}, but {mapping.access!r} is asked; "
            "pass one that is open for reading and writing",
        )
    if seals & _READ_ONLY and mapping.access & DmaAccess.WRITE:  # iommufd does not look at that
        raise ClientError(
            errno.EPERM,
            f"DMA_MAP: fd {fd} is sealed against writing (F_SEAL_WRITE); map it for reading only",
        )
    if mapping.offset < 0 or mapping.offset % limits.PAGE_SIZE:
        raise ClientError(
            errno.EINVAL,
            f"DMA_MAP: offset {mapping.offset:#x} of the file is not a multiple of "
            f"{limits.PAGE_SIZE}",
        )
    if mapping.offset + mapping.size > size:
        raise ClientError(
            errno.EINVAL,
            f"DMA_MAP: offset {mapping.offset:#x} + size {mapping.size:#x} is past the end of the "
            f"file, which has {size:#x} bytes; map no more than the file holds",
        )

"""How large a dirty bitmap is, before anybody makes one.

Source: vfio-user, VFIO_USER_DEVICE_FEATURE, DMA logging report.  Bit k of the little-endian u64
words stands for the page at iova + k * page_size; bits past the end are 0.  (The printed formula
shifts by the address modulo 64, which makes sense for a page index only.)

The bitmap is the data of its message, so it may have all of MAX_DATA_XFER_SIZE; what stands before
it (32 bytes of a feature's reply, 40 of DMA_UNMAP's) comes on top, as with every other message.
"""

from __future__ import annotations

from vfio_user_virtio.limits import MAX_DATA_XFER_SIZE
from vfio_user_virtio.protocol.checks import refuse


def bitmap_size_untrusted(length: int, page_size: int, name: str) -> int:
    """Bytes of the bitmap for `length` bytes of memory.

    Raises ClientError(EINVAL) for a page size that is no power of two, and for a bitmap that does
    not fit a message (`limits.MAX_DATA_XFER_SIZE`: 32 GiB of memory in pages of 4 KiB).
    """
    if page_size <= 0 or page_size & (page_size - 1):
        raise refuse(f"{name} has page size {page_size}, which is no power of two")
    pages = -(-length // page_size)
    size = 8 * -(-pages // 64)
    if size > MAX_DATA_XFER_SIZE:
        raise refuse(
            f"{name} of {length:#x} bytes has a bitmap of {size} bytes, at most "
            f"{MAX_DATA_XFER_SIZE}; ask for less memory at once"
        )
    return size

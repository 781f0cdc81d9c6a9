"""Have QEMU send pages again that were written behind its back.

It sends what it knows to be written, and it knows of what is written through it: so a byte of each
page is, to the value that it has.  That is safe while nobody else writes, neither guest nor device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from vfio_user_virtio.limits import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vfio_user_virtio.control.records import Range
    from vfio_user_virtio_server.vm.qtest import Qtest

MARKED_AT_ONCE: Final = 1024
"""Pages between two looks whether the caller has been cancelled."""


async def mark_written(qtest: Qtest, written: Iterable[Range]) -> int:
    """Mark the pages in `written`, which are whole; how many they are.  Raises QemuError."""
    pages = [page for span in written for page in _pages(span)]
    for start in range(0, len(pages), MARKED_AT_ONCE):
        part = pages[start : start + MARKED_AT_ONCE]
        values = await qtest.ask([f"readb {page:#x}" for page in part])
        pairs = zip(part, values, strict=True)
        await qtest.run([f"writeb {page:#x} {byte:#x}" for page, byte in pairs])
        await trio.lowlevel.checkpoint()
    return len(pages)


def _pages(span: Range) -> range:
    return range(span.iova, span.iova + span.size, PAGE_SIZE)

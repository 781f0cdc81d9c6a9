"""Have QEMU send pages again that were written behind its back.

It sends what it knows to be written, and it knows of what is written through it: so a byte of each
page is, to the value that it has.  That is safe while nobody else writes, neither guest nor device.

Two pages that are neighbours take one access, to the word that has a byte of each; an access is two
commands, of 3 to 4 µs each.  Rejected: the test protocol's own commands for runs of bytes, which
want all of them in hexadecimal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from vfio_user_virtio.limits import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vfio_user_virtio.control.records import Range
    from vfio_user_virtio_server.vm.qtest import Qtest

MARKED_AT_ONCE: Final = 1024
"""Accesses between two looks whether the caller has been cancelled."""


async def mark_written(qtest: Qtest, written: Iterable[Range]) -> int:
    """Mark the pages in `written`, which are whole; how many they are.  Raises QemuError."""
    spans = list(written)
    places = [place for span in spans for place in _places(span)]
    for start in range(0, len(places), MARKED_AT_ONCE):
        part = places[start : start + MARKED_AT_ONCE]
        values = await qtest.ask([f"read{place}" for place in part])
        pairs = zip(part, values, strict=True)
        await qtest.run([f"write{place} {value:#x}" for place, value in pairs])
        await trio.lowlevel.checkpoint()
    return sum(span.size for span in spans) // PAGE_SIZE


def _places(span: Range) -> Iterator[str]:
    """Width and address of each access, as the test protocol has them."""
    end = span.iova + span.size
    for page in range(span.iova, end, 2 * PAGE_SIZE):
        border = page + PAGE_SIZE
        yield f"w {border - 1:#x}" if border < end else f"b {page:#x}"

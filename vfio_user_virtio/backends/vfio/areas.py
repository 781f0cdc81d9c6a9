"""Which parts of a region a client may map: the kernel's offer, less what has to be trapped.

The MSI-X table and its pending bits are left out, by whole pages: what a guest writes there are
addresses of its own, which mean nothing to the host, so its VMM answers for the table itself.  The
kernel would let them be mapped where the IOMMU remaps interrupts; nobody needs that.

Pure functions of numbers, so that they are tested as such.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.device import RegionFlags, SparseArea

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vfio_user_virtio.backends.vfio.uapi import KernelRegion

PAGE: Final = mmap.PAGESIZE


@attrs.frozen
class Hole:
    """`size` ≥ 1 bytes at `offset` of region `region` that must be trapped."""

    region: int
    offset: int
    size: int


def mappable_areas(region: KernelRegion, holes: Iterable[Hole]) -> tuple[SparseArea, ...]:
    """What of `region` may be mapped, in whole pages and in order; `holes` are those in it."""
    if not region.flags & RegionFlags.MMAP:
        return ()
    offered = region.areas if region.areas is not None else (SparseArea(0, region.size),)
    spans = sorted(
        (_up(area.offset), _down(min(area.offset + area.size, region.size))) for area in offered
    )
    for hole in holes:
        low, high = _down(hole.offset), _up(hole.offset + hole.size)
        spans = [
            piece
            for start, end in spans
            for piece in ((start, min(end, low)), (max(start, high), end))
        ]
    return tuple(SparseArea(start, end - start) for start, end in spans if start < end)


def _down(value: int) -> int:
    return value & -PAGE


def _up(value: int) -> int:
    return -(-value // PAGE) * PAGE

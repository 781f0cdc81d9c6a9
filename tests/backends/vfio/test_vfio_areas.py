"""What may be mapped of a region, against a map of single pages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.backends.vfio.areas import PAGE, Hole, mappable_areas
from vfio_user_virtio.backends.vfio.uapi import KernelRegion
from vfio_user_virtio.device import RegionFlags, SparseArea

MAPPABLE = RegionFlags.READ | RegionFlags.WRITE | RegionFlags.MMAP
PAGES = 16
HOLES = st.lists(
    st.builds(Hole, st.just(0), st.integers(0, PAGES * PAGE - 1), st.integers(1, 3 * PAGE)),
    max_size=3,
)
OFFERS = st.none() | st.lists(st.integers(0, PAGES - 1), unique=True, max_size=4).map(
    lambda pages: tuple(SparseArea(page * PAGE, PAGE) for page in sorted(pages))
)


@given(size=st.integers(1, PAGES * PAGE), offered=OFFERS, holes=HOLES)
def test_whole_pages_that_are_offered_and_hold_no_hole(
    size: int, offered: tuple[SparseArea, ...] | None, holes: list[Hole]
) -> None:
    areas = mappable_areas(KernelRegion(size, 0, MAPPABLE, offered), holes)
    found = [
        page
        for area in areas
        for page in range(area.offset // PAGE, (area.offset + area.size) // PAGE)
    ]
    expected = [
        page
        for page in range(PAGES)
        if (page + 1) * PAGE <= size
        and (offered is None or any(area.offset == page * PAGE for area in offered))
        and not any(
            hole.offset < (page + 1) * PAGE and page * PAGE < hole.offset + hole.size
            for hole in holes
        )
    ]
    assert found == expected
    assert all(area.size > 0 for area in areas)


def test_a_region_that_the_kernel_does_not_let_be_mapped() -> None:
    region = KernelRegion(PAGE, 0, RegionFlags.READ | RegionFlags.WRITE)
    assert mappable_areas(region, ()) == ()


def test_a_whole_region() -> None:
    assert mappable_areas(KernelRegion(4 * PAGE, 0, MAPPABLE), ()) == (SparseArea(0, 4 * PAGE),)

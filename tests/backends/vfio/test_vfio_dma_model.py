"""A client's maps and unmaps in any order, against a list of what it has mapped."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.backends.vfio.model_kernel import ModelKernel
from tests.backends.vfio.test_vfio_function import READ_WRITE, function_of
from vfio_user_virtio.backends.vfio.opening import Way
from vfio_user_virtio.device import U64_END, DmaMapping
from vfio_user_virtio.errors import RemoteError
from vfio_user_virtio.limits import PAGE_SIZE
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.loopback import served

if TYPE_CHECKING:
    import pytest

    from vfio_user_virtio.transport.client import Client

PAGES = 16
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["map", "map", "map without a file", "unmap", "unmap everything"]),
        st.integers(0, PAGES - 1),
        st.integers(1, 6),
    ),
    max_size=25,
)


async def errno_of(step: str, client: Client, ram: GuestRam, first: int, count: int) -> int:
    """Do it; 0 or the errno that it was answered with."""
    iova, size = first * PAGE_SIZE, count * PAGE_SIZE
    try:
        if step == "map":
            await client.dma_map(DmaMapping(iova, size, READ_WRITE, ram.fd, first * PAGE_SIZE))
        elif step == "map without a file":
            await client.dma_map(DmaMapping(iova, size, READ_WRITE))
        elif step == "unmap":
            await client.dma_unmap(iova, size)
        else:
            await client.dma_unmap(0, U64_END)
    except RemoteError as error:
        return error.errno
    return 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(steps=STEPS, way=st.sampled_from([Way.CDEV, Way.GROUP]), maps_files=st.booleans())
@example(steps=[("map without a file", 0, 1), ("unmap", 0, 1)], way=Way.CDEV, maps_files=True)
@example(
    steps=[("map", 0, 1), ("map without a file", 1, 1), ("map", 3, 1), ("unmap everything", 0, 1)],
    way=Way.CDEV,
    maps_files=True,
)
async def test_the_kernel_has_what_the_client_has_mapped(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[tuple[str, int, int]],
    way: Way,
    maps_files: bool,
) -> None:
    model = ModelKernel(tmp_path_factory.mktemp("model"))
    monkeypatch.setattr("fcntl.ioctl", model.ioctl)
    model.maps_files = maps_files
    mapped: dict[tuple[int, int], bool] = {}
    with function_of(model, way) as function, GuestRam(2 * PAGES * PAGE_SIZE) as ram:
        async with served(function) as client:
            for step, first, count in steps:
                end = first + count
                touched = [(a, b) for a, b in mapped if a < end and first < b]
                expected = 0
                if step.startswith("map"):
                    expected = errno.EEXIST if touched else 0
                elif step == "unmap" and any(a < first or b > end for a, b in touched):
                    expected = errno.EINVAL
                assert await errno_of(step, client, ram, first, count) == expected
                if not expected:
                    if step.startswith("map"):
                        mapped[first, end] = step == "map"
                    for gone in touched if step == "unmap" else ():
                        del mapped[gone]
                    if step == "unmap everything":
                        mapped.clear()
                pinned = {
                    a * PAGE_SIZE: (b - a) * PAGE_SIZE for (a, b), file in mapped.items() if file
                }
                assert {iova: one.size for iova, one in model.mappings.items()} == pinned
                assert function.memory.pinned_bytes == sum(pinned.values())
                for iova in pinned:
                    model.dma_write(iova, iova.to_bytes(8, "little"))
                    assert ram.view(ram.iova + iova, 8) == iova.to_bytes(8, "little")

"""A client's memory beside a physical function, over the model kernel: seen only if it may be."""

from __future__ import annotations

import contextlib
import gc
import os
from typing import TYPE_CHECKING

import pytest

from vfio_user_virtio.backends.vfio.function import VfFunction
from vfio_user_virtio.backends.vfio.opening import OpenOptions, Way
from vfio_user_virtio.control.device_control import Caller, DeviceControl
from vfio_user_virtio.control.interface import CONTROL
from vfio_user_virtio.control.service import ControlService
from vfio_user_virtio.control.varlink import Call, VarlinkError
from vfio_user_virtio.device import DmaAccess, DmaMapping
from vfio_user_virtio.errors import RemoteError
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.loopback import served

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.backends.vfio.model_kernel import ModelKernel
    from vfio_user_virtio.control.varlink import Json, Object

IOVA = 0x4000_0000


@contextlib.contextmanager
def function_of(
    model: ModelKernel, *, way: Way = Way.CDEV, sees_memory: bool = True
) -> Iterator[VfFunction]:
    """The function, opened; in the end no descriptor is left."""
    before = len(os.listdir("/proc/self/fd"))
    function = VfFunction(model.open(OpenOptions(way=way)), sees_memory=sees_memory)
    try:
        yield function
    finally:
        function.close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


async def ask(function: VfFunction, method: str, **parameters: Json) -> Object:
    async def emit(parameters: Object) -> None:
        raise AssertionError(parameters)

    device = DeviceControl("vf", function, kind="physical", identity="0000:01:00.1")
    call = Call(f"{CONTROL.name}.{method}", {"device": "vf", **parameters})
    return await ControlService([device]).answer_untrusted(call, Caller(), emit)


@pytest.mark.parametrize("way", [Way.CDEV, Way.GROUP])
async def test_memory_is_seen_as_the_device_sees_it(model: ModelKernel, way: Way) -> None:
    with function_of(model, way=way) as function, GuestRam(1 << 20, iova=IOVA) as ram:
        async with served(function, memory=ram) as client:
            await ram.map(client)
            access = function.operator.guest_access
            assert access is not None
            model.dma_write(IOVA + 5000, b"from the device")
            assert await access.read(IOVA + 5000, 15) == b"from the device"
            await access.write(IOVA + 70_000, b"from the operator")
            assert bytes(ram.view(IOVA + 70_000, 17)) == b"from the operator"
            (one,) = access.mappings()
            assert (one.iova, one.size, one.file) == (IOVA, 1 << 20, True)
            assert function.operator.counters() == {
                "memory": {"mappings": 1, "pinned_bytes": 1 << 20}
            }
            await client.dma_unmap(IOVA, 1 << 20)
            assert access.mappings() == []
            await ram.map(client, remote=True)
            assert await access.read(IOVA + 5000, 15) == b"from the device"
        assert function.operator.guest_access is None


async def test_it_is_not_seen_unless_somebody_asked(model: ModelKernel) -> None:
    with function_of(model, sees_memory=False) as function, GuestRam(1 << 20, iova=IOVA) as ram:
        async with served(function) as client:
            await ram.map(client)
            assert function.operator.guest_access is None
            with pytest.raises(VarlinkError, match="NotSupported"):
                await ask(function, "ReadMemory", ranges=[{"iova": IOVA, "size": 1}])


async def test_files_that_may_shrink_are_left_to_the_device(
    model: ModelKernel, caplog: pytest.LogCaptureFixture
) -> None:
    with function_of(model) as function, GuestRam(1 << 20, iova=IOVA, seals=0) as ram:
        async with served(function, memory=ram) as client:
            await ram.map(client, step=1 << 19)
            assert model.pinned() == 1 << 20
            access = function.operator.guest_access
            assert access is not None
            assert [one.file for one in access.mappings()] == [False, False]
    told = [one.message for one in caplog.records if "cannot be had" in one.message]
    assert len(told) == 1
    assert "not sealed against shrinking" in told[0]


async def test_what_the_kernel_refuses_is_not_seen_either(model: ModelKernel) -> None:
    with function_of(model) as function, GuestRam(1 << 20, iova=IOVA) as ram:
        async with served(function) as client:
            model.memlock = 0
            with pytest.raises(RemoteError):
                await ram.map(client)
            with pytest.raises(RemoteError):
                await client.dma_map(DmaMapping(1, 4096, DmaAccess.READ, ram.fd))
            access = function.operator.guest_access
            assert access is not None
            assert access.mappings() == []


async def test_what_it_offers(model: ModelKernel) -> None:
    with function_of(model) as function:
        control = DeviceControl("vf", function, kind="physical", identity="x")
        assert control.abilities == ["memory", "replay"]
        assert await ask(function, "Replay") == {}
        for method in ("Announce", "Quiesce"):
            with pytest.raises(VarlinkError, match="NotSupported"):
                await ask(function, method)

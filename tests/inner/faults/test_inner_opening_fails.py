"""Physical VFs that cannot be opened: each time a message that says what is wrong and what mends
it, nothing left open, and a VF that can be had once it is mended."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import struct
import uuid
from typing import TYPE_CHECKING, Final

import cffi
import pytest
import trio
import trio.testing

from tests.inner.physical_rig import config_of
from vfio_user_virtio.backends.vfio import binding, sysfs
from vfio_user_virtio.backends.vfio.opening import OpenOptions, Way, open_function
from vfio_user_virtio.backends.vfio.physical import PhysicalConfig, VfConfig, physical_functions
from vfio_user_virtio.backends.vfio.sysfs import PciAddress
from vfio_user_virtio.device import FeatureOperation
from vfio_user_virtio.errors import ClientError, HostError
from vfio_user_virtio.protocol.feature import Feature

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.inner.conftest import InnerFacts

TOKEN: Final = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")
SHARED: Final = (PciAddress(0, 9, 0, 0), PciAddress(0, 9, 0, 1))
"""Two functions of one IOMMU group."""
CAPABILITY_VERSION_3: Final = 0x2008_0522
CAP_IPC_LOCK: Final = 1 << 14
_FFI: Final = cffi.FFI()
_FFI.cdef("int capget(void *header, void *sets); int capset(void *header, void *sets);")
_LIBC: Final = _FFI.dlopen(None)
_CAPGET: Final[Callable[..., int]] = getattr(_LIBC, "capget")  # noqa: B009
_CAPSET: Final[Callable[..., int]] = getattr(_LIBC, "capset")  # noqa: B009


@contextlib.contextmanager
def planned(plan: binding.Plan) -> Iterator[None]:
    binding.execute(plan)
    try:
        yield
    finally:
        binding.undo(plan)


async def refused(config: PhysicalConfig) -> str:
    """What is said when `config` cannot be had; no descriptor is left."""
    await trio.testing.wait_all_tasks_blocked()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError) as caught:
        async with physical_functions(config):
            pass
    message = str(caught.value)
    del caught
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    return message


# --- tokens ---------------------------------------------------------------------------------------


async def test_a_token_of_a_pf_that_another_process_owns(inner: InnerFacts, way: str) -> None:
    """Of real SR-IOV, QEMU's: missing, wrong, right."""
    assert inner.pf is not None
    pf, how = PciAddress.parse(inner.pf), Way[way.upper()]
    with planned(binding.bind(pf)), contextlib.ExitStack() as stack:
        other = open_function(pf, OpenOptions(way=how, vf_token=TOKEN))
        stack.callback(other.close)
        stack.enter_context(planned(binding.vfs(pf, 1)))
        (vf,) = (VfConfig(address=found) for found in sysfs.virtual_functions(pf).values())
        stack.enter_context(planned(binding.bind(vf.address)))
        message = await refused(PhysicalConfig(vfs=(vf,), way=how))
        assert str(pf) in message
        assert "another process" in message
        assert "VF token" in message
        wrong = PhysicalConfig(vfs=(vf,), way=how, vf_token=uuid.uuid4())
        message = await refused(wrong)
        assert str(vf.address) in message
        assert "the VF token is missing or wrong" in message
        right = PhysicalConfig(vfs=(vf,), way=how, vf_token=TOKEN)
        async with physical_functions(right) as (device,):
            assert device.device_info().num_regions


async def test_a_pf_that_is_held_already(inner: InnerFacts, way: str) -> None:
    config = config_of(inner, way, "a")
    async with physical_functions(config):
        message = await refused(config)
    assert str(config.pf) in message
    assert "another process has the" in message
    async with physical_functions(config):
        pass


# --- owners ---------------------------------------------------------------------------------------


async def test_no_owner(inner: InnerFacts, best_way: str, caplog: pytest.LogCaptureFixture) -> None:
    """The VF is served, without migration, and that is told."""
    async with physical_functions(config_of(inner, best_way, "a", pf=None)) as (device,):
        with pytest.raises(ClientError, match="is not offered"):
            await device.feature(Feature.MIGRATION, FeatureOperation.GET, b"")
    assert "no owner is ours: devices cannot be migrated" in caplog.text


async def test_an_owner_that_the_kernel_has(inner: InnerFacts, best_way: str) -> None:
    config = config_of(inner, best_way, "a")
    assert config.pf is not None
    with planned(binding.unbind(config.pf, probe=False)):
        message = await refused(config)
    assert message.startswith(f"{config.pf} is bound to no driver, not to vfio-pci")
    assert f"vfio-user-virtio bind {config.pf}" in message


# --- groups ---------------------------------------------------------------------------------------


async def test_a_group_that_is_not_viable(inner: InnerFacts, way: str) -> None:
    first, second = SHARED
    assert sysfs.iommu_group(first) == sysfs.iommu_group(second)
    config = PhysicalConfig(vfs=(VfConfig(address=first),), way=Way[way.upper()])
    with planned(binding.bind(first)):
        assert sysfs.driver(second) == "virtio-pci"
        message = await refused(config)
        assert message.startswith(f"{first}: its IOMMU group ")
        assert message.endswith(f"vfio-user-virtio bind {second}")
        with planned(binding.bind(second)):
            async with physical_functions(config):
                pass


# --- locked memory --------------------------------------------------------------------------------


def drop_ipc_lock() -> None:
    """As a unit with too low a LimitMEMLOCK, and without the capability that overrides it."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
    header = bytearray(struct.pack("<Ii", CAPABILITY_VERSION_3, 0))
    sets = bytearray(24)
    assert _CAPGET(_FFI.from_buffer(header), _FFI.from_buffer(sets)) == 0
    effective, permitted, inheritable, *high = struct.unpack("<6I", sets)
    kept = (effective & ~CAP_IPC_LOCK, permitted & ~CAP_IPC_LOCK, inheritable)
    sets = bytearray(struct.pack("<6I", *kept, *high))
    assert _CAPSET(_FFI.from_buffer(header), _FFI.from_buffer(sets)) == 0


async def message_of(config: PhysicalConfig) -> str:
    try:
        async with physical_functions(config):
            return "it has been opened"
    except HostError as error:
        return str(error)


def test_an_owner_without_enough_locked_memory(inner: InnerFacts, way: str) -> None:
    """In a process of its own, since what is dropped cannot be had back."""
    config = config_of(inner, way, "a")
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        try:
            drop_ipc_lock()
            os.write(writable, trio.run(message_of, config).encode())
        finally:
            os._exit(0)
    os.close(writable)
    with open(readable) as pipe:
        message = pipe.read()
    os.waitpid(child, 0)
    assert message.startswith(f"{config.pf}: mapping 0x400000 bytes at 0x100000")
    assert "RLIMIT_MEMLOCK (1048576 bytes)" in message
    assert "LimitMEMLOCK=infinity" in message

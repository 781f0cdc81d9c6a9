"""Real SR-IOV, of QEMU's own PF: bound and unbound by our plans, its VFs enabled while it is ours.

That PF has no administration virtqueue, so that it can have VFs but not be an owner.
"""

from __future__ import annotations

import contextlib
import errno
import subprocess
import sys
import uuid
from typing import TYPE_CHECKING

import pytest
import trio

from vfio_user_virtio.backends.vfio import binding, discovery, sysfs
from vfio_user_virtio.backends.vfio.function import VfFunction
from vfio_user_virtio.backends.vfio.kernel import KernelRefusal
from vfio_user_virtio.backends.vfio.opening import OpenOptions, Way, open_function
from vfio_user_virtio.backends.vfio.owner_opening import owned_function
from vfio_user_virtio.backends.vfio.physical import (
    PhysicalConfig,
    VfConfig,
    physical_functions,
)
from vfio_user_virtio.backends.vfio.sysfs import PciAddress
from vfio_user_virtio.device import VfioRegion
from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.inner.conftest import InnerFacts

TOKEN = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")


@pytest.fixture
def pf(inner: InnerFacts) -> PciAddress:
    assert inner.pf is not None
    return PciAddress.parse(inner.pf)


@contextlib.contextmanager
def planned(plan: binding.Plan) -> Iterator[None]:
    binding.execute(plan)
    try:
        yield
    finally:
        binding.undo(plan)


def command(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "vfio_user_virtio_server", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def test_vfs_of_a_pf_that_is_ours_want_its_token(pf: PciAddress, way: str) -> None:
    how = Way[way.upper()]
    enabled = (sysfs.SYS / binding.ENABLE_SRIOV).read_text()
    with planned(binding.bind(pf)), contextlib.ExitStack() as stack:
        opened = open_function(pf, OpenOptions(way=how, vf_token=TOKEN))
        stack.callback(opened.close)
        stack.enter_context(planned(binding.vfs(pf, 2)))
        for index, address in sysfs.virtual_functions(pf).items():
            place = discovery.find_vf(address)
            assert (place.owner, place.member_id) == (pf, index + 1)
            assert place.owner_is_ours
            assert place.function.rivals == ()
            with pytest.raises(KernelRefusal) as caught:
                open_function(address, OpenOptions(way=how))
            assert caught.value.errno == errno.EACCES
            with pytest.raises(KernelRefusal) as caught:
                open_function(address, OpenOptions(way=how, vf_token=uuid.uuid4()))
            assert caught.value.errno == errno.EACCES
            open_function(address, OpenOptions(way=how, vf_token=TOKEN)).close()
    assert sysfs.driver(pf) == "virtio-pci"
    assert sysfs.virtual_functions(pf) == {}
    assert (sysfs.SYS / binding.ENABLE_SRIOV).read_text() == enabled


def test_a_pf_with_vfs_is_not_taken_from_its_driver(pf: PciAddress) -> None:
    with planned(binding.vfs(pf, 1)):
        (address,) = sysfs.virtual_functions(pf).values()
        assert sysfs.driver(address) is None, "no driver takes it by itself"
        with pytest.raises(HostError, match="--disable-vfs"):
            binding.bind(pf)
        with planned(binding.bind(pf, disable_vfs=True)):
            assert sysfs.virtual_functions(pf) == {}
        assert len(sysfs.virtual_functions(pf)) == 1
    assert sysfs.sriov(pf) == sysfs.Sriov(0, 2, True)


def test_the_command_line_binds_and_unbinds(pf: PciAddress) -> None:
    assert command("bind", pf) == f"{pf}: virtio-pci -> vfio-pci"
    assert command("bind", "--dry-run", pf) == ""
    assert command("unbind", "--no-driver", pf) == f"{pf}: vfio-pci -> no driver"
    assert command("bind", pf) == f"{pf}: no driver -> vfio-pci"
    assert command("unbind", pf) == f"{pf}: vfio-pci -> virtio-pci"


async def test_a_pf_without_an_administration_virtqueue_is_no_owner(
    pf: PciAddress, way: str
) -> None:
    plan = binding.bind(pf)
    binding.execute(plan)
    try:
        with pytest.raises(HostError, match="does not offer ADMIN_VQ"):
            async with owned_function(pf, vf_token=TOKEN, way=Way[way.upper()]):
                pass
    finally:
        binding.undo(plan)


async def test_vfs_of_a_pf_that_is_no_owner_are_served_without_migration(
    pf: PciAddress, way: str
) -> None:
    how = Way[way.upper()]
    with planned(binding.bind(pf)), planned(binding.vfs(pf, 2)):
        vfs = tuple(VfConfig(address=vf) for vf in sysfs.virtual_functions(pf).values())
        async with physical_functions(PhysicalConfig(vfs=vfs, way=how)) as devices:
            assert [type(device) for device in devices] == [VfFunction, VfFunction]
            assert await devices[0].region_read(VfioRegion.CONFIG, 0, 4) == b"\xf4\x1a\x41\x10"
        with pytest.raises(HostError, match="does not offer ADMIN_VQ"):
            async with physical_functions(PhysicalConfig(vfs=vfs, pf=pf, way=how)):
                pass


async def test_a_pf_that_is_held_for_its_token_is_given_back(pf: PciAddress, way: str) -> None:
    with planned(binding.bind(pf)), planned(binding.vfs(pf, 1)):
        (vf,) = sysfs.virtual_functions(pf).values()
        config = PhysicalConfig(vfs=(VfConfig(address=vf),), way=Way[way.upper()])
        async with physical_functions(config):
            plan = binding.unbind(pf)
            with trio.fail_after(60):  # the kernel waits for as long as somebody has it open
                await trio.to_thread.run_sync(binding.execute, plan, abandon_on_cancel=True)
            assert sysfs.driver(pf) != "vfio-pci"
            assert sysfs.virtual_functions(pf) == {}


async def test_a_pf_of_the_kernel_is_not_taken(pf: PciAddress) -> None:
    with pytest.raises(HostError, match=r"belongs to the driver virtio-pci.* bind"):
        async with owned_function(pf):
            pass

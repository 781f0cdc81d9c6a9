"""A function without an IOMMU: refused, unless for experiments, and never for a guest."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from vfio_user_virtio.backends.vfio.function import VfFunction
from vfio_user_virtio.backends.vfio.opening import OpenOptions, Way, open_function
from vfio_user_virtio.backends.vfio.sysfs import PciAddress
from vfio_user_virtio.errors import HostError, RemoteError
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.loopback import served

if TYPE_CHECKING:
    from tests.inner.conftest import InnerFacts

WAYS = json.loads(os.environ.get("INNER_HOST", '{"ways": []}'))["ways"]

if "noiommu" in WAYS:

    def test_refused_unless_allowed(inner: InnerFacts) -> None:
        for options in (OpenOptions(), *(OpenOptions(way=way) for way in Way)):
            with pytest.raises(HostError, match="all of the host's memory"):
                open_function(PciAddress.parse(inner.vfs[0]), options)

    async def test_registers_work_and_memory_does_not(inner: InnerFacts) -> None:
        address = PciAddress.parse(inner.vfs[0])
        opened = open_function(address, OpenOptions(unsafe_noiommu=True))
        assert opened.way is Way.NOIOMMU
        function = VfFunction(opened)
        async with served(function) as client:
            assert (await client.region_read(7, 0, 4)).hex() == "f41a4110"
            with GuestRam() as ram, pytest.raises(RemoteError):
                await ram.map(client)
        function.close()

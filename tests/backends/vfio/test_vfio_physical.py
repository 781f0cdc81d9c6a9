"""A PF that cannot be an owner: a warning if nobody named it, and a failure if somebody did."""

from __future__ import annotations

import logging
import uuid
from typing import TYPE_CHECKING, Final

import pytest

from tests.backends.vfio.model_kernel import ADDRESS, REGION_SHIFT
from vfio_user_virtio.backends.vfio.function import VfFunction
from vfio_user_virtio.backends.vfio.owner_transport import NotAnOwner
from vfio_user_virtio.backends.vfio.physical import (
    PhysicalConfig,
    Roots,
    VfConfig,
    physical_functions,
)
from vfio_user_virtio.backends.vfio.sysfs import PciAddress
from vfio_user_virtio.device import VfioRegion

if TYPE_CHECKING:
    from tests.backends.vfio.model_kernel import ModelKernel

VF: Final = PciAddress.parse("0000:01:00.2")
TOKEN: Final = uuid.UUID("12345678-9abc-def0-1234-56789abcdef0")
INTEL: Final = bytes.fromhex("8680ed10")
TRANSITIONAL: Final = bytes.fromhex("f41a0010")
MODERN: Final = bytes.fromhex("f41a4110")

pfs = pytest.mark.parametrize(
    ("identity", "problem"),
    [
        (INTEL, "8086:10ed is no virtio device that is not transitional"),
        (TRANSITIONAL, "1af4:1000 is no virtio device that is not transitional"),
        (MODERN, "it has no COMMON structure"),
    ],
)


@pytest.fixture
def roots(model: ModelKernel, monkeypatch: pytest.MonkeyPatch) -> Roots:
    """The model's function, as a PF whose VF has the same registers."""
    devices = model.sys / "bus/pci/devices"
    pf, vf = devices / str(ADDRESS), devices / str(VF)
    (pf / "sriov_totalvfs").write_text("1")
    (pf / "virtfn0").symlink_to(vf)
    (vf / "vfio-dev/vfio0").mkdir(parents=True)
    (vf / "physfn").symlink_to(pf)
    for name in ("driver", "iommu_group"):
        (vf / name).symlink_to((pf / name).readlink())
    model.token = str(TOKEN)
    monkeypatch.setattr(uuid, "uuid4", lambda: TOKEN)
    return Roots(model.sys, model.dev)


def identify(model: ModelKernel, identity: bytes) -> None:
    with model.node.open("r+b") as registers:
        registers.seek(VfioRegion.CONFIG << REGION_SHIFT)
        registers.write(identity)


@pfs
async def test_nobody_named_it(
    model: ModelKernel,
    roots: Roots,
    identity: bytes,
    problem: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    identify(model, identity)
    async with physical_functions(PhysicalConfig(vfs=(VfConfig(address=VF),)), roots) as devices:
        (device,) = devices
        assert isinstance(device, VfFunction), "without migration"
        assert device.name == str(VF)
    warnings = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert f"{ADDRESS}: {problem}" in warnings[0]
    assert "no owner is ours" in warnings[1]


@pfs
async def test_it_was_named(
    model: ModelKernel, roots: Roots, identity: bytes, problem: str
) -> None:
    identify(model, identity)
    config = PhysicalConfig(vfs=(VfConfig(address=VF),), pf=ADDRESS)
    with pytest.raises(NotAnOwner, match=f"{ADDRESS}: {problem}"):
        async with physical_functions(config, roots):
            pass

"""What this host's virtio-net functions lack to be served, each by itself: see `host_facts`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vfio_user_virtio.backends.vfio import sysfs
from vfio_user_virtio.backends.vfio.binding import VFIO_PCI, is_vfio
from vfio_user_virtio.backends.vfio.discovery import rivals
from vfio_user_virtio.backends.vfio.sysfs import PciAddress
from vfio_user_virtio.virtio.features import Feature
from vfio_user_virtio_server.host_facts import Fact, Roots, Verdict, access, text_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_VIRTIO: Final = 0x1AF4
_NETWORK: Final = 0x02
"""The base class of network controllers."""


def functions(roots: Roots) -> list[PciAddress]:
    """The VFs of virtio-net in this host, and their PFs."""
    found = set()
    for path in sorted((roots.sys / "bus/pci/devices").glob("*")):
        try:
            address = PciAddress.parse(path.name)
        except ValueError:
            continue
        known = sysfs.identifiers(address, roots.sys)
        if known.vendor == _VIRTIO and known.class_code >> 16 == _NETWORK:
            owner = sysfs.physical_function(address, roots.sys)
            if owner is not None or sysfs.sriov(address, roots.sys) is not None:
                found |= {address, owner or address}
    return sorted(found)


def function_facts(address: PciAddress, roots: Roots) -> Iterator[Fact]:
    """All that concerns one function.  Raises HostError if it is not there."""
    owner = sysfs.physical_function(address, roots.sys)
    if owner is None:
        yield from _pf_facts(address, roots)
    else:
        yield from _vf_facts(address, owner, roots)


def _pf_facts(address: PciAddress, roots: Roots) -> Iterator[Fact]:
    what = f"PF {address}"
    bound = sysfs.driver(address, roots.sys)
    if bound == VFIO_PCI:
        yield Fact(f"{what}, driver", Verdict.GOOD, f"{bound}: it can be owned by a daemon")
    else:
        yield Fact(
            f"{what}, driver",
            Verdict.LESS,
            f"{bound or 'none'}: its VFs can be served, but not migrated",
            f"vfio-user-virtio bind {address}",
        )
    present = sysfs.sriov(address, roots.sys)
    if present is None:
        yield Fact(
            f"{what}, VFs", Verdict.BAD, "it has no SR-IOV capability", "lspci -D shows which has"
        )
    elif present.num_vfs:
        yield Fact(f"{what}, VFs", Verdict.GOOD, f"{present.num_vfs} of {present.total_vfs}")
    else:
        path = sysfs.device_path(address, roots.sys)
        yield Fact(
            f"{what}, VFs",
            Verdict.BAD,
            f"0 of {present.total_vfs}",
            f"echo 1 > {path}/sriov_numvfs",
        )
    yield _administration(what, sysfs.device_path(address, roots.sys))


def _administration(what: str, path: Path) -> Fact:
    """Whether the PF has an administration virtqueue, as far as its driver tells."""
    what = f"{what}, administration virtqueue"
    words = [text for virtio in sorted(path.glob("virtio*")) if (text := _features(virtio))]
    if not words:
        return Fact(what, Verdict.UNKNOWN, "only a driver of virtio could tell; serve --pf asks it")
    negotiated = words[0][Feature.ADMIN_VQ : Feature.ADMIN_VQ + 1] == "1"
    if negotiated:
        return Fact(what, Verdict.GOOD, "ADMIN_VQ is negotiated; device parts are asked by serve")
    return Fact(
        what, Verdict.BAD, "no feature ADMIN_VQ: its VFs cannot be migrated", "take a newer device"
    )


def _features(virtio: Path) -> str | None:
    """One character for each feature, from bit 0 on."""
    return text_of(virtio / "features")


def _vf_facts(address: PciAddress, owner: PciAddress, roots: Roots) -> Iterator[Fact]:
    what = f"VF {address}"
    member_id = sysfs.group_member_id(address, roots.sys)
    yield Fact(f"{what}, owner", Verdict.GOOD, f"{owner}, to which it is member {member_id}")
    bound = sysfs.driver(address, roots.sys)
    if not is_vfio(bound):
        yield Fact(
            f"{what}, driver",
            Verdict.BAD,
            f"{bound or 'none'}: the host has it",
            f"vfio-user-virtio bind {address}",
        )
    else:
        yield Fact(f"{what}, driver", Verdict.GOOD, str(bound))
    group = sysfs.iommu_group(address, roots.sys)
    if group is None:
        yield Fact(f"{what}, IOMMU group", Verdict.BAD, "none", "see the line about the IOMMU")
        return
    others = rivals(address, group, roots.sys)
    if others:
        shown = ", ".join(map(str, others))
        yield Fact(
            f"{what}, IOMMU group",
            Verdict.BAD,
            f"{group}, with {shown}, whose drivers are the host's",
            f"vfio-user-virtio bind {' '.join(map(str, others))}",
        )
    else:
        yield Fact(f"{what}, IOMMU group", Verdict.GOOD, str(group))
    if is_vfio(bound):
        yield _vf_node(what, address, group, roots)


def _vf_node(what: str, address: PciAddress, group: int, roots: Roots) -> Fact:
    cdev = sysfs.vfio_cdev(address, roots.sys)
    nodes = [roots.dev / f"vfio/{group}"]
    if cdev is not None:
        nodes.insert(0, roots.dev / "vfio/devices" / cdev)
    present = [node for node in nodes if node.exists()]
    if not present:
        return Fact(f"{what}, node", Verdict.BAD, f"there is no {nodes[-1]}", "modprobe vfio-pci")
    return access(f"{what}, node", present[0], Verdict.BAD)

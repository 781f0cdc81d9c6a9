"""What an inner host is made of, as plain data, and the `Machine` that it means.

The "hardware" is QEMU's own emulated SR-IOV virtio-net device (a PF and VFs, each wired to a
datagram socket that the test holds), vfio-user functions that are served from outside, or both.
Two kernels: our own (`inner_kernel`) with every way into VFIO, and Debian's, which has groups only.

Traps that were met: virtual functions stand before their PF on the command line; vfio-user-pci
cannot be one of them; amd-iommu corrupts DMA without `dma-remap`; virtio-iommu and amd-iommu have
no isolated interrupts, so that the kernel is told to do without.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

import attrs

from tests.testbed import inner_kernel
from tests.testbed.bed import cache_root
from tests.testbed.inner_ports import port_paths
from tests.testbed.machine import Machine, vfio_user_pci

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.bed import Bed

UNSAFE_INTERRUPTS: Final = (
    "vfio_iommu_type1.allow_unsafe_interrupts=1 iommufd.allow_unsafe_interrupts=1"
)
CACHE_TAG: Final = "cache"
READ_ONLY: Final = "security_model=none,readonly=on,multidevs=remap"
PF_MAC: Final = "52:54:00:00:01:00"
MAX_VFS: Final = 7
"""A PF and its VFs are functions 0 to 7 of one PCI device."""

DEBIAN_MODULES: Final = ("virtio_net", "vfio_iommu_type1", "vfio_pci")


class Kernel(enum.Enum):
    OWN = "own"
    DEBIAN = "debian"


class InnerIommu(enum.Enum):
    """Which emulated IOMMU: its device's options, and what the kernel is told."""

    INTEL = "intel"
    INTEL_SCALABLE = "intel-scalable"
    VIRTIO = "virtio"
    AMD = "amd"
    NONE = "none"


IOMMU_DEVICES: Final[dict[InnerIommu, tuple[str, str]]] = {
    InnerIommu.INTEL: (
        "intel-iommu,intremap=on,caching-mode=on",
        "intel_iommu=on",
    ),
    InnerIommu.INTEL_SCALABLE: (
        "intel-iommu,intremap=on,caching-mode=on,scalable-mode=on,fsts=on",
        "intel_iommu=on,sm_on",
    ),
    InnerIommu.VIRTIO: ("virtio-iommu-pci,addr=0x1e", UNSAFE_INTERRUPTS),
    InnerIommu.AMD: ("amd-iommu,dma-remap=on,intremap=on", UNSAFE_INTERRUPTS),
    InnerIommu.NONE: ("", "vfio.enable_unsafe_noiommu_mode=1"),
}


@attrs.frozen(kw_only=True)
class InnerMachine:
    """One inner host's configuration.

    `vfs` is how many virtual functions QEMU's own SR-IOV device has, 0 for no such device;
    `sockets` are those of vfio-user servers, one function each; `devices` are further QEMU
    arguments, `append` is added to the kernel's command line.
    """

    kernel: Kernel = Kernel.OWN
    iommu: InnerIommu = InnerIommu.INTEL
    vfs: int = 2
    sockets: tuple[Path, ...] = ()
    memory_mib: int = 1024
    cpus: int = 1
    devices: tuple[str, ...] = ()
    append: str = ""

    @property
    def name(self) -> str:
        return f"{self.kernel.value}-{self.iommu.value}"

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways into VFIO that this host offers: "group", "cdev" or "noiommu"."""
        if self.iommu is InnerIommu.NONE:
            return ("noiommu",)
        return ("group", "cdev") if self.kernel is Kernel.OWN else ("group",)

    @property
    def pf(self) -> str:
        """PCI address of the SR-IOV device's PF."""
        return "0000:01:00.0"

    @property
    def vf_addresses(self) -> tuple[str, ...]:
        """PCI addresses of its VFs, VF number 1 first."""
        return tuple(f"0000:01:00.{number}" for number in range(1, self.vfs + 1))

    @property
    def function_addresses(self) -> tuple[str, ...]:
        """PCI addresses of the vfio-user functions, in the order of `sockets`."""
        first = self._first_function_slot
        return tuple(f"0000:{first + index:02x}:00.0" for index in range(len(self.sockets)))

    @property
    def _first_function_slot(self) -> int:
        return 2 if self.vfs else 1

    def machine(self, bed: Bed, folder: Path, archives: tuple[Path, ...] = ()) -> Machine:
        """Where the SR-IOV device's frames go: see `FramePort`, with the same `folder`.

        Raises `InnerKernelMissing`.
        """
        if not 0 <= self.vfs <= MAX_VFS:
            raise ValueError(f"{self.vfs} VFs; an inner host has at most {MAX_VFS}")
        iommu, append = IOMMU_DEVICES[self.iommu]
        devices = ["-device", iommu] if iommu else []
        if self.vfs:
            devices += self._sriov_device(folder)
        for slot, socket in enumerate(self.sockets, self._first_function_slot):
            devices += vfio_user_pci(socket, slot=slot, ident=f"function{slot}")
        own = self.kernel is Kernel.OWN
        first = ("virtio_iommu",) if self.iommu is InnerIommu.VIRTIO else ()
        if own:
            devices += ["-virtfs", f"local,path={cache_root()},mount_tag={CACHE_TAG},{READ_ONLY}"]
        return Machine(
            devices=(*devices, *self.devices),
            memory_mib=self.memory_mib,
            cpus=self.cpus,
            modules=() if own else (*first, *DEBIAN_MODULES),
            append=f"{append} {self.append}",
            kernel=inner_kernel.find(bed) if own else None,
            archives=archives,
        )

    def _sriov_device(self, folder: Path) -> list[str]:
        words = ["-device", "pcie-root-port,id=port1,slot=1,chassis=1"]
        common = "bus=port1,iommu_platform=on,disable-legacy=on,romfile="
        for number in range(self.vfs, -1, -1):
            ours, theirs = port_paths(folder, number)
            words += [
                "-netdev",
                f"dgram,id=port1-{number},local.type=unix,local.path={theirs},"
                f"remote.type=unix,remote.path={ours}",
            ]
            family = "sriov-pf=pf" if number else "id=pf"
            mac = f"{PF_MAC[:-1]}{number}"
            words += [
                "-device",
                f"virtio-net-pci,addr=0x0.{number:#x},netdev=port1-{number},{family},mac={mac},{common}",
            ]
        return words

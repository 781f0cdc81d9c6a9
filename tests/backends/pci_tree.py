"""A folder that looks like sysfs, and what the kernel does when somebody writes to it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.backends.vfio.sysfs import PciAddress
from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    from pathlib import Path

    from vfio_user_virtio.backends.vfio.binding import Write

PF: Final = PciAddress.parse("0000:03:00.0")
VFS: Final = tuple(PciAddress.parse(f"0000:03:10.{n}") for n in (1, 3, 5))
"""With VF stride 2, so that the function number is of no use to find the index."""
BRIDGE: Final = PciAddress.parse("0000:00:1c.0")


class PciTree:
    """A PF with `vfs` VFs, each in an IOMMU group of its own; drivers virtio-pci and vfio-pci."""

    def __init__(self, root: Path, *, vfs: int = 0, sriov: bool = True) -> None:
        self.root = root
        self.written: list[str] = []
        self.refuse: str | None = None
        """The end of a path that is to be refused."""
        for driver in ("virtio-pci", "vfio-pci"):
            (root / "bus/pci/drivers" / driver).mkdir(parents=True)
        (root / "bus/pci/drivers_probe").touch()
        (root / "module/vfio_pci/parameters").mkdir(parents=True)
        self.enable_sriov = root / "module/vfio_pci/parameters/enable_sriov"
        self.enable_sriov.write_text("N\n")
        self.add(PF, group=10, driver="virtio-pci")
        if sriov:
            self.file(PF, "sriov_totalvfs", str(len(VFS)))
            self.file(PF, "sriov_numvfs", "0")
            self.file(PF, "sriov_drivers_autoprobe", "1")
            self._set_vfs(vfs)

    def path(self, address: PciAddress) -> Path:
        return self.root / "bus/pci/devices" / str(address)

    def file(self, address: PciAddress, name: str, text: str) -> None:
        (self.path(address) / name).write_text(text + "\n")

    def add(self, address: PciAddress, *, group: int | None, driver: str | None = None) -> None:
        path = self.path(address)
        path.mkdir(parents=True)
        self.file(address, "vendor", "0x1af4")
        self.file(address, "device", "0x1041")
        self.file(address, "class", "0x020000")
        self.file(address, "driver_override", "(null)")
        self.file(address, "resource", "\n".join((_NONE, _BAR1, _NONE, _NONE, _BAR4, _NONE, _ROM)))
        if group is not None:
            devices = self.root / f"kernel/iommu_groups/{group}/devices"
            devices.mkdir(parents=True, exist_ok=True)
            (devices / str(address)).symlink_to(path)
            (path / "iommu_group").symlink_to(devices.parent)
        if driver is not None:
            self._bind(address, driver)

    def _bind(self, address: PciAddress, driver: str) -> None:
        (self.path(address) / "driver").symlink_to(self.root / "bus/pci/drivers" / driver)
        if driver == "vfio-pci":
            (self.path(address) / "vfio-dev/vfio7").mkdir(parents=True)

    def _set_vfs(self, count: int) -> None:
        for index, address in enumerate(VFS):
            link = self.path(PF) / f"virtfn{index}"
            if index < count and not link.exists():
                self.add(address, group=11 + index)
                (self.path(address) / "physfn").symlink_to(self.path(PF))
                link.symlink_to(self.path(address))
            elif index >= count and link.exists():
                link.unlink()
                (self.root / f"kernel/iommu_groups/{11 + index}/devices/{address}").unlink()
                shutil.rmtree(self.path(address))
        self.file(PF, "sriov_numvfs", str(count))

    def write(self, write: Write) -> None:
        """What the kernel does."""
        name = str(write.path.relative_to(self.root))
        self.written.append(f"{name.removeprefix('bus/pci/')} {write.value}".strip())
        if self.refuse is not None and name.endswith(self.refuse):
            raise HostError(f"{write}: refused")
        if name.endswith("driver/unbind"):
            link = write.path.parent
            if not link.is_symlink():
                raise HostError(f"{write}: No such file or directory")
            link.unlink()
            shutil.rmtree(link.parent / "vfio-dev", ignore_errors=True)
        elif name.endswith("drivers_probe"):
            self._probe(PciAddress.parse(write.value))
        elif name.endswith("sriov_numvfs"):
            self._set_vfs(int(write.value))
        else:
            write.path.write_text((write.value or "(null)") + "\n")

    def _probe(self, address: PciAddress) -> None:
        if (self.path(address) / "driver").is_symlink():
            return
        override = (self.path(address) / "driver_override").read_text().strip()
        self._bind(address, "virtio-pci" if override == "(null)" else override)


_NONE: Final = "0x0000000000000000 0x0000000000000000 0x0000000000000000"
_BAR1: Final = "0x00000000fe800000 0x00000000fe800fff 0x0000000000040200"
_BAR4: Final = "0x0000000800000000 0x0000000800003fff 0x000000000014220c"
_ROM: Final = "0x00000000fe840000 0x00000000fe87ffff 0x0000000000046200"

"""A kernel of a few ioctls, for what no kernel here does: one function at 0000:01:00.1.

The real thing runs in the inner host (tests/inner).  This one has the hardware that is not there
(an IOMMU that tracks dirty pages), the kernels that are not (old and odd ones), and the failures
that nobody can bring about.  It takes the place of `fcntl.ioctl`; device nodes and sysfs are files
in a test's folder, and the function's registers are the bytes of its node.  Mappings are followed
for real: `dma_write` writes through the address or the file that was mapped.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.backends.vfio.iommufd_uapi import IommufdIoctl
from vfio_user_virtio.backends.vfio.opening import OpenOptions, open_function
from vfio_user_virtio.backends.vfio.sysfs import PciAddress
from vfio_user_virtio.backends.vfio.type1_uapi import ContainerIoctl
from vfio_user_virtio.backends.vfio.uapi import DeviceIoctl, GroupIoctl

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from vfio_user_virtio.backends.vfio.opening import OpenedFunction

ADDRESS: Final = PciAddress.parse("0000:01:00.1")
GROUP: Final = 7
REGION_SHIFT: Final = 16
BARS: Final = {1: 0x3000, 4: 0x4000}
MSIX_BAR: Final = 1
VECTORS: Final = 4
WRITABLE: Final = 0x2
"""Of a mapping's flags, as both ways to map have it (type 1 by its own bit, moved here)."""
DIRTY_PAGE: Final = 0x1000
NORESIZE: Final = 8
_FLR: Final = 0x44 + 8


def _config() -> bytes:
    """Configuration space: MSI-X at 0x98, PCI Express at 0x44, Power Management at 0x60."""
    data = bytearray(4096)
    struct.pack_into("<HHHH", data, 0, 0x1AF4, 0x1041, 0, 0x10)
    data[0x34] = 0x98
    struct.pack_into("<BBHII", data, 0x98, 0x11, 0x44, VECTORS - 1, MSIX_BAR, 0x800 | MSIX_BAR)
    struct.pack_into("<BB", data, 0x44, 0x10, 0x60)
    struct.pack_into("<BB", data, 0x60, 0x01, 0)
    return bytes(data)


@attrs.define
class Mapped:
    """A mapping: by our address, or by a file that is held and an offset in it."""

    size: int
    writable: bool
    address: int = 0
    file: int = -1
    dirty: set[int] = attrs.field(factory=set)


class ModelKernel:
    """See the module head.  Options are attributes, to be changed before or while it is used."""

    def __init__(self, folder: Path) -> None:
        self.sys = folder / "sys"
        self.dev = folder / "dev"
        self.maps_files = True
        self.tracks_dirty = False
        self.irq_flags = 1
        self.resettable = True
        self.viable = True
        self.memlock = 1 << 40
        self.unmap_all_known = True
        self.token: str | None = None
        self.own_token: str | None = None
        """Set by whoever has the function open."""
        self.refuse: dict[int, int] = {}
        """By number of the call: the errno that it is answered with."""
        self.ranges = [(0, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 48) - 1)]
        self.mappings: dict[int, Mapped] = {}
        self.irqs: dict[int, list[int]] = {}
        self.acts: list[tuple[int, int, int, int]] = []
        """Interrupts that were masked, unmasked or injected: flags, index, start, count."""
        self.resets = 0
        self.tracking = False
        self.calls: list[str] = []
        self._make_files()

    def _make_files(self) -> None:
        device = self.sys / "bus/pci/devices" / str(ADDRESS)
        (device / "vfio-dev/vfio0").mkdir(parents=True)
        driver = self.sys / "bus/pci/drivers/vfio-pci"
        driver.mkdir(parents=True)
        (device / "driver").symlink_to(driver)
        group = self.sys / "kernel/iommu_groups" / str(GROUP)
        group.mkdir(parents=True)
        (device / "iommu_group").symlink_to(group)
        (self.dev / "vfio/devices").mkdir(parents=True)
        for name in ("vfio/vfio", f"vfio/{GROUP}", "iommu"):
            (self.dev / name).touch()
        registers = bytearray(10 << REGION_SHIFT)
        start = 7 << REGION_SHIFT
        registers[start : start + 4096] = _config()
        self.node.write_bytes(registers)

    @property
    def node(self) -> Path:
        """The function's own device node, whose bytes are its registers."""
        return self.dev / "vfio/devices/vfio0"

    def open(self, options: OpenOptions | None = None) -> OpenedFunction:
        return open_function(ADDRESS, options, root=self.sys, dev=self.dev)

    def registers(self, region: int, offset: int, count: int) -> bytes:
        start = (region << REGION_SHIFT) + offset
        return self.node.read_bytes()[start : start + count]

    def pinned(self) -> int:
        return sum(one.size for one in self.mappings.values())

    def fire(self, index: int, vector: int = 0) -> None:
        """The function interrupts."""
        os.eventfd_write(self.irqs[index][vector], 1)

    def dma_write(self, iova: int, data: bytes) -> None:
        """The function writes to memory, inside one mapping."""
        start, one = next(
            (start, one) for start, one in self.mappings.items() if start <= iova < start + one.size
        )
        assert one.writable
        assert iova + len(data) <= start + one.size
        if one.file >= 0:
            os.pwrite(one.file, data, one.address + iova - start)
        else:
            ctypes.memmove(one.address + iova - start, data, len(data))
        one.dirty.update(range(iova // DIRTY_PAGE, (iova + len(data) - 1) // DIRTY_PAGE + 1))

    # --- the call ------------------------------------------------------------------------------

    def ioctl(self, fd: int, request: int, argument: bytearray | int = 0) -> int:
        path = os.readlink(f"/proc/self/fd/{fd}")
        kind = path.removeprefix(f"{self.dev}/")
        numbers: dict[str, type[ContainerIoctl | GroupIoctl | IommufdIoctl | DeviceIoctl]] = {
            "vfio/vfio": ContainerIoctl,
            f"vfio/{GROUP}": GroupIoctl,
            f"vfio/noiommu-{GROUP}": GroupIoctl,
            "iommu": IommufdIoctl,
        }
        numbered = numbers.get(kind, DeviceIoctl)(request)
        self.calls.append(numbered.name)
        if request in self.refuse:
            raise OSError(self.refuse[request], "refused")
        handler = getattr(self, f"_{numbered.name.lower()}")
        data = argument if isinstance(argument, bytearray) else bytearray()
        result = handler(data)
        return result if isinstance(result, int) else 0

    # --- container and group -------------------------------------------------------------------

    def _check_extension(self, data: bytearray) -> int:
        del data
        return int(self.unmap_all_known)

    def _set_iommu(self, data: bytearray) -> None: ...

    def _set_container(self, data: bytearray) -> None: ...

    def _get_status(self, data: bytearray) -> None:
        struct.pack_into("=I", data, 4, int(self.viable))

    def _get_device_fd(self, data: bytearray) -> int:
        name, _, token = data.decode().rstrip("\0").partition(" vf_token=")
        assert name == str(ADDRESS)
        if (token or None) != self.token:
            raise OSError(errno.EACCES if self.token else errno.EINVAL, "token")
        return os.open(self.node, os.O_RDWR | os.O_CLOEXEC)

    def _iommu_get_info(self, data: bytearray) -> None:
        needed = 24 + 16 + 16 * len(self.ranges)
        if len(data) >= needed:
            struct.pack_into("=IIQI", data, 0, needed, 3, 0x1000, 24)
            struct.pack_into("=HHIII", data, 24, 1, 1, 0, len(self.ranges), 0)
            for number, one in enumerate(self.ranges):
                struct.pack_into("=QQ", data, 40 + 16 * number, *one)
        else:
            struct.pack_into("=IIQI", data, 0, needed, 3, 0x1000, 0)

    def _iommu_map_dma(self, data: bytearray) -> None:
        _, flags, address, iova, size = struct.unpack("=IIQQQ", data)
        self._map(iova, Mapped(size, bool(flags & 2), address))

    def _iommu_unmap_dma(self, data: bytearray) -> None:
        _, flags, iova, size = struct.unpack("=IIQQ", data)
        self._unmap(0, 1 << 64) if flags & 2 else self._unmap(iova, iova + size)

    # --- iommufd -------------------------------------------------------------------------------

    def _ioas_alloc(self, data: bytearray) -> None:
        struct.pack_into("=I", data, 8, 3)

    def _ioas_iova_ranges(self, data: bytearray) -> None:
        _, _, room, _, address, _ = struct.unpack("=IIIIQQ", data)
        struct.pack_into("=I", data, 8, len(self.ranges))
        struct.pack_into("=Q", data, 24, 0x1000)
        packed = b"".join(struct.pack("=QQ", *one) for one in self.ranges[:room])
        ctypes.memmove(address, packed, len(packed))
        if len(self.ranges) > room:
            raise OSError(errno.EMSGSIZE, "more ranges")

    def _ioas_map(self, data: bytearray) -> None:
        _, flags, ioas, _, address, size, iova = struct.unpack("=IIIIQQQ", data)
        assert (ioas, flags & 1) == (3, 1)
        self._map(iova, Mapped(size, bool(flags & WRITABLE), address))

    def _ioas_map_file(self, data: bytearray) -> None:
        _, flags, ioas, fd, offset, size, iova = struct.unpack("=IIIiQQQ", data)
        if not self.maps_files:
            raise OSError(errno.ENOTTY, "unknown")
        if ioas != 3:
            raise OSError(errno.ENOENT, "no such IOAS")
        self._map(iova, Mapped(size, bool(flags & WRITABLE), offset, os.dup(fd)))

    def _ioas_unmap(self, data: bytearray) -> None:
        _, _, iova, size = struct.unpack("=IIQQ", data)
        if not self._unmap(iova, iova + size + (size == (1 << 64) - 1)):
            raise OSError(errno.ENOENT, "nothing there")

    def _get_hw_info(self, data: bytearray) -> None:
        struct.pack_into("=Q", data, 32, int(self.tracks_dirty))

    def _hwpt_alloc(self, data: bytearray) -> None:
        struct.pack_into("=I", data, 16, 5)

    def _hwpt_set_dirty_tracking(self, data: bytearray) -> None:
        _, flags, hwpt, _ = struct.unpack("=IIII", data)
        assert hwpt == 5
        self.tracking = bool(flags)
        for one in self.mappings.values():
            one.dirty.clear()

    def _hwpt_get_dirty_bitmap(self, data: bytearray) -> None:
        _, hwpt, flags, _, iova, size, page_size, address = struct.unpack("=IIIIQQQQ", data)
        assert (hwpt, page_size, self.tracking) == (5, DIRTY_PAGE, True)
        (one,) = [
            one
            for start, one in self.mappings.items()
            if start <= iova and iova + size <= start + one.size
        ]
        pages = one.dirty & set(range(iova // DIRTY_PAGE, (iova + size) // DIRTY_PAGE))
        bits = sum(1 << page - iova // DIRTY_PAGE for page in pages)
        count = -(-size // (64 * DIRTY_PAGE)) * 8
        before = int.from_bytes(ctypes.string_at(address, count), "little")
        ctypes.memmove(address, (before | bits).to_bytes(count, "little"), count)
        if not flags & 1:
            one.dirty -= pages

    def _map(self, iova: int, mapped: Mapped) -> None:
        if any(
            start < iova + mapped.size and iova < start + one.size
            for start, one in self.mappings.items()
        ):
            raise _refused(mapped, errno.EEXIST)
        if self.pinned() + mapped.size > self.memlock:
            raise _refused(mapped, errno.ENOMEM)
        self.mappings[iova] = mapped

    def _unmap(self, start: int, end: int) -> int:
        inside = [at for at, one in self.mappings.items() if at < end and start < at + one.size]
        for at in inside:
            one = self.mappings[at]
            assert start <= at
            assert at + one.size <= end
            if one.file >= 0:
                os.close(one.file)
            del self.mappings[at]
        return len(inside)

    # --- the device ----------------------------------------------------------------------------

    def _bind_iommufd(self, data: bytearray) -> None:
        token = None
        if len(data) == 24:
            (address,) = struct.unpack_from("=Q", data, 16)
            token = ctypes.string_at(address, 16).hex()
        if token != (self.token and self.token.replace("-", "")):
            raise OSError(errno.EACCES if self.token else errno.EINVAL, "token")
        struct.pack_into("=I", data, 12, 9)

    def _feature(self, data: bytearray) -> None:
        assert struct.unpack_from("=II", data) == (24, 1 << 17), "the VF token, set"
        self.own_token = bytes(data[8:]).hex()

    def _attach_iommufd_pt(self, data: bytearray) -> None:
        (pt,) = struct.unpack_from("=I", data, 8)
        assert pt == (5 if self.tracks_dirty else 3)

    def _get_info(self, data: bytearray) -> None:
        struct.pack_into("=IIII", data, 0, 24, 2 | int(self.resettable), 9, 5)

    def _get_region_info(self, data: bytearray) -> None:
        (index,) = struct.unpack_from("=I", data, 8)
        if index == 8:
            raise OSError(errno.EINVAL, "no VGA")
        size = 4096 if index == 7 else BARS.get(index, 0)
        flags = (7 if index in BARS else 3) if size else 0
        needed, position = 32, 0
        if index == MSIX_BAR:
            needed, flags = 40, flags | 8
            if len(data) >= needed:
                position = 32
                struct.pack_into("=HHI", data, 32, 3, 1, 0)
        offset = index << REGION_SHIFT
        struct.pack_into("=IIIIQQ", data, 0, needed, flags, index, position, size, offset)

    def _get_irq_info(self, data: bytearray) -> None:
        (index,) = struct.unpack_from("=I", data, 8)
        if index == 3:
            raise OSError(errno.EINVAL, "no AER")
        count = {0: 1, 2: VECTORS, 4: 1}.get(index, 0)
        struct.pack_into("=IIII", data, 0, 16, self.irq_flags, index, count)

    def _set_irqs(self, data: bytearray) -> None:
        _, flags, index, start, count = struct.unpack_from("=IIIII", data)
        armed = self.irqs.get(index)
        if flags == 0x24:
            fds = struct.unpack_from(f"={count}i", data, 20)
            armed = self.irqs.setdefault(index, [])
            if armed and self.irq_flags & NORESIZE and start + count > len(armed):
                raise OSError(errno.EINVAL, "the vectors are fixed")
            armed += [-1] * (start + count - len(armed))
            for vector, fd in enumerate(fds, start):
                if armed[vector] >= 0:
                    os.close(armed[vector])
                armed[vector] = os.dup(fd) if fd >= 0 else -1
        elif flags == 0x21 and not count:
            if armed is None:
                raise OSError(errno.EINVAL, "not on")
            for fd in self.irqs.pop(index):
                if fd >= 0:
                    os.close(fd)
        else:
            self.acts.append((flags, index, start, count))

    def _reset(self, data: bytearray) -> None:
        del data
        self.resets += 1


def _refused(mapped: Mapped, number: int) -> OSError:
    if mapped.file >= 0:
        os.close(mapped.file)
    return OSError(number, "not mapped")


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModelKernel:
    """A model kernel instead of this machine's, for one test."""
    model = ModelKernel(folder)
    monkeypatch.setattr(fcntl, "ioctl", model.ioctl)
    return model

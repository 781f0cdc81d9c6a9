"""What the kernel and a user of VFIO say to each other about a group and a device: linux/vfio.h.

The numbers and layouts are written out here, not taken from an installed header: those of the
distributions that are about lack half of it.  All are in the byte order of the machine, every field
is u32 if nothing else is said, and `argsz` is the size of the whole structure with what follows it.
Offsets are in bytes.

- device info, 24: ``0`` argsz, ``4`` flags, ``8`` num_regions, ``12`` num_irqs, ``16`` cap_offset,
  ``20`` padding (the last 8 since 6.1; a kernel without them leaves them as they are)
- region info, 32 and capabilities: ``0`` argsz, ``4`` flags, ``8`` index, ``12`` cap_offset, ``16``
  u64 size, ``24`` u64 offset in the device's fd.  If argsz is too small for the capabilities the
  kernel raises it, and leaves cap_offset 0.
- capability header, 8: ``0`` u16 id, ``2`` u16 version, ``4`` u32 next, from the start of the info;
  0 ends.  Sparse mmap (id 1): ``8`` nr_areas, ``12`` reserved, then u64 offset and u64 size of each
  area.  MSI-X mappable (id 3): no more.
- interrupt info, 16: ``0`` argsz, ``4`` flags, ``8`` index, ``12`` count
- interrupt set, 20 and data: ``0`` argsz, ``4`` flags (data none 1, bool 2, eventfd 4; action mask
  8, unmask 16, trigger 32), ``8`` index, ``12`` start, ``16`` count; an s32 for each eventfd, -1 to
  leave it without one
- feature, 8 and data: ``0`` argsz, ``4`` flags (number, and what to do as `FeatureOperation`)
- group status, 8: ``0`` argsz, ``4`` flags

Source: Linux, include/uapi/linux/vfio.h; Documentation/driver-api/vfio.rst.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.backends.vfio.kernel import malformed
from vfio_user_virtio.device import IrqAction, IrqFlags, RegionFlags, SparseArea

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_user_virtio.device import FeatureOperation

API_VERSION: Final = 0

DEVICE_INFO: Final = struct.Struct("=IIIIII")
REGION_INFO: Final = struct.Struct("=IIIIQQ")
CAPABILITY: Final = struct.Struct("=HHI")
SPARSE_MMAP: Final = struct.Struct("=II")
SPARSE_AREA: Final = struct.Struct("=QQ")
IRQ_INFO: Final = struct.Struct("=IIII")
IRQ_SET: Final = struct.Struct("=IIIII")
FEATURE: Final = struct.Struct("=II")
GROUP_STATUS: Final = struct.Struct("=II")
_FD: Final = struct.Struct("=i")
assert (DEVICE_INFO.size, REGION_INFO.size, CAPABILITY.size) == (24, 32, 8)
assert (SPARSE_MMAP.size, SPARSE_AREA.size) == (8, 16)
assert (IRQ_INFO.size, IRQ_SET.size, FEATURE.size, GROUP_STATUS.size) == (16, 20, 8, 8)

CAP_SPARSE_MMAP: Final = 1
CAP_MSIX_MAPPABLE: Final = 3
MAX_INFO_SIZE: Final = 1 << 20
"""An info of the kernel with all its capabilities; the largest known is a few KiB."""


class GroupIoctl(enum.IntEnum):
    """Calls on /dev/vfio/N."""

    GET_STATUS = 0x3B67
    SET_CONTAINER = 0x3B68
    UNSET_CONTAINER = 0x3B69
    GET_DEVICE_FD = 0x3B6A


class DeviceIoctl(enum.IntEnum):
    """Calls on a device."""

    GET_INFO = 0x3B6B
    GET_REGION_INFO = 0x3B6C
    GET_IRQ_INFO = 0x3B6D
    SET_IRQS = 0x3B6E
    RESET = 0x3B6F
    IOEVENTFD = 0x3B74
    FEATURE = 0x3B75
    BIND_IOMMUFD = 0x3B76
    ATTACH_IOMMUFD_PT = 0x3B77
    DETACH_IOMMUFD_PT = 0x3B78


class KernelFeature(enum.IntEnum):
    """Numbers of VFIO_DEVICE_FEATURE that are used here."""

    VF_TOKEN = 0


class KernelDeviceFlags(enum.IntFlag):
    """Flags of a device info."""

    RESET = 1 << 0
    PCI = 1 << 1
    CAPS = 1 << 7


class GroupFlags(enum.IntFlag):
    """Flags of a group status."""

    VIABLE = 1 << 0
    CONTAINER_SET = 1 << 1


class _IrqData(enum.IntEnum):
    NONE = 1 << 0
    BOOL = 1 << 1
    EVENTFD = 1 << 2


@attrs.frozen
class KernelDeviceInfo:
    """A device as the kernel has it."""

    flags: KernelDeviceFlags
    num_regions: int
    num_irqs: int


@attrs.frozen
class KernelRegion:
    """A region at `offset` of the device's fd, `size` bytes (0 when absent).

    `areas` may be mapped, nothing else, if it is not None.  `msix_mappable`: the region holds the
    MSI-X table, and the kernel lets it be mapped all the same.
    """

    size: int
    offset: int
    flags: RegionFlags
    areas: tuple[SparseArea, ...] | None = None
    msix_mappable: bool = False


@attrs.frozen
class KernelIrq:
    """An interrupt index: how many sub-indices it has (0 when absent) and its flags."""

    count: int
    flags: IrqFlags


# --- the device ---------------------------------------------------------------------------------


def encode_device_info() -> bytearray:
    return bytearray(DEVICE_INFO.pack(DEVICE_INFO.size, 0, 0, 0, 0, 0))


def decode_device_info(answer: bytearray) -> KernelDeviceInfo:
    _, flags, num_regions, num_irqs, _, _ = DEVICE_INFO.unpack_from(answer)
    return KernelDeviceInfo(KernelDeviceFlags(flags), num_regions, num_irqs)


# --- regions ------------------------------------------------------------------------------------


def encode_region_info(index: int, argsz: int = REGION_INFO.size) -> bytearray:
    """Ask for region `index`, with room for an answer of `argsz` ≥ 32 bytes."""
    request = bytearray(argsz)
    REGION_INFO.pack_into(request, 0, argsz, 0, index, 0, 0, 0)
    return request


def needed_size(answer: bytearray) -> int:
    """How large the kernel wants the argument to be: more than it was, if there is more to say.

    Raises HostError for a size that no info has.
    """
    (argsz,) = struct.unpack_from("=I", answer)
    if argsz > MAX_INFO_SIZE:
        raise malformed("an info", f"it wants {argsz} bytes, more than {MAX_INFO_SIZE}")
    return int(argsz)


def decode_region_info(answer: bytearray) -> KernelRegion:
    """Raises HostError for capabilities that are not inside the answer."""
    _, flags, index, cap_offset, size, offset = REGION_INFO.unpack_from(answer)
    what = f"GET_REGION_INFO {index}"
    areas: tuple[SparseArea, ...] | None = None
    msix_mappable = False
    if flags & RegionFlags.CAPS:
        for number, position in walk_capabilities(answer, cap_offset, REGION_INFO.size, what):
            if number == CAP_SPARSE_MMAP:
                areas = _decode_areas(answer, position, what)
            elif number == CAP_MSIX_MAPPABLE:
                msix_mappable = True
    known = RegionFlags.READ | RegionFlags.WRITE | RegionFlags.MMAP
    return KernelRegion(size, offset, RegionFlags(flags) & known, areas, msix_mappable)


def walk_capabilities(
    answer: bytearray, position: int, start: int, what: str
) -> list[tuple[int, int]]:
    """The capabilities of an info from `position` on: id, and where it is.  0 is none.

    They begin at `start` or behind and are, in the kernel's order, further and further on.  Raises
    HostError where they are not.
    """
    found = []
    lowest = start
    while position:
        if not lowest <= position <= len(answer) - CAPABILITY.size:
            raise malformed(
                what, f"a capability at {position}, not in {lowest} … {len(answer)} bytes"
            )
        number, _, following = CAPABILITY.unpack_from(answer, position)
        found.append((number, position))
        lowest, position = position + CAPABILITY.size, following
    return found


def _decode_areas(answer: bytearray, position: int, what: str) -> tuple[SparseArea, ...]:
    start = position + CAPABILITY.size + SPARSE_MMAP.size
    if start > len(answer):
        raise malformed(what, "the sparse mmap capability is cut off")
    nr_areas, _ = SPARSE_MMAP.unpack_from(answer, position + CAPABILITY.size)
    end = start + nr_areas * SPARSE_AREA.size
    if end > len(answer):
        raise malformed(what, f"{nr_areas} sparse areas in {len(answer)} bytes")
    return tuple(SparseArea(*area) for area in SPARSE_AREA.iter_unpack(answer[start:end]))


# --- interrupts ---------------------------------------------------------------------------------


def encode_irq_info(index: int) -> bytearray:
    return bytearray(IRQ_INFO.pack(IRQ_INFO.size, 0, index, 0))


def decode_irq_info(answer: bytearray) -> KernelIrq:
    _, flags, _, count = IRQ_INFO.unpack_from(answer)
    return KernelIrq(count, IrqFlags(flags))


def encode_irq_set(
    index: int,
    start: int,
    count: int,
    action: IrqAction,
    *,
    eventfds: Sequence[int] | None = None,
    bools: Sequence[bool] | None = None,
) -> bytearray:
    """`action` on `count` sub-indices from `start`, with one kind of data, of `count` items."""
    kind, data = _IrqData.NONE, b""
    if eventfds is not None:
        kind, data = _IrqData.EVENTFD, b"".join(map(_FD.pack, eventfds))
    elif bools is not None:
        kind, data = _IrqData.BOOL, bytes(bools)
    head = IRQ_SET.pack(IRQ_SET.size + len(data), kind | action.value, index, start, count)
    return bytearray(head + data)


# --- features and groups ------------------------------------------------------------------------


def encode_feature(number: KernelFeature, operation: FeatureOperation, data: bytes) -> bytearray:
    """`data` is sent, and room for what is answered; see `feature_data`."""
    return bytearray(FEATURE.pack(FEATURE.size + len(data), number | operation) + data)


def feature_data(answer: bytearray) -> bytes:
    return bytes(answer[FEATURE.size :])


def encode_group_status() -> bytearray:
    return bytearray(GROUP_STATUS.pack(GROUP_STATUS.size, 0))


def decode_group_status(answer: bytearray) -> GroupFlags:
    _, flags = GROUP_STATUS.unpack_from(answer)
    return GroupFlags(flags)


def encode_container(container: int) -> bytearray:
    """SET_CONTAINER takes a pointer to the descriptor."""
    return bytearray(_FD.pack(container))


def encode_device_name(address: str, vf_token: str | None) -> bytearray:
    """What GET_DEVICE_FD wants: the PCI address, the token of the PF if need be, and a NUL."""
    token = "" if vf_token is None else f" vf_token={vf_token}"
    return bytearray(f"{address}{token}\0".encode())

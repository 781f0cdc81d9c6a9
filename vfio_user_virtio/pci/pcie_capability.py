"""The PCI Express capability (ID 0x10) of an endpoint that can be reset on its own.

What matters to a guest is Function Level Reset: QEMU sends no DEVICE_RESET for it, it is a plain
write of bit 15 of Device Control that the device must see.  The bit reads as 0 always; the event
goes to the writer.  Transactions Pending is always 0: by the time a write is answered, nothing is
in flight.  All else is a plausible, quiet link: x1 at 2.5 GT/s, 128-byte payloads, no ASPM.  QEMU
turns the type into a Root Complex Integrated Endpoint by itself where the slot asks for that.

Version 2 of the structure, 60 bytes with the header (PCI Express Base 4.0, 7.5.3); after the two
bytes of ID and next pointer, all little-endian:

    PCI Express Capabilities 16, Device Capabilities 32, Device Control 16, Device Status 16,
    Link Capabilities 32, Link Control 16, Link Status 16, Slot and Root (16 bytes of zeros),
    Device Capabilities 2 32, Device Control 2 16, Device Status 2 16,
    Link Capabilities 2 32, Link Control 2 16, Link Status 2 16, Slot 2 (8 bytes of zeros)
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.pci.config_space import ConfigEvents

if TYPE_CHECKING:
    from vfio_user_virtio.pci.config_space import ConfigSpace

CAPABILITY_ID: Final = 0x10
_BODY: Final = struct.Struct("<HIHHIHH16xIHHIHH8x")
assert _BODY.size == 58

DEVICE_CONTROL: Final = 0x08
"""Offset of Device Control in the capability."""
INITIATE_FLR: Final = 1 << 15

_VERSION_2_ENDPOINT: Final = 0x0002
_ROLE_BASED_ERRORS: Final = 1 << 15
_FLR_CAPABLE: Final = 1 << 28
_DEVICE_CONTROL_DEFAULT: Final = 0x2810
"""Relaxed ordering, no-snoop, read requests of up to 512 bytes."""
_DEVICE_CONTROL_WRITABLE: Final = 0x78FF
"""Error reporting, relaxed ordering, payload size, no-snoop, read request size."""
_LINK_X1_2_5GT: Final = 0x11
_LINK_CONTROL_WRITABLE: Final = 0x00CB
"""ASPM, read completion boundary, common clock, extended synch."""
_SPEEDS_2_5GT: Final = 1 << 1
_TARGET_2_5GT: Final = 1

_DEFAULTS: Final = _BODY.pack(
    _VERSION_2_ENDPOINT,
    _ROLE_BASED_ERRORS | _FLR_CAPABLE,
    _DEVICE_CONTROL_DEFAULT,
    0,
    _LINK_X1_2_5GT,
    0,
    _LINK_X1_2_5GT,
    0,
    0,
    0,
    _SPEEDS_2_5GT,
    _TARGET_2_5GT,
    0,
)
_WRITABLE: Final = _BODY.pack(
    0, 0, _DEVICE_CONTROL_WRITABLE, 0, 0, _LINK_CONTROL_WRITABLE, 0, 0, 0, 0, 0, 0, 0
)


def add_pcie_capability(config: ConfigSpace) -> int:
    """Add the capability to `config` and return its offset.

    Writes of Initiate FLR yield `ConfigEvents.FUNCTION_LEVEL_RESET`.
    """
    offset = config.add_capability(CAPABILITY_ID, _DEFAULTS, _WRITABLE)
    config.watch(offset + DEVICE_CONTROL, 2, _device_control_written)
    return offset


def _device_control_written(before: int, after: int, ones: int) -> tuple[int, ConfigEvents]:
    flr = ones & INITIATE_FLR
    return after, ConfigEvents.FUNCTION_LEVEL_RESET if flr else ConfigEvents.NONE

"""What has to be known of a function's configuration space before a guest has it.

The kernel answers for the registers; nothing of them is emulated here.  But where the MSI-X table
lies decides what may be mapped, and a few registers reset the function when they are written, which
takes the kernel 0.1 s: those writes are made in a thread.

Layouts, little-endian, offsets from the capability:

- MSI-X (0x11): ``2`` u16 control (bits 0 … 10: entries - 1), ``4`` u32 table, ``8`` u32 pending
  bits; of both, bits 0 … 2 are the BAR, the others the offset in it.  An entry has 16 bytes.
- PCI Express (0x10): ``8`` u16 Device Control, bit 15 resets the function
- Power Management (0x01): ``4`` u16 PMCSR, whose way from D3hot to D0 may
- Advanced Features (0x13): ``4`` u8 control, bit 0 resets the function

Source: PCI Local Bus 3.0, Capabilities List, MSI-X; PCI Express Base, Function Level Reset.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.backends.vfio.areas import Hole
from vfio_user_virtio.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Mapping

STATUS: Final = 0x06
HAS_CAPABILITIES: Final = 1 << 4
CAPABILITIES_POINTER: Final = 0x34
HEADER_SIZE: Final = 0x40
CONFIG_SIZE: Final = 256
"""As much of configuration space as holds the capabilities that matter here."""

_MSIX: Final = 0x11
_MSIX_FIELDS: Final = struct.Struct("<HII")
assert _MSIX_FIELDS.size == 10
_ENTRY_SIZE: Final = 16
_RESETTING: Final[Mapping[int, tuple[int, int]]] = {0x10: (8, 2), 0x01: (4, 2), 0x13: (4, 1)}
"""By capability: offset and size of the register that can reset the function."""


@attrs.frozen
class ConfigFacts:
    """`holes`: the MSI-X table and pending bits.  `resetting`: (offset, end) of registers whose
    being written may reset the function."""

    holes: tuple[Hole, ...]
    resetting: tuple[tuple[int, int], ...]

    def may_reset(self, offset: int, size: int) -> bool:
        """Whether writing `size` bytes at `offset` may reset the function."""
        return any(offset < end and start < offset + size for start, end in self.resetting)


def read_config_facts(config: bytes, name: str) -> ConfigFacts:
    """Of the first 256 bytes of configuration space.

    Raises HostError, which names the function `name`, if its capability list leads nowhere.
    """
    holes: list[Hole] = []
    resetting: list[tuple[int, int]] = []
    for number, position in _capabilities(config, name):
        if number == _MSIX:
            control, table, pending = _MSIX_FIELDS.unpack_from(config, position + 2)
            entries = (control & 0x7FF) + 1
            holes.append(Hole(table & 7, table & ~7, entries * _ENTRY_SIZE))
            holes.append(Hole(pending & 7, pending & ~7, -(-entries // 64) * 8))
        if register := _RESETTING.get(number):
            offset, size = register
            resetting.append((position + offset, position + offset + size))
    return ConfigFacts(tuple(holes), tuple(resetting))


def _capabilities(config: bytes, name: str) -> list[tuple[int, int]]:
    """Number and position of each capability in the list."""
    found: list[tuple[int, int]] = []
    if not config[STATUS] & HAS_CAPABILITIES:
        return found
    position = config[CAPABILITIES_POINTER] & ~3
    while position:
        seen = any(position == before for _, before in found)
        if seen or not HEADER_SIZE <= position <= CONFIG_SIZE - 2 - _MSIX_FIELDS.size:
            raise HostError(
                f"{name}: its capability list goes to {position:#x} after "
                f"{[hex(before) for _, before in found]}; the device is broken, or has gone"
            )
        found.append((config[position], position))
        position = config[position + 1] & ~3
    return found

"""Where a virtio function keeps its structures, as vendor capabilities (virtio 1.4, Virtio Over PCI
Bus, Virtio Structure PCI Capabilities).

A capability, 16 bytes with its header: ID 0x09 u8, next u8, cap_len u8, cfg_type u8, bar u8, id u8,
2 bytes of padding, offset u32, length u32; a notify capability adds notify_off_multiplier u32, the
configuration access one a window of 4 bytes.  Little-endian.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_user_virtio.pci.config_space import ConfigSpace

VENDOR_CAPABILITY_ID: Final = 0x09
_BODY: Final = struct.Struct("<BBBB2xII")
assert _BODY.size == 14
_U32: Final = struct.Struct("<I")
_BAR: Final = 4
_OFFSET: Final = 8
_LENGTH: Final = 12
_DATA: Final = 16
_DATA_SIZE: Final = 4


class CfgType(enum.IntEnum):
    """cfg_type: which structure a capability locates."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4
    PCI = 5
    SHARED_MEMORY = 8
    VENDOR = 9


@attrs.frozen
class Structure:
    """A structure at `offset` of BAR `bar`, `length` bytes."""

    cfg_type: CfgType
    bar: int
    offset: int
    length: int


def add_structure(config: ConfigSpace, structure: Structure, extra: bytes = b"") -> int:
    """Add the capability that locates `structure`; `extra` follows the common part."""
    return config.add_capability(VENDOR_CAPABILITY_ID, _encode(structure, extra))


def add_notify_structure(config: ConfigSpace, structure: Structure, multiplier: int) -> int:
    """Add the notify capability; a queue's address is queue_notify_off times `multiplier`."""
    return add_structure(config, structure, _U32.pack(multiplier))


def add_config_access(
    config: ConfigSpace,
    read: Callable[[int, int, int], bytes],
    write: Callable[[int, int, bytes], None],
) -> int:
    """Add VIRTIO_PCI_CAP_PCI_CFG: a window through which configuration space reaches the BARs.

    `read(bar, offset, count)` and `write(bar, offset, data)` are called for accesses of 1, 2 or 4
    bytes, naturally aligned; whether they lie inside a BAR is theirs to check.
    """
    body = _encode(Structure(CfgType.PCI, 0, 0, 0), bytes(_DATA_SIZE))
    mask = _BODY.pack(0, 0, 0xFF, 0, 0xFFFF_FFFF, 0xFFFF_FFFF) + b"\xff" * _DATA_SIZE
    offset = config.add_capability(VENDOR_CAPABILITY_ID, body, mask)
    config.trap(offset + _DATA, _DATA_SIZE, _Window(config, offset, read, write))
    return offset


def _encode(structure: Structure, extra: bytes) -> bytes:
    cap_len = 2 + _BODY.size + len(extra)
    return (
        _BODY.pack(
            cap_len, structure.cfg_type, structure.bar, 0, structure.offset, structure.length
        )
        + extra
    )


class _Window:
    """The data field of the configuration access capability at `capability`."""

    def __init__(
        self,
        config: ConfigSpace,
        capability: int,
        read: Callable[[int, int, int], bytes],
        write: Callable[[int, int, bytes], None],
    ) -> None:
        self._registers = config.registers
        self._capability = capability
        self._read = read
        self._write = write

    def _target(self) -> tuple[int, int, int] | None:
        bar = self._registers.load(self._capability + _BAR, 1)
        offset = self._registers.load(self._capability + _OFFSET, 4)
        length = self._registers.load(self._capability + _LENGTH, 4)
        if length not in (1, 2, 4) or offset % length:
            return None
        return bar, offset, length

    def read(self, offset: int, count: int) -> bytes:
        target = self._target()
        data = b"" if target is None else self._read(*target)
        return data.ljust(_DATA_SIZE, b"\0")[offset : offset + count]

    def write(self, offset: int, data: bytes) -> None:
        target = self._target()
        if target is not None and offset == 0 and len(data) >= target[2]:
            self._write(target[0], target[1], data[: target[2]])

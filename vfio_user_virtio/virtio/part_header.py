"""What a device part is called: its type, its selector, its place in the order (virtio 1.4, Device
parts; Network Device, Device parts).

The header of every part, little-endian:

- ``0`` u16 part_type: `PartType`
- ``2`` u8 flags: bit 0 OPTIONAL
- ``3`` u8 reserved: 0
- ``4`` selector, 8 bytes: of PCI_COMMON_CFG the register's offset u32, of VQ_CFG and VQ_NOTIFY_CFG
  the queue's index u16, of CVQ_CFG class u8 and command u8; the rest of it, and all of it for
  other parts, is 0
- ``12`` u32 length: bytes of the value that follows, without this header

A reserved byte that is not 0 is kept, so that an image is written back as it came.  Types that are
not defined have names too: messages and `image show` need one for any part.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.virtio.net_control import ControlClass

if TYPE_CHECKING:
    from collections.abc import Mapping

_HEADER: Final = struct.Struct("<HBB8sI")
PART_HEADER_SIZE: Final = 16
assert _HEADER.size == PART_HEADER_SIZE
_REGISTER: Final = struct.Struct("<I4x")
_QUEUE: Final = struct.Struct("<H6x")
_CONTROL: Final = struct.Struct("<BB6x")
SELECTOR_SIZE: Final = 8
assert {_REGISTER.size, _QUEUE.size, _CONTROL.size} == {SELECTOR_SIZE}

NO_SELECTOR: Final = bytes(SELECTOR_SIZE)
OPTIONAL: Final = 1 << 0
"""The flag of a part that its receiver may ignore."""


class PartType(enum.IntEnum):
    """Types of the parts of a virtio-net device on PCI.  Their order is the canonical one: the
    standard puts the common parts so, and says nothing of CVQ_CFG."""

    DEV_FEATURES = 0x100
    DRV_FEATURES = 0x101
    PCI_COMMON_CFG = 0x102
    DEVICE_STATUS = 0x103
    VQ_CFG = 0x104
    VQ_NOTIFY_CFG = 0x105
    CVQ_CFG = 0x200


class ControlCommand(enum.Enum):
    """Control commands that CVQ_CFG parts carry, as (class, command): the state that the last such
    command left.  VLAN_ADD stands for the whole table of VLANs."""

    RX_PROMISC = (ControlClass.RX, 0)
    RX_ALLMULTI = (ControlClass.RX, 1)
    RX_ALLUNI = (ControlClass.RX, 2)
    RX_NOMULTI = (ControlClass.RX, 3)
    RX_NOUNI = (ControlClass.RX, 4)
    RX_NOBCAST = (ControlClass.RX, 5)
    MAC_TABLE_SET = (ControlClass.MAC, 0)
    MAC_ADDR_SET = (ControlClass.MAC, 1)
    VLAN_ADD = (ControlClass.VLAN, 0)
    ANNOUNCE_ACK = (ControlClass.ANNOUNCE, 0)
    MQ_VQ_PAIRS_SET = (ControlClass.MQ, 0)
    MQ_RSS_CONFIG = (ControlClass.MQ, 1)
    MQ_HASH_CONFIG = (ControlClass.MQ, 2)


@attrs.frozen
class CommonRegister:
    """A register of the common configuration structure; `size` in bytes."""

    name: str
    size: int


COMMON_REGISTERS: Final[Mapping[int, CommonRegister]] = {
    0: CommonRegister("device_feature_select", 4),
    4: CommonRegister("device_feature", 4),
    8: CommonRegister("driver_feature_select", 4),
    12: CommonRegister("driver_feature", 4),
    16: CommonRegister("config_msix_vector", 2),
    18: CommonRegister("num_queues", 2),
    20: CommonRegister("device_status", 1),
    21: CommonRegister("config_generation", 1),
    22: CommonRegister("queue_select", 2),
    24: CommonRegister("queue_size", 2),
    26: CommonRegister("queue_msix_vector", 2),
    28: CommonRegister("queue_enable", 2),
    30: CommonRegister("queue_notify_off", 2),
    32: CommonRegister("queue_desc", 8),
    40: CommonRegister("queue_driver", 8),
    48: CommonRegister("queue_device", 8),
    56: CommonRegister("queue_notif_config_data", 2),
    58: CommonRegister("queue_reset", 2),
    60: CommonRegister("admin_queue_index", 2),
    62: CommonRegister("admin_queue_num", 2),
}
"""Registers by offset: what a PCI_COMMON_CFG part may be of, at their natural size."""

COMMON_CFG_OFFSETS: Final = (0, 8, 16, 18, 21, 22)
"""Registers that are in no other part: the features, the status and a queue's have their own."""


@attrs.frozen
class PartHeader:
    """The header of one part; `type` may be a number no `PartType` has.  `length` in bytes."""

    type: int
    flags: int = 0
    selector: bytes = NO_SELECTOR
    length: int = 0
    reserved: int = 0

    @property
    def optional(self) -> bool:
        """Whether its receiver may ignore the part."""
        return bool(self.flags & OPTIONAL)

    @property
    def register(self) -> int:
        """The offset that the selector of a PCI_COMMON_CFG part names."""
        return int(_REGISTER.unpack(self.selector)[0])

    @property
    def queue(self) -> int:
        """The index that the selector of a VQ_CFG or VQ_NOTIFY_CFG part names."""
        return int(_QUEUE.unpack(self.selector)[0])

    @property
    def control(self) -> ControlCommand | None:
        """The command that the selector of a CVQ_CFG part names; None if it may not."""
        return _CONTROLS.get((self.selector[0], self.selector[1]))

    @property
    def key(self) -> tuple[int, int]:
        """What the part is of: equal for parts that stand for the same thing, and in the canonical
        order (DEV_FEATURES first), with registers, queues and commands ascending."""
        match self.type:
            case PartType.PCI_COMMON_CFG:
                return self.type, self.register
            case PartType.VQ_CFG | PartType.VQ_NOTIFY_CFG:
                return self.type, self.queue
            case PartType.CVQ_CFG:
                return self.type, self.selector[0] << 8 | self.selector[1]
            case _ if self.type in _TYPES:
                return self.type, 0
            case _:
                return self.type, int.from_bytes(self.selector, "little")

    @property
    def name(self) -> str:
        """Such as "VQ_CFG queue 3" or "CVQ_CFG MAC_TABLE_SET"."""
        match self.type:
            case PartType.PCI_COMMON_CFG:
                known = COMMON_REGISTERS.get(self.register)
                return f"PCI_COMMON_CFG {known.name if known else f'offset {self.register}'}"
            case PartType.VQ_CFG | PartType.VQ_NOTIFY_CFG:
                return f"{PartType(self.type).name} queue {self.queue}"
            case PartType.CVQ_CFG if self.control is not None:
                return f"CVQ_CFG {self.control.name}"
            case PartType.CVQ_CFG:
                return f"CVQ_CFG class {self.selector[0]} command {self.selector[1]}"
            case _ if self.type in _TYPES:
                return PartType(self.type).name
            case _ if self.selector == NO_SELECTOR:
                return f"part {self.type:#05x}"
            case _:
                return f"part {self.type:#05x} {self.selector.hex()}"


_TYPES: Final = frozenset(int(type_) for type_ in PartType)
_CONTROLS: Final[Mapping[tuple[int, int], ControlCommand]] = {
    command.value: command for command in ControlCommand
}


def register_selector(offset: int) -> bytes:
    """The selector of a PCI_COMMON_CFG part."""
    return _REGISTER.pack(offset)


def queue_selector(index: int) -> bytes:
    """The selector of a VQ_CFG or VQ_NOTIFY_CFG part."""
    return _QUEUE.pack(index)


def control_selector(command: ControlCommand) -> bytes:
    """The selector of a CVQ_CFG part."""
    return _CONTROL.pack(*command.value)


def encode_part_header(header: PartHeader) -> bytes:
    return _HEADER.pack(header.type, header.flags, header.reserved, header.selector, header.length)


def decode_part_header_untrusted(data: bytes | bytearray, offset: int = 0) -> PartHeader:
    """The header in the 16 bytes at `offset`, which the caller knows to be there."""
    type_, flags, reserved, selector, length = _HEADER.unpack_from(data, offset)
    return PartHeader(type_, flags, selector, length, reserved)

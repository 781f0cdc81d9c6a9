"""VFIO_USER_DEVICE_GET_INFO: what kind of device, how many regions, how many interrupt indices.

Source: vfio-user, VFIO_USER_DEVICE_GET_INFO.  Payload, both ways, little-endian:

- ``0`` u32 argsz: the largest reply the client takes; in the reply, the size of the reply
- ``4`` u32 flags: `DeviceFlags` (reply)
- ``8`` u32 num_regions (reply)
- ``12`` u32 num_irqs (reply)

QEMU wants flag PCI, 8…100 regions and 3…50 interrupt indices, and resets only with flag RESET.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.device import DeviceFlags, DeviceInfo
from vfio_user_virtio.protocol.checks import require_argsz, require_reply, require_request

if TYPE_CHECKING:
    from vfio_user_virtio.protocol.header import Buffer

DEVICE_INFO: Final = struct.Struct("<IIII")
DEVICE_INFO_SIZE: Final = 16
assert DEVICE_INFO.size == DEVICE_INFO_SIZE

_NAME: Final = "DEVICE_GET_INFO"


def encode_device_info_request() -> bytes:
    return DEVICE_INFO.pack(DEVICE_INFO_SIZE, 0, 0, 0)


def decode_device_info_request_untrusted(payload: Buffer) -> None:
    """Nothing is asked but the reply.  Raises ClientError(EINVAL) if there is no room for it."""
    require_request(payload, DEVICE_INFO_SIZE, _NAME)
    require_argsz(DEVICE_INFO.unpack_from(payload)[0], DEVICE_INFO_SIZE, _NAME)


def encode_device_info_reply(info: DeviceInfo) -> bytes:
    return DEVICE_INFO.pack(DEVICE_INFO_SIZE, info.flags, info.num_regions, info.num_irqs)


def decode_device_info_reply_untrusted(payload: Buffer) -> DeviceInfo:
    """Raises ConnectionLost."""
    require_reply(payload, DEVICE_INFO_SIZE, _NAME)
    _, flags, num_regions, num_irqs = DEVICE_INFO.unpack_from(payload)
    return DeviceInfo(DeviceFlags(flags), num_regions, num_irqs)

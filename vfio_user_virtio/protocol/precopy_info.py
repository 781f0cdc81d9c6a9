"""MIG_GET_PRECOPY_INFO: how much there is to read while a device still runs.

No release of the specification has it.  It is spoken as the one public QEMU fork with vfio-user
migration does, by number 19, with the data of the kernel's VFIO_MIG_GET_PRECOPY_INFO both ways; the
request's is all zeros.  Little-endian:

- ``0`` u32 argsz: 24 in a reply; in a request anything, since the fork sends 0
- ``4`` u32 flags: 0
- ``8`` u64 initial_bytes
- ``16`` u64 dirty_bytes
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.protocol.checks import require_exact_reply, require_request

if TYPE_CHECKING:
    from vfio_user_virtio.protocol.header import Buffer

PRECOPY_INFO: Final = struct.Struct("<IIQQ")
PRECOPY_INFO_SIZE: Final = 24
assert PRECOPY_INFO.size == PRECOPY_INFO_SIZE

_NAME: Final = "MIG_GET_PRECOPY_INFO"


def encode_precopy_info_request() -> bytes:
    return bytes(PRECOPY_INFO_SIZE)


def decode_precopy_info_request_untrusted(payload: Buffer) -> None:
    """Raises ClientError(EINVAL)."""
    require_request(payload, PRECOPY_INFO_SIZE, _NAME)


def encode_precopy_info_reply(initial_bytes: int, dirty_bytes: int) -> bytes:
    return PRECOPY_INFO.pack(PRECOPY_INFO_SIZE, 0, initial_bytes, dirty_bytes)


def decode_precopy_info_reply_untrusted(payload: Buffer) -> tuple[int, int]:
    """initial_bytes and dirty_bytes.  Raises ConnectionLost."""
    require_exact_reply(payload, PRECOPY_INFO_SIZE, _NAME)
    _, _, initial_bytes, dirty_bytes = PRECOPY_INFO.unpack(payload)
    return initial_bytes, dirty_bytes

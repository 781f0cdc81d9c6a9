"""VFIO_USER_DEVICE_FEATURE: the envelope of device features.

Source: vfio-user, VFIO_USER_DEVICE_FEATURE.  Payload, both ways, little-endian:

- ``0`` u32 argsz: the largest reply the client takes; in the reply, its size
- ``4`` u32 flags: bits 0-15 the feature, bits 16-18 `FeatureOperation`
- ``8`` data of the feature: in a SET request, and in a GET request and reply

GET and SET exclude each other but with PROBE, which asks whether the operations beside it are
supported.  A reply to SET or PROBE repeats the request.

What the data is, `migration` and `dma_logging` say.  An unknown feature is not this module's
concern: the device answers ENOTTY (QEMU's newest client takes EINVAL for the same).
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.device import FeatureOperation
from vfio_user_virtio.limits import MAX_MESSAGE_SIZE
from vfio_user_virtio.protocol.checks import (
    distrust,
    refuse,
    require_argsz,
    require_reply,
    require_request,
)

if TYPE_CHECKING:
    from vfio_user_virtio.protocol.header import Buffer

DEVICE_FEATURE: Final = struct.Struct("<II")
DEVICE_FEATURE_SIZE: Final = 8
assert DEVICE_FEATURE.size == DEVICE_FEATURE_SIZE

FEATURE_MASK: Final = 0xFFFF

_OPERATIONS: Final = int(FeatureOperation.GET | FeatureOperation.SET | FeatureOperation.PROBE)
_EXCLUSIVE: Final = FeatureOperation.GET | FeatureOperation.SET
_NAME: Final = "DEVICE_FEATURE"


class Feature(enum.IntEnum):
    """Device features by number (the kernel's VFIO_DEVICE_FEATURE_…)."""

    MIGRATION = 1
    MIG_DEVICE_STATE = 2
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8
    MIG_DATA_SIZE = 9


@attrs.frozen
class FeatureRequest:
    """`operation` on feature `index`; `argsz` is the largest reply payload taken, in bytes."""

    index: int
    operation: FeatureOperation
    data: bytes
    argsz: int


def encode_feature_request(request: FeatureRequest) -> bytes:
    return DEVICE_FEATURE.pack(request.argsz, request.index | request.operation) + request.data


def decode_feature_request_untrusted(payload: Buffer) -> FeatureRequest:
    """Raises ClientError(EINVAL)."""
    require_request(payload, DEVICE_FEATURE_SIZE, _NAME)
    argsz, flags = DEVICE_FEATURE.unpack_from(payload)
    require_argsz(argsz, DEVICE_FEATURE_SIZE, _NAME)
    operation = flags & ~FEATURE_MASK
    if not operation or operation & ~_OPERATIONS or operation == _EXCLUSIVE:
        raise refuse(f"{_NAME} has flags {flags:#x}; GET, SET, or PROBE with any of them is needed")
    return FeatureRequest(
        flags & FEATURE_MASK,
        FeatureOperation(operation),
        bytes(payload[DEVICE_FEATURE_SIZE:]),
        argsz,
    )


def encode_feature_reply(request: FeatureRequest, data: bytes = b"") -> bytes:
    """`data` counts for GET only, and is left out (see argsz) if the client has no room for it."""
    if request.operation != FeatureOperation.GET:
        return encode_feature_request(request)
    needed = DEVICE_FEATURE_SIZE + len(data)
    head = DEVICE_FEATURE.pack(needed, request.index | request.operation)
    return head + data if needed <= request.argsz else head


def decode_feature_reply_untrusted(payload: Buffer, request: FeatureRequest) -> FeatureRequest:
    """What came back: for GET, the data; if argsz is larger than asked, ask again with it.

    Raises ConnectionLost, also if the reply is about something else than the request.
    """
    require_reply(payload, DEVICE_FEATURE_SIZE, _NAME)
    argsz, flags = DEVICE_FEATURE.unpack_from(payload)
    if flags != request.index | request.operation:
        raise distrust(f"the reply to {_NAME} has flags {flags:#x}, not those of the request")
    if argsz > MAX_MESSAGE_SIZE:
        raise distrust(f"the reply to {_NAME} has argsz {argsz}, at most {MAX_MESSAGE_SIZE}")
    data = bytes(payload[DEVICE_FEATURE_SIZE:])
    return FeatureRequest(request.index, request.operation, data, argsz)

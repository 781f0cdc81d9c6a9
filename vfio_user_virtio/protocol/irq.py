"""VFIO_USER_DEVICE_GET_IRQ_INFO and VFIO_USER_DEVICE_SET_IRQS.

Source: vfio-user, the sections of those names.  GET_IRQ_INFO, both ways, little-endian:

- ``0`` u32 argsz: the largest reply the client takes; in the reply, the size of the reply
- ``4`` u32 flags: `IrqFlags` (reply)
- ``8`` u32 index
- ``12`` u32 count: of sub-indices (reply)

SET_IRQS, request; the reply is empty:

- ``0`` u32 argsz: the size of this request
- ``4`` u32 flags: one of bits 0-2, the kind of data: none, bool, eventfd; and one of bits 3-5,
  `IrqAction`
- ``8`` u32 index
- ``12`` u32 start and ``16`` u32 count: the sub-indices meant
- ``20`` data: `count` bytes if bool, nothing otherwise; eventfds travel beside, one per sub-index,
  or none at all to de-assign the range

QEMU arms MSI-X vector by vector if the index has flag NORESIZE, in batches if not.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.device import IrqAction, IrqFlags, IrqInfo, IrqRequest
from vfio_user_virtio.protocol.checks import (
    U32_END,
    distrust,
    refuse,
    require_argsz,
    require_reply,
    require_request,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_user_virtio.protocol.header import Buffer

IRQ_INFO: Final = struct.Struct("<IIII")
IRQ_INFO_SIZE: Final = 16
assert IRQ_INFO.size == IRQ_INFO_SIZE

SET_IRQS: Final = struct.Struct("<IIIII")
SET_IRQS_SIZE: Final = 20
assert SET_IRQS.size == SET_IRQS_SIZE

DATA_NONE: Final = 1 << 0
DATA_BOOL: Final = 1 << 1
DATA_EVENTFD: Final = 1 << 2
_DATA_MASK: Final = DATA_NONE | DATA_BOOL | DATA_EVENTFD

_ACTIONS: Final = {action.value: action for action in IrqAction}

_INFO: Final = "DEVICE_GET_IRQ_INFO"
_SET: Final = "DEVICE_SET_IRQS"


def encode_irq_info_request(index: int) -> bytes:
    return IRQ_INFO.pack(IRQ_INFO_SIZE, 0, index, 0)


def decode_irq_info_request_untrusted(payload: Buffer) -> int:
    """The index asked for.  Raises ClientError(EINVAL)."""
    require_request(payload, IRQ_INFO_SIZE, _INFO)
    argsz, _, index, _ = IRQ_INFO.unpack_from(payload)
    require_argsz(argsz, IRQ_INFO_SIZE, _INFO)
    return int(index)


def encode_irq_info_reply(index: int, info: IrqInfo) -> bytes:
    return IRQ_INFO.pack(IRQ_INFO_SIZE, info.flags, index, info.count)


def decode_irq_info_reply_untrusted(payload: Buffer, index: int) -> IrqInfo:
    """Raises ConnectionLost, also if the reply is about another index than the one asked for."""
    require_reply(payload, IRQ_INFO_SIZE, _INFO)
    _, flags, about, count = IRQ_INFO.unpack_from(payload)
    if about != index:
        raise distrust(f"the reply to {_INFO} for index {index} is about index {about}")
    return IrqInfo(count, IrqFlags(flags))


def encode_set_irqs_request(request: IrqRequest) -> bytes:
    """The payload; `request.eventfds` are to be sent beside it."""
    kind, data = DATA_NONE, b""
    if request.eventfds is not None:
        kind = DATA_EVENTFD
    elif request.bools is not None:
        kind, data = DATA_BOOL, bytes(request.bools)
    flags = kind | request.action.value
    argsz = SET_IRQS_SIZE + len(data)
    return SET_IRQS.pack(argsz, flags, request.index, request.start, request.count) + data


def decode_set_irqs_request_untrusted(payload: Buffer, fds: Sequence[int] = ()) -> IrqRequest:
    """The request, with `fds`, those of its message, as its eventfds.

    Raises ClientError(EINVAL), and then the fds are still the message's to close.  Whether the
    index has those sub-indices is the session's to check: `check_irq_range`.
    """
    require_request(payload, SET_IRQS_SIZE, _SET)
    argsz, flags, index, start, count = SET_IRQS.unpack_from(payload)
    require_argsz(argsz, SET_IRQS_SIZE, _SET)
    kind = flags & _DATA_MASK
    action = _ACTIONS.get(flags & ~_DATA_MASK)
    if kind not in (DATA_NONE, DATA_BOOL, DATA_EVENTFD) or action is None:
        raise refuse(
            f"{_SET} has flags {flags:#x}; exactly one kind of data and one action are needed"
        )
    if start + count > U32_END:
        raise refuse(f"{_SET} of {count} sub-indices from {start} passes the end of 32 bits")
    size = SET_IRQS_SIZE + (count if kind == DATA_BOOL else 0)
    if len(payload) != size or argsz > size:
        raise refuse(
            f"{_SET} has {len(payload)} bytes and argsz {argsz}, "
            f"its flags {flags:#x} and count {count} make {size}"
        )
    if kind == DATA_EVENTFD:
        if action is not IrqAction.TRIGGER:
            raise refuse(f"{_SET} has eventfds for {action.name}, only TRIGGER takes them")
        if len(fds) not in (0, count):
            raise refuse(f"{_SET} of {count} sub-indices brings {len(fds)} eventfds")
        return IrqRequest(index, start, count, action, eventfds=tuple(fds))
    if fds:
        raise refuse(f"{_SET} brings {len(fds)} eventfds and flags {flags:#x} that want none")
    if kind == DATA_BOOL:
        bools = tuple(byte != 0 for byte in payload[SET_IRQS_SIZE:])
        return IrqRequest(index, start, count, action, bools=bools)
    if action is IrqAction.TRIGGER and count == 0 and start:
        raise refuse(f"{_SET} disables the index, but from sub-index {start}; start must be 0")
    return IrqRequest(index, start, count, action)


def check_irq_range(request: IrqRequest, info: IrqInfo) -> None:
    """Raises ClientError(EINVAL) unless the index has the sub-indices; disabling is always fine."""
    if request.start + request.count > info.count:
        raise refuse(
            f"{_SET} of {request.count} sub-indices from {request.start}; "
            f"index {request.index} has {info.count}"
        )

"""The two ways to find fault with a payload, so that every decoder says it alike.

`refuse` is for requests: the sender gets an error reply with that errno.  `distrust` is for
replies: there is nobody to answer.  See the package head.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.errors import ClientError, ConnectionLost

if TYPE_CHECKING:
    from vfio_user_virtio.protocol.header import Buffer

U32_END: Final = 1 << 32


def refuse(message: str, code: int = errno.EINVAL) -> ClientError:
    return ClientError(code, message)


def distrust(message: str) -> ConnectionLost:
    return ConnectionLost(message)


def require_request(payload: Buffer, size: int, name: str) -> None:
    """Raises ClientError(EINVAL) unless the request `name` has at least `size` bytes."""
    if len(payload) < size:
        raise refuse(f"{name} has a payload of {len(payload)} bytes, {size} are needed")


def require_argsz(argsz: int, size: int, name: str) -> None:
    """Raises ClientError(EINVAL) unless `argsz` allows at least `size` bytes."""
    if argsz < size:
        raise refuse(f"{name} has argsz {argsz}, at least {size} is needed")


def require_reply(payload: Buffer, size: int, name: str) -> None:
    """Raises ConnectionLost unless the reply to `name` has at least `size` bytes."""
    if len(payload) < size:
        raise distrust(
            f"the reply to {name} has a payload of {len(payload)} bytes, {size} are needed"
        )


def require_exact_reply(payload: Buffer, size: int, name: str) -> None:
    """Raises ConnectionLost unless the reply to `name` has exactly `size` bytes."""
    if len(payload) != size:
        raise distrust(
            f"the reply to {name} has a payload of {len(payload)} bytes, {size} were expected"
        )

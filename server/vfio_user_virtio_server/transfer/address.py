"""Where a transfer is listened for: a path of a UNIX socket, or a host and a port."""

from __future__ import annotations

from typing import TypeAlias

import attrs

from vfio_user_virtio_server import values


@attrs.frozen
class TcpAddress:
    """A port of a host; whoever reaches it is let in."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


Address: TypeAlias = str | TcpAddress


def parse_address(text: str) -> Address:
    """``/path``, ``./path``, ``host:port`` or ``[host]:port``.  Raises ValueError."""
    if "/" in text:
        return values.parse_socket_path(text)
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host:
        raise ValueError(f"{text!r} is no address; write a path with a /, or HOST:PORT")
    number = values.parse_number(port)
    if not 1 <= number <= 65_535:
        raise ValueError(f"{number} is no port; it can be 1 to 65535")
    return TcpAddress(host, number)

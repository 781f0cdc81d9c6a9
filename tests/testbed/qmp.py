"""A QMP client: QEMU's monitor as JSON lines (QEMU's docs/interop/qmp-spec.rst).

One command at a time; events that arrive meanwhile are kept for the test to look at.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import trio

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


class QmpError(Exception):
    """QEMU refused a command, or ended."""


class Qmp:
    """Over a connected stream; `start` comes first."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self.events: list[dict[str, Json]] = []

    async def start(self) -> None:
        """Takes the greeting and leaves negotiation mode."""
        await self._receive()
        await self.execute("qmp_capabilities")

    async def execute(self, command: str, **arguments: Json) -> Json:
        """The command's return value; raises `QmpError`."""
        request = {"execute": command, "arguments": arguments}
        await self._stream.send_all(json.dumps(request).encode() + b"\n")
        while True:
            message = await self._receive()
            if "error" in message:
                raise QmpError(f"{command}: {message['error']}")
            if "return" in message:
                return message["return"]
            self.events.append(message)

    async def _receive(self) -> dict[str, Json]:
        while b"\n" not in self._buffer:
            data = await self._stream.receive_some()
            if not data:
                raise QmpError("QEMU closed its monitor")
            self._buffer += data
        line, _, rest = self._buffer.partition(b"\n")
        self._buffer = rest
        message: dict[str, Json] = json.loads(line)
        return message

"""The control commands of virtio-net by name (virtio 1.4, Network Device, Control Virtqueue)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vfio_user_virtio.virtio.net_control import ControlClass

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

RX_MODES: Final = ("promisc", "allmulti", "alluni", "nomulti", "nouni", "nobcast")
"""Commands of class RX, by their number."""


class ControlRefused(Exception):
    """The device answered a control command with something else than OK."""


class ControlCommands:
    """Each method sends one command and raises ControlRefused unless the answer is OK.

    `execute(class, command, data)` sends it and returns the ack byte.
    """

    def __init__(self, execute: Callable[[int, int, bytes], Awaitable[int]]) -> None:
        self._execute = execute

    async def set_rx_mode(self, mode: str, on: bool) -> None:
        """Set one of `RX_MODES`."""
        await self._must(ControlClass.RX, RX_MODES.index(mode), bytes((on,)))

    async def set_mac_table(self, unicast: Sequence[bytes], multicast: Sequence[bytes]) -> None:
        """Replace the filter tables; addresses are 6 bytes."""
        data = struct.pack("<I", len(unicast)) + b"".join(unicast)
        data += struct.pack("<I", len(multicast)) + b"".join(multicast)
        await self._must(ControlClass.MAC, 0, data)

    async def set_mac(self, mac: bytes) -> None:
        await self._must(ControlClass.MAC, 1, mac)

    async def add_vlan(self, vlan: int) -> None:
        await self._must(ControlClass.VLAN, 0, struct.pack("<H", vlan))

    async def remove_vlan(self, vlan: int) -> None:
        await self._must(ControlClass.VLAN, 1, struct.pack("<H", vlan))

    async def acknowledge_announcement(self) -> None:
        await self._must(ControlClass.ANNOUNCE, 0, b"")

    async def set_pairs(self, pairs: int) -> None:
        """Use that many queue pairs."""
        await self._must(ControlClass.MQ, 0, struct.pack("<H", pairs))

    async def set_offloads(self, offloads: int) -> None:
        """Take exactly `offloads`, a word of GUEST_… feature bits, unfinished from now on."""
        await self._must(ControlClass.GUEST_OFFLOADS, 0, struct.pack("<Q", offloads))

    async def _must(self, command_class: ControlClass, command: int, data: bytes) -> None:
        ack = await self._execute(command_class, command, data)
        if ack != 0:
            raise ControlRefused(
                f"{command_class.name} command {command} with {data.hex(' ') or 'no data'}: "
                f"the device answered {ack}"
            )

"""A member as an operator sees it: what it has counted, its guest's memory, and how to wake both
ends when they may have missed each other.

Apart from `Member`, because none of it is what a client or the switch asks for.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.errors import ClientError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vfio_user_virtio.backends.software.member import Member
    from vfio_user_virtio.backends.software.queues import Queues
    from vfio_user_virtio.backends.software.switch import Switch
    from vfio_user_virtio.backends.software.switch_port import PortStatistics
    from vfio_user_virtio.memory.access import GuestAccess


class MemberOperator:
    """`member`, whose queues are `queues`, at `switch`."""

    offers: Final = frozenset({"memory", "replay", "announce"})

    def __init__(self, member: Member, queues: Queues, switch: Switch) -> None:
        self._member = member
        self._queues = queues
        self._switch = switch

    def counters(self) -> dict[str, dict[str, int]]:
        """All that is counted, by group: of the device, of its port and of the uplinks."""
        member = self._member
        counted = {
            "device": attrs.asdict(member.statistics()),
            "interrupts": attrs.asdict(member.function.interrupts.statistics()),
        }
        counted |= _of_port("port", self._switch.statistics(member))
        for number, uplink in enumerate(self._switch.uplinks):
            name = f"uplink{number or ''}"
            counted |= _of_port(name, self._switch.statistics(uplink))
        return counted

    @property
    def guest_access(self) -> GuestAccess | None:
        """The client's memory; None without a client."""
        return self._queues.access

    def replay(self) -> None:
        """Look at each queue as if its driver had notified, and send each interrupt once.

        Raises ClientError EBUSY if the member does not run.
        """
        member = self._member
        if not member.running:
            raise ClientError(errno.EBUSY, f"{member.name}: it does not run; resume it first")
        for index in range(member.config.num_queues):
            member.kick(index)
        member.work()
        member.function.interrupt_all()

    def announce(self) -> None:
        """Tell the network where the member is, and ask its driver to do so too."""
        self._member.announce()
        self._member.announce_to_network()


def _of_port(name: str, counted: PortStatistics) -> Mapping[str, dict[str, int]]:
    return {
        name: {
            "frames_in": counted.frames_in,
            "bytes_in": counted.bytes_in,
            "frames_out": counted.frames_out,
            "bytes_out": counted.bytes_out,
        },
        f"{name}_drops": {reason.name.lower(): count for reason, count in counted.drops.items()},
    }

"""The owner in software: members behind one switch, and what the switch is wired to.

This is the model of a PF with its VFs.  A member's id is its VF number; ids and MAC addresses are
unique within an owner.  An owner lives as long as the daemon, whoever connects to its members.

The link of a member that is alone on a wired switch is that of the uplink, as a Virtual Function's
is that of the port (``ip link set … vf 0 state auto``): a peer that is not there, a passt that has
ended or a TAP device that was deleted is a pulled cable to the guest, which can turn to another
interface, and when the peer is back, so is the link, and the guest asks for its address anew.  Two
members or more always have their link (``state enable``), since they reach each other without an
uplink, and to take that from them would be worse than to lose frames.  A datagram uplink has no
peer that could be missed, and a TAP device that is only set down is not noticed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import trio

from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.alarm import Alarm
from vfio_user_virtio.backends.software.member import Member
from vfio_user_virtio.backends.software.ports import Uplink
from vfio_user_virtio.backends.software.rate_limit import TokenBucket
from vfio_user_virtio.backends.software.switch import Switch
from vfio_user_virtio.backends.software.vlan import ANY_VLAN, PortVlans
from vfio_user_virtio.errors import ConfigError

if TYPE_CHECKING:
    from vfio_user_virtio.backends.software.config import MemberConfig


class RunnableUplink(Uplink, Protocol):
    """An uplink with the task that reads from it."""

    async def run(self) -> None:
        """Move frames until cancelled, or until the uplink is of no more use."""
        ...


class Owner:
    """One owner, called `name` in logs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.members: dict[int, Member] = {}
        self._alarm = Alarm()
        self._uplinks: list[RunnableUplink] = []
        self.switch = Switch(
            alarm=self._alarm.set, clock=trio.current_time, changed=self._ports_changed
        )

    def add_member(self, config: MemberConfig, name: str | None = None) -> Member:
        """Make a member and plug it in.  Raises ConfigError if its id or address is taken."""
        if config.member_id in self.members:
            raise ConfigError(
                f"{self.name} has a member {config.member_id} already; ids are unique"
            )
        if len(self.members) == limits.MAX_MEMBERS:
            raise ConfigError(
                f"{self.name} has {limits.MAX_MEMBERS} members, the most there can be"
            )
        for other in self.members.values():
            if other.config.mac == config.mac:
                raise ConfigError(
                    f"members {other.config.member_id} and {config.member_id} of {self.name} have "
                    f"the same address {config.mac.hex(':')}; give one of them another"
                )
        member = Member(name or f"{self.name}/{config.member_id}", config, self.switch)
        self.members[config.member_id] = member
        self.switch.plug(
            member,
            member,
            vlans=ANY_VLAN if config.access_vlan is None else PortVlans(access=config.access_vlan),
            rate_limit=None if config.max_tx_rate is None else TokenBucket.of(config.max_tx_rate),
        )
        return member

    def add_uplink(self, uplink: RunnableUplink) -> None:
        """Wire the switch to `uplink`, which was made for `switch`; before `run`."""
        self._uplinks.append(uplink)
        self.switch.plug_uplink(uplink)

    def _ports_changed(self) -> None:
        alone = len(self.members) == 1 and len(self._uplinks) > 0
        wired = not alone or any(uplink.up for uplink in self._uplinks)
        for member in self.members.values():
            member.set_wired(wired)

    async def run(self) -> None:
        """Run the switch and its uplinks until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._alarm.run, self.switch.expired)
            for uplink in self._uplinks:
                nursery.start_soon(uplink.run)

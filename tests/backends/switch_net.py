"""A switch with members and an uplink, for the tests of the switch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from tests.backends.switch_ports import (
    BROADCAST,
    FakeAlarm,
    FakeClock,
    MemberPort,
    UplinkPort,
    ethernet,
    mac,
)
from vfio_user_virtio.backends.software.switch import Switch
from vfio_user_virtio.backends.software.vlan import PortVlans
from vfio_user_virtio.virtio.offload import NET_HEADER

if TYPE_CHECKING:
    from vfio_user_virtio.backends.software.switch_port import Drop


@attrs.define
class Net:
    """A switch, its clock and alarm, members a, b, c, … and an uplink."""

    switch: Switch
    clock: FakeClock
    alarm: FakeAlarm
    members: list[MemberPort]
    uplink: UplinkPort

    def drops(self, port: MemberPort) -> dict[Drop, int]:
        counts = self.switch.statistics(port).drops
        return {reason: count for reason, count in counts.items() if count}


def make_net(members: int = 2, *, vlans: dict[int, PortVlans] | None = None) -> Net:
    clock, alarm = FakeClock(), FakeAlarm()
    switch = Switch(alarm=alarm, clock=clock)
    ports = [MemberPort(switch, f"member {number}") for number in range(members)]
    for number, port in enumerate(ports):
        switch.plug(port, port, vlans=(vlans or {}).get(number, PortVlans()))
    uplink = UplinkPort(switch)
    switch.plug_uplink(uplink)
    return Net(switch, clock, alarm, ports, uplink)


def learn(net: Net) -> None:
    """Let everybody be known: member n has mac(n), mac(100) is behind the uplink."""
    for number, port in enumerate([*net.members, net.uplink]):
        port.send(ethernet(BROADCAST, mac(100 if port is net.uplink else number)))
    for port in [*net.members, net.uplink]:
        port.take()


def tcp_frame(size: int, gso_size: int) -> tuple[bytes, bytes]:
    """An unfinished TCP/IPv4 packet with `size` bytes of payload: header and frame."""
    total = 40 + size
    ip = bytes((0x45, 0)) + total.to_bytes(2, "big") + bytes((0, 0, 0, 0, 64, 6, 0, 0))
    ip += bytes((10, 0, 0, 1, 10, 0, 0, 2))
    tcp = bytes(12) + bytes((0x50, 0x10)) + bytes(6)
    header = NET_HEADER.pack(1, 1 if gso_size else 0, 54, gso_size, 34, 16, 0)
    return header, mac(1) + mac(0) + b"\x08\x00" + ip + tcp + bytes(size)


def is_direct(net: Net, port: MemberPort) -> bool:
    return net.switch.direct_receiver(net.uplink) is port

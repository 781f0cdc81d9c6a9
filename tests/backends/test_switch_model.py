"""The switch against a model: any sequence of frames, ports and times."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.backends.switch_ports import (
    BROADCAST,
    FakeAlarm,
    FakeClock,
    MemberPort,
    UplinkPort,
    ethernet,
    mac,
)
from vfio_user_virtio.backends.software.forwarding_table import ForwardingTable
from vfio_user_virtio.backends.software.switch import Switch
from vfio_user_virtio.backends.software.vlan import PortVlans

if TYPE_CHECKING:
    from vfio_user_virtio.backends.software.ports import Port
    from vfio_user_virtio.backends.software.switch_port import SwitchPort

AGE = 10.0
MAX_ENTRIES = 6
MAX_PER_PORT = 3

addresses = st.integers(0, 7).map(mac)
vlans = st.sampled_from([None, 0, 1, 2])
policies = st.sampled_from(
    [PortVlans(), PortVlans(access=1), PortVlans(access=2), PortVlans(allowed=frozenset({0, 1}))]
)


class SwitchMachine(RuleBasedStateMachine):
    """Frames reach exactly the ports that the model says, in the form that each port has.

    The model knows where each address was seen last, and when.  The table may forget (it is
    bounded) but may never know better: a frame goes where the model says, or is flooded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.table: ForwardingTable[SwitchPort] = ForwardingTable(
            age=AGE, max_entries=MAX_ENTRIES, max_per_place=MAX_PER_PORT
        )
        self.switch = Switch(alarm=FakeAlarm(), clock=self.clock, table=self.table)
        self.ports: dict[MemberPort, PortVlans] = {}
        self.seen: dict[tuple[int, bytes], tuple[Port, float]] = {}

    @precondition(lambda self: len(self.ports) < 5)
    @rule(policy=policies, uplink=st.booleans())
    def plug(self, policy: PortVlans, uplink: bool) -> None:
        if uplink:
            up = UplinkPort(self.switch)
            self.switch.plug_uplink(up, vlans=policy)
            self.ports[up] = policy
        else:
            port = MemberPort(self.switch, "member")
            self.switch.plug(port, port, vlans=policy)
            self.ports[port] = policy

    @precondition(lambda self: self.ports)
    @rule(data=st.data())
    def unplug(self, data: st.DataObject) -> None:
        port = data.draw(st.sampled_from(list(self.ports)))
        self.switch.unplug(port)
        del self.ports[port]
        self._forget(port)

    @precondition(lambda self: self.ports)
    @rule(data=st.data())
    def change_state(self, data: st.DataObject) -> None:
        port = data.draw(st.sampled_from(list(self.ports)))
        port.up = not port.up
        self.switch.refresh()
        if not port.up:
            self._forget(port)

    @rule(seconds=st.floats(0, 2 * AGE))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @precondition(lambda self: self.ports)
    @rule(
        data=st.data(),
        source=addresses,
        destination=addresses | st.just(BROADCAST),
        vlan=vlans,
        payload=st.binary(max_size=30),
    )
    def send(
        self,
        data: st.DataObject,
        source: bytes,
        destination: bytes,
        vlan: int | None,
        payload: bytes,
    ) -> None:
        port = data.draw(st.sampled_from(list(self.ports)))
        if self._plain_pair():
            self.seen.clear()  # nothing is learnt between two ports
            self.switch._table.clear()
        assert port.send(ethernet(destination, source, payload, vlan))
        got = {other: other.take() for other in self.ports}
        policy = self.ports[port]
        carried = (vlan or 0) if policy.access is None else policy.access
        if (policy.access is not None and vlan is not None) or not policy.carries(carried):
            assert not any(got.values())
            return
        eligible = {
            other
            for other, theirs in self.ports.items()
            if other is not port and other.up and theirs.carries(carried)
        }
        if not self._plain_pair():
            self.seen[carried, source] = (port, self.clock.now)
        place, when = self.seen.get((carried, destination), (None, 0.0))
        known = place is not None and self.clock.now - when <= AGE
        receivers = {other for other, frames in got.items() if frames}
        assert receivers == eligible or (known and receivers == {place} - {port})
        if not known:
            assert receivers == eligible
        for other in receivers:
            if self.ports[other].access is not None:
                form = None
            elif policy.access is not None:
                form = policy.access
            else:
                form = vlan
            assert got[other] == [ethernet(destination, source, payload, form)]

    @invariant()
    def bounded(self) -> None:
        assert len(self.table) <= MAX_ENTRIES

    def _plain_pair(self) -> bool:
        return len(self.ports) == 2 and all(policy.is_plain for policy in self.ports.values())

    def _forget(self, port: MemberPort) -> None:
        self.seen = {key: value for key, value in self.seen.items() if value[0] is not port}


SwitchMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSwitchModel = SwitchMachine.TestCase

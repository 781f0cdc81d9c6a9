"""Where frames go."""

from __future__ import annotations

import pytest

from tests.backends.switch_net import is_direct, learn, make_net, tcp_frame
from tests.backends.switch_ports import (
    BROADCAST,
    FakeAlarm,
    FakeClock,
    MemberPort,
    as_frame,
    ethernet,
    mac,
)
from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.ports import Offload
from vfio_user_virtio.backends.software.switch import Switch
from vfio_user_virtio.backends.software.switch_port import Drop
from vfio_user_virtio.backends.software.vlan import PortVlans
from vfio_user_virtio.errors import ConfigError
from vfio_user_virtio.virtio.offload import NET_HEADER


class TestTwoPorts:
    def test_everything_goes_to_the_other(self) -> None:
        net = make_net(1)
        (a,) = net.members
        for destination in (mac(0), mac(7), BROADCAST):
            frame = ethernet(destination, mac(3))
            assert a.send(frame)
            assert net.uplink.take() == [frame]
            assert net.uplink.send(frame)
            assert a.take() == [frame]
        statistics = net.switch.statistics(a)
        assert (statistics.frames_in, statistics.frames_out) == (3, 3)
        assert statistics.bytes_in == statistics.bytes_out == 3 * len(frame)
        assert net.switch.statistics(net.uplink).frames_out == 3

    def test_direct_receiver_is_the_only_member(self) -> None:
        net = make_net(1)
        (a,) = net.members
        assert is_direct(net, a)
        assert net.switch.direct_receiver(a) is None
        a.up = False
        net.switch.refresh()
        assert net.switch.direct_receiver(net.uplink) is None
        a.up = True
        net.switch.refresh()
        assert is_direct(net, a)
        b = MemberPort(net.switch, "b")
        net.switch.plug(b, b)
        assert net.switch.direct_receiver(net.uplink) is None
        net.switch.unplug(b)
        assert is_direct(net, a)

    def test_counters_survive_an_unplugging(self) -> None:
        net = make_net(1)
        (a,) = net.members
        a.send(ethernet(mac(9), mac(0)))
        net.switch.unplug(a)
        assert net.switch.statistics(net.uplink).frames_out == 1

    def test_no_direct_receiver_in_a_vlan(self) -> None:
        net = make_net(1, vlans={0: PortVlans(access=5)})
        assert net.switch.direct_receiver(net.uplink) is None

    def test_what_is_received_directly_is_counted_and_flushed(self) -> None:
        net = make_net(1)
        (a,) = net.members
        net.switch.received_directly(net.uplink, 3, 3 * 112)
        net.switch.flush()
        assert a.flushes == 1
        statistics = net.switch.statistics(a)
        assert (statistics.frames_out, statistics.bytes_out) == (3, 300)

    def test_a_starved_uplink_is_resumed(self) -> None:
        net = make_net(1)
        (a,) = net.members
        frame, size = as_frame(ethernet(mac(0), mac(100)))
        net.uplink.queue = [(frame, size)]
        net.switch.wait_for_room(net.uplink, a)
        net.switch.writable(a)
        assert len(a.take()) == 1

    def test_room_that_nobody_waits_for(self) -> None:
        net = make_net(1)
        net.switch.writable(net.members[0])
        assert net.members[0].flushes == 0

    def test_a_starved_uplink_is_resumed_when_its_direct_path_ends(self) -> None:
        net = make_net(1)
        (a,) = net.members
        net.uplink.queue = [as_frame(ethernet(mac(0), mac(100)))]
        net.switch.wait_for_room(net.uplink, a)
        b = MemberPort(net.switch, "b")
        net.switch.plug(b, b)
        assert len(b.take()) == 1

    def test_a_port_that_is_down_gets_nothing(self) -> None:
        net = make_net(1)
        (a,) = net.members
        net.uplink.up = False
        net.switch.refresh()
        assert a.send(ethernet(mac(9), mac(0)))
        assert net.uplink.take() == []
        assert net.drops(a) == {Drop.UNREACHABLE: 1}

    def test_two_members_without_uplink(self) -> None:
        switch = Switch(alarm=FakeAlarm(), clock=FakeClock())
        a, b = MemberPort(switch, "a"), MemberPort(switch, "b")
        switch.plug(a, a)
        assert a.send(ethernet(mac(1), mac(0)))  # nobody there
        switch.plug(b, b)
        assert a.send(ethernet(mac(1), mac(0)))
        assert len(b.take()) == 1
        # flags that only a device may set do not pass from guest to guest
        a.send(ethernet(mac(1), mac(0)), b"\x02" + bytes(11))
        assert b.headers == [bytes(12)]


class TestLearning:
    def test_unknown_is_flooded_and_known_is_not(self) -> None:
        net = make_net(3)
        a, b, c = net.members
        to_b = ethernet(mac(1), mac(0))
        assert a.send(to_b)
        assert b.take() == c.take() == net.uplink.take() == [to_b]
        assert a.take() == []
        to_a = ethernet(mac(0), mac(1))
        assert b.send(to_a)
        assert a.take() == [to_a]
        assert c.take() == net.uplink.take() == []
        assert a.send(to_b)
        assert b.take() == [to_b]
        assert c.take() == net.uplink.take() == []

    def test_group_addresses_are_flooded_and_never_learnt(self) -> None:
        net = make_net()
        a, b = net.members
        multicast = b"\x01\x00\x5e\x00\x00\x01"
        a.send(ethernet(mac(1), multicast))
        learn(net)
        frame = ethernet(multicast, mac(1))
        b.send(frame)
        assert a.take() == net.uplink.take() == [frame]

    def test_a_moved_address_is_relearnt_at_once(self) -> None:
        net = make_net()
        a, b = net.members
        learn(net)
        net.uplink.send(ethernet(mac(100), mac(0)))  # member 0 has migrated away
        net.uplink.take()
        b.send(ethernet(mac(0), mac(1)))
        assert a.take() == []
        assert len(net.uplink.take()) == 1

    def test_frames_do_not_go_back(self) -> None:
        net = make_net()
        a, _ = net.members
        learn(net)
        assert a.send(ethernet(mac(0), mac(50)))
        assert net.drops(a) == {Drop.HAIRPIN: 1}
        assert a.take() == []

    def test_addresses_age(self) -> None:
        net = make_net()
        a, b = net.members
        learn(net)
        net.clock.now += limits.FDB_AGE_SECONDS
        a.send(ethernet(mac(1), mac(0)))
        assert net.uplink.take() == []
        net.clock.now += 1
        a.send(ethernet(mac(1), mac(0)))
        assert len(net.uplink.take()) == 1
        assert len(b.take()) == 2

    def test_a_port_that_goes_down_or_away_is_forgotten(self) -> None:
        net = make_net(3)
        a, b, c = net.members
        learn(net)
        b.up = False
        net.switch.refresh()
        a.send(ethernet(mac(1), mac(0)))
        assert b.take() == []
        assert len(net.uplink.take()) == len(c.take()) == 1
        net.switch.unplug(c)
        a.send(ethernet(mac(2), mac(0)))
        assert c.take() == []
        assert len(net.uplink.take()) == 1
        net.switch.unplug(c)  # once more does no harm
        net.switch.writable(c)

    def test_runts_are_dropped(self) -> None:
        for members in (1, 2):
            net = make_net(members)
            a = net.members[0]
            assert a.send(ethernet(mac(1), mac(0))[:13])
            assert a.send(b"")
            assert a.send(ethernet(mac(1), mac(0), vlan=3)[:14])
            whole = members == 1  # a frame cut off in its tag is for an uplink to judge
            assert net.drops(a) == {Drop.RUNT: 2 if whole else 3}

    def test_a_port_is_plugged_in_once(self) -> None:
        net = make_net(1)
        with pytest.raises(ValueError, match="member 0"):
            net.switch.plug(net.members[0])

    def test_ports_touched_are_flushed_once(self) -> None:
        net = make_net()
        a, b = net.members
        learn(net)
        net.switch.flush()
        before = (a.flushes, b.flushes, net.uplink.flushes)
        a.send(ethernet(mac(1), mac(0)))
        a.send(ethernet(mac(1), mac(0)))
        net.switch.flush()
        net.switch.flush()
        assert (a.flushes, b.flushes, net.uplink.flushes) == (before[0], before[1] + 1, before[2])

    def test_poll_asks_the_uplinks_but_not_oneself(self) -> None:
        net = make_net()
        net.switch.poll(net.members[0])
        assert net.uplink.polls == 1
        net.switch.poll(net.uplink)
        assert net.uplink.polls == 1


class TestVlans:
    def test_an_access_port_is_untagged_inside_and_tagged_outside(self) -> None:
        net = make_net(2, vlans={0: PortVlans(access=5), 1: PortVlans(access=6)})
        a, b = net.members
        assert a.send(ethernet(BROADCAST, mac(0), b"x" * 50))
        assert net.uplink.take() == [ethernet(BROADCAST, mac(0), b"x" * 50, vlan=5)]
        assert b.take() == []
        net.uplink.send(ethernet(mac(0), mac(100), b"y" * 50, vlan=5))
        assert a.take() == [ethernet(mac(0), mac(100), b"y" * 50)]
        net.uplink.send(ethernet(BROADCAST, mac(100), b"z", vlan=6))
        assert b.take() == [ethernet(BROADCAST, mac(100), b"z")]
        net.uplink.send(ethernet(BROADCAST, mac(100)))
        assert a.take() == b.take() == []

    def test_what_a_guest_tags_on_an_access_port_is_dropped(self) -> None:
        net = make_net(1, vlans={0: PortVlans(access=5)})
        (a,) = net.members
        for vlan in (0, 5, 6):
            assert a.send(ethernet(BROADCAST, mac(0), vlan=vlan))
        assert net.uplink.take() == []
        assert net.drops(a) == {Drop.WRONG_VLAN: 3}

    def test_access_ports_of_one_vlan_see_each_other_untagged(self) -> None:
        net = make_net(2, vlans={0: PortVlans(access=5), 1: PortVlans(access=5)})
        a, b = net.members
        frame = ethernet(BROADCAST, mac(0))
        a.send(frame)
        assert b.take() == [frame]
        assert net.uplink.take() == [ethernet(BROADCAST, mac(0), vlan=5)]

    def test_a_trunk_carries_what_it_is_allowed(self) -> None:
        net = make_net(2, vlans={0: PortVlans(allowed=frozenset({0, 7}))})
        a, b = net.members
        for vlan in (None, 0, 7, 8):
            a.send(ethernet(BROADCAST, mac(0), vlan=vlan))
        assert len(b.take()) == 3
        for vlan in (None, 7, 8):
            b.send(ethernet(BROADCAST, mac(1), vlan=vlan))
        assert len(a.take()) == 2
        assert net.drops(a) == {Drop.WRONG_VLAN: 1}

    def test_addresses_are_learnt_per_vlan(self) -> None:
        net = make_net(3)
        a, b, c = net.members
        a.send(ethernet(BROADCAST, mac(9), vlan=1))
        b.send(ethernet(BROADCAST, mac(9), vlan=2))
        for port in net.members:
            port.take()
        c.send(ethernet(mac(9), mac(3), vlan=1))
        assert (len(a.take()), len(b.take())) == (1, 0)
        c.send(ethernet(mac(9), mac(3), vlan=2))
        assert (len(a.take()), len(b.take())) == (0, 1)

    def test_the_net_header_follows_the_tag(self) -> None:
        net = make_net(1, vlans={0: PortVlans(access=5)})
        (a,) = net.members
        header, frame = tcp_frame(100, 0)
        a.send(frame, header)
        assert NET_HEADER.unpack(net.uplink.headers[0]) == (1, 0, 58, 0, 38, 16, 0)
        tagged = frame[:12] + b"\x81\x00\x00\x05" + frame[12:]
        net.uplink.send(tagged, NET_HEADER.pack(1, 0, 0, 0, 38, 16, 0))
        assert NET_HEADER.unpack(a.headers[0]) == (1, 0, 0, 0, 34, 16, 0)
        assert a.take() == [frame]

    def test_a_tag_is_finished_with_the_frame(self) -> None:
        net = make_net(1, vlans={0: PortVlans(access=5)})
        (a,) = net.members
        net.uplink.offloads = Offload(0)
        net.switch.refresh()
        header, frame = tcp_frame(100, 40)
        a.send(frame, header)
        frames = net.uplink.take()
        assert [len(frame) for frame in frames] == [98, 98, 78]
        assert all(frame[12:16] == b"\x81\x00\x00\x05" for frame in frames)

    def test_a_checksum_cannot_make_a_tag(self) -> None:
        net = make_net(1, vlans={0: PortVlans(access=5)})
        (a,) = net.members
        net.uplink.offloads = Offload(0)
        net.switch.refresh()
        frame = ethernet(BROADCAST, mac(0), bytes(100))
        for start, offset in ((0, 12), (12, 0), (12, 2), (13, 0)):
            a.send(frame, NET_HEADER.pack(1, 0, 0, 0, start, offset, 0))
        assert net.uplink.take() == []
        assert net.drops(a) == {Drop.BAD_HEADER: 4}

    @pytest.mark.parametrize("vlans", [{"access": 0}, {"access": 4095}, {"allowed": {4095}}])
    def test_vlans_that_cannot_be(self, vlans: dict[str, int]) -> None:
        with pytest.raises(ConfigError, match="VLAN"):
            PortVlans(**vlans)  # type: ignore[arg-type]  # wrong on purpose


def test_bad_frames_of_one_do_not_touch_others() -> None:
    net = make_net(2)
    a, b = net.members
    learn(net)
    a.send(b"\xff" * 9)
    a.send(ethernet(mac(1), mac(0)), b"\xff" * 12)
    assert b.take() == []
    assert b.send(ethernet(mac(0), mac(1)))
    assert len(a.take()) == 1

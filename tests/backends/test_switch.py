"""Where frames go, what they become on the way, and who has to wait."""

from __future__ import annotations

import attrs
import pytest

from tests.backends.switch_ports import (
    ALL,
    BROADCAST,
    FakeAlarm,
    FakeClock,
    MemberPort,
    UplinkPort,
    as_frame,
    ethernet,
    mac,
)
from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.ports import Offload
from vfio_user_virtio.backends.software.rate_limit import TokenBucket
from vfio_user_virtio.backends.software.switch import Switch
from vfio_user_virtio.backends.software.switch_port import Drop
from vfio_user_virtio.backends.software.vlan import PortVlans
from vfio_user_virtio.errors import ConfigError
from vfio_user_virtio.virtio.offload import NET_HEADER


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


class TestOffload:
    def test_frames_go_unfinished_to_who_takes_them_and_finished_to_others(self) -> None:
        net = make_net(2)
        a, b = net.members
        learn(net)
        header, frame = tcp_frame(3_000, 1_000)
        assert a.send(frame, header)
        assert b.headers == [header]
        assert b.take() == [frame]
        b.offloads = Offload.CSUM
        net.switch.refresh()
        assert a.send(frame, header)
        assert [len(segment) for segment in b.take()] == [1_054] * 3

    def test_two_ports_finish_too(self) -> None:
        net = make_net(1)
        (a,) = net.members
        header, frame = tcp_frame(3_000, 1_000)
        a.send(frame, header)
        assert net.uplink.headers == [header]
        net.uplink.take()
        net.uplink.offloads = Offload(0)
        net.switch.refresh()
        a.send(frame, header)
        assert net.uplink.headers == [bytes(12)] * 3

    def test_nonsense_is_dropped(self) -> None:
        for members in (1, 2):
            net = make_net(members)
            a = net.members[0]
            _, frame = tcp_frame(100, 0)
            for header in ((1, 0, 0, 0, 9_000, 16), (1, 1, 0, 0, 34, 16), (0, 99, 0, 9, 0, 0)):
                assert a.send(frame, NET_HEADER.pack(*header, 0))
            assert net.drops(a) == {Drop.BAD_HEADER: 3}
            assert net.uplink.take() == []

    def test_nonsense_found_only_when_finishing_is_dropped(self) -> None:
        net = make_net(2)
        a, b = net.members
        net.uplink.offloads = b.offloads = Offload(0)
        net.switch.refresh()
        header, frame = tcp_frame(100, 10)
        broken = frame[:14] + b"\x55" + frame[15:]
        assert a.send(broken, header)  # flooded
        assert net.drops(a) == {Drop.BAD_HEADER: 2}
        learn(net)
        assert a.send(broken, header)
        assert net.drops(a) == {Drop.BAD_HEADER: 3}

    def test_data_valid_is_the_uplinks_word_and_for_who_understands_it(self) -> None:
        net = make_net(2)
        a, b = net.members
        learn(net)
        data_valid = b"\x02" + bytes(11)
        net.uplink.send(ethernet(mac(0), mac(100)), data_valid)
        assert a.headers == [data_valid]
        a.take()
        a.offloads = Offload(0)
        net.switch.refresh()
        net.uplink.send(ethernet(mac(0), mac(100)), data_valid)
        assert a.headers == [bytes(12)]
        a.send(ethernet(mac(1), mac(0)), data_valid)
        assert b.headers == [bytes(12)]

    def test_uplinks_are_told_what_all_receivers_take(self) -> None:
        net = make_net(2)
        a, b = net.members
        assert net.uplink.told == [ALL]
        b.offloads = Offload.CSUM | Offload.TSO4
        net.switch.refresh()
        net.switch.refresh()
        assert net.uplink.told[1:] == [Offload.CSUM | Offload.TSO4]
        b.up = False
        net.switch.refresh()
        assert net.uplink.told[2:] == [ALL]
        a.up = False
        net.switch.refresh()
        assert net.uplink.told[3:] == [Offload(0)]

    def test_a_flooded_frame_of_many_segments_misses_who_cannot_take_it_whole(self) -> None:
        net = make_net(2)
        a, b = net.members
        b.offloads = Offload(0)
        net.switch.refresh()
        header, frame = tcp_frame(limits.MAX_FLOODED_SEGMENTS * 10 + 1, 10)
        assert a.send(frame, header)
        assert net.uplink.take() == [frame]
        assert net.drops(b) == {Drop.TOO_MANY_SEGMENTS: 1}


class TestRoom:
    @pytest.mark.parametrize("members", [1, 2])
    def test_a_sender_waits_for_its_only_destination(self, members: int) -> None:
        net = make_net(members)
        a = net.members[0]
        learn(net)
        net.uplink.room = 1
        frames = [ethernet(mac(100), mac(0), bytes((n,))) for n in range(4)]
        assert [a.send(frame) for frame in frames] == [True, False, False, False]
        assert net.alarm.delays == [pytest.approx(limits.MAX_BLOCKED_SECONDS)]
        net.uplink.make_room(2)
        assert net.uplink.take() == frames[:3]
        net.uplink.make_room()
        assert net.uplink.take() == frames[3:]
        assert net.drops(net.uplink) == {}

    def test_a_flood_waits_for_nobody(self) -> None:
        net = make_net(3)
        a, b, c = net.members
        b.room = 0
        assert a.send(ethernet(BROADCAST, mac(0)))
        assert len(c.take()) == len(net.uplink.take()) == 1
        assert net.drops(b) == {Drop.NO_ROOM: 1}

    def test_a_source_without_sender_loses_its_frame(self) -> None:
        net = make_net(1)
        switch = net.switch
        b = MemberPort(switch, "b")
        switch.plug(b)
        learn(net)
        net.uplink.room = 0
        assert b.send(ethernet(mac(100), mac(1)))
        assert net.drops(net.uplink) == {Drop.NO_ROOM: 1}

    def test_a_port_that_never_makes_room_holds_up_nobody_for_long(self) -> None:
        net = make_net(2)
        a, b = net.members
        learn(net)
        b.room = 0
        assert not a.send(ethernet(mac(1), mac(0)))
        a.queue.append(as_frame(ethernet(mac(100), mac(0))))
        net.clock.now += limits.MAX_BLOCKED_SECONDS / 2
        net.switch.expired()  # too early
        assert len(a.queue) == 2
        assert net.alarm.delays[-1] == pytest.approx(limits.MAX_BLOCKED_SECONDS / 2)
        net.clock.now += limits.MAX_BLOCKED_SECONDS
        net.switch.expired()
        assert a.queue == []
        assert len(net.uplink.take()) == 1
        assert net.drops(b) == {Drop.NO_ROOM: 1}
        assert a.send(ethernet(mac(1), mac(0)))  # and now nobody waits for it at all
        assert net.drops(b) == {Drop.NO_ROOM: 2}

    def test_patience_comes_back_with_the_frames_that_are_taken(self) -> None:
        net = make_net(2)
        a, b = net.members
        learn(net)
        b.room = 0
        a.send(ethernet(mac(1), mac(0)))
        net.clock.now += 1
        net.switch.expired()
        b.make_room(4)
        for _ in range(5):
            a.send(ethernet(mac(1), mac(0)))
        assert len(a.queue) == 1
        assert net.alarm.delays[-1] == pytest.approx(4 * limits.BLOCKED_SECONDS_PER_FRAME)

    def test_one_frame_at_a_time_holds_senders_up_only_in_proportion(self) -> None:
        """A hostile receiver makes room for a single frame, always at the last moment."""
        net = make_net(2)
        a, b = net.members
        learn(net)
        b.room = 0
        waited = 0.0
        rounds = 200
        for _ in range(rounds):
            if a.send(ethernet(mac(1), mac(0))):
                continue
            delay = net.alarm.delays[-1] * 0.99
            waited += delay
            net.clock.now += delay
            b.make_room(1)
        most = limits.MAX_BLOCKED_SECONDS + rounds * limits.BLOCKED_SECONDS_PER_FRAME
        assert 0 < waited <= most

    def test_several_senders_wait_for_one_port(self) -> None:
        net = make_net(3)
        a, b, c = net.members
        learn(net)
        c.room = 0
        assert not a.send(ethernet(mac(2), mac(0)))
        assert not b.send(ethernet(mac(2), mac(1)))
        c.make_room()
        assert len(c.take()) == 2

    def test_who_waits_longest_is_first(self) -> None:
        net = make_net(3)
        a, b, c = net.members
        learn(net)
        c.room = 0
        for number in range(4):
            a.send(ethernet(mac(2), mac(0), bytes((number,))))
            b.send(ethernet(mac(2), mac(1), bytes((number,))))
        sources = []
        for _ in range(8):
            c.make_room(1)
            sources += [frame[11] for frame in c.take()]
        assert sources == [0, 1] * 4

    @pytest.mark.parametrize("leave", ["unplug", "down"])
    def test_who_waits_goes_on_when_the_port_leaves(self, leave: str) -> None:
        net = make_net(2)
        a, b = net.members
        learn(net)
        b.room = 0
        assert not a.send(ethernet(mac(1), mac(0)))
        if leave == "unplug":
            net.switch.unplug(b)
        else:
            b.up = False
            net.switch.refresh()
        assert a.queue == []
        assert len(net.uplink.take()) == 1

    def test_a_sender_that_leaves_waits_no_more(self) -> None:
        net = make_net(2)
        a, b = net.members
        learn(net)
        b.room = 0
        assert not a.send(ethernet(mac(1), mac(0)))
        net.switch.unplug(a)
        b.make_room()
        assert b.take() == []

    @pytest.mark.parametrize("members", [1, 2])
    def test_a_segmented_frame_is_never_cut_short(self, members: int) -> None:
        net = make_net(members)
        a = net.members[0]
        learn(net)
        net.uplink.offloads = Offload(0)
        net.switch.refresh()
        net.uplink.room = 1
        header, frame = tcp_frame(500, 100)
        frame = mac(100) + frame[6:]
        last = ethernet(mac(100), mac(0))
        assert a.send(frame, header)  # taken: the switch owes the rest
        assert not a.send(last)
        assert len(net.uplink.received) == 1
        net.uplink.make_room(2)
        assert len(net.uplink.received) == 3
        assert len(a.queue) == 1
        net.uplink.make_room()
        received = net.uplink.take()
        assert len(received) == 6
        assert received[-1] == last
        assert net.drops(net.uplink) == {}
        assert a.send(last)


class TestRateLimit:
    def test_a_member_over_its_rate_waits(self) -> None:
        net = make_net(0)
        a = MemberPort(net.switch, "a")
        net.switch.plug(a, a, rate_limit=TokenBucket(8_000.0, 1_000.0))
        frame = ethernet(mac(100), mac(0), bytes(1_000 - 14 - 12))
        assert a.send(frame)
        assert a.send(frame)  # not in debt yet, then deep in it
        assert not a.send(frame)
        assert net.alarm.delays == [pytest.approx(1.0)]
        net.clock.now += 1.0
        net.switch.expired()
        assert len(net.uplink.take()) == 3
        assert net.uplink.send(ethernet(mac(0), mac(100)))  # its receiving is not limited

    def test_without_sender_it_loses_frames(self) -> None:
        net = make_net(0)
        a = MemberPort(net.switch, "a")
        net.switch.plug(a, rate_limit=TokenBucket(8_000.0, 10.0))
        assert a.send(ethernet(mac(100), mac(0)))
        assert a.send(ethernet(mac(100), mac(0)))
        assert net.drops(a) == {Drop.RATE: 1}

    def test_what_found_no_room_is_not_paid_for(self) -> None:
        net = make_net(0)
        a = MemberPort(net.switch, "a")
        bucket = TokenBucket(8_000.0, 1_000.0)
        net.switch.plug(a, a, rate_limit=bucket)
        net.uplink.room = 0
        assert not a.send(ethernet(mac(100), mac(0)))
        assert bucket.tokens == 1_000.0

    def test_floods_take_turns(self) -> None:
        net = make_net(5)
        a = net.members[0]
        sent = 0
        while a.send(ethernet(BROADCAST, mac(0))):
            sent += 1
        assert sent == -(-limits.MAX_COPIES // 5)
        assert net.alarm.delays == [0.0]
        net.switch.expired()
        assert a.queue == []
        assert a.send(ethernet(BROADCAST, mac(0)))

    def test_segments_take_turns(self) -> None:
        net = make_net(2)
        a, b = net.members
        learn(net)
        b.offloads = Offload(0)
        net.switch.refresh()
        header, frame = tcp_frame(500, 1)
        sent = 0
        while a.send(frame, header):
            sent += 1
        assert sent == -(-limits.MAX_COPIES // 499)
        net.switch.expired()
        assert a.queue == []


def test_bad_frames_of_one_do_not_touch_others() -> None:
    net = make_net(2)
    a, b = net.members
    learn(net)
    a.send(b"\xff" * 9)
    a.send(ethernet(mac(1), mac(0)), b"\xff" * 12)
    assert b.take() == []
    assert b.send(ethernet(mac(0), mac(1)))
    assert len(a.take()) == 1

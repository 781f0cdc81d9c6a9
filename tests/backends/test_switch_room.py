"""Who has to wait: ports without room, and members over their rate."""

from __future__ import annotations

import pytest

from tests.backends.switch_net import learn, make_net, tcp_frame
from tests.backends.switch_ports import (
    BROADCAST,
    MemberPort,
    as_frame,
    ethernet,
    mac,
)
from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.ports import Offload
from vfio_user_virtio.backends.software.rate_limit import TokenBucket
from vfio_user_virtio.backends.software.switch_port import Drop


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

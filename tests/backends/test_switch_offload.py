"""What frames become on their way to a port that cannot take them as they are."""

from __future__ import annotations

from tests.backends.switch_net import learn, make_net, tcp_frame
from tests.backends.switch_ports import (
    ALL,
    ethernet,
    mac,
)
from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.ports import Offload
from vfio_user_virtio.backends.software.switch_port import Drop
from vfio_user_virtio.virtio.offload import NET_HEADER


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

"""A member as the uplink sees it that is alone with it: room reserved, frames committed, pauses."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import trio

from tests.backends.member_rig import MAC_A, MAC_B, configs, frame, guests, receive, until, without
from vfio_user_virtio.backends.software.ports import Offload
from vfio_user_virtio.virtio.features import Feature
from vfio_user_virtio.virtio.steering import flow_slot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.backends.member_rig import Guest
    from vfio_user_virtio.backends.software.member import Member
    from vfio_user_virtio.backends.software.ports import Buffer


class Wire:
    """An uplink that takes frames, or none while `full`."""

    name = "wire"
    up = True

    def __init__(self) -> None:
        self.full = False
        self.frames: list[bytes] = []

    @property
    def offloads(self) -> Offload:
        return Offload(0)

    def deliver(self, frame: Sequence[Buffer], size: int) -> bool:
        if not self.full:
            self.frames.append(b"".join(frame)[12:size])
        return not self.full

    def flush(self) -> None: ...

    def resume(self) -> None: ...

    def poll(self) -> None: ...

    def receivers_take(self, offloads: Offload) -> None: ...


def wired(guest: Guest) -> Wire:
    """The guest's member alone with an uplink."""
    wire = Wire()
    guest.member._switch.plug_uplink(wire)
    return wire


def come_in(member: Member, data: bytes) -> bool:
    """What an uplink does with a frame that it reads straight into the member's memory."""
    room = member.reserve()
    if room is None:
        return False
    rest = bytes(12) + data
    for view in room:
        piece, rest = rest[: len(view)], rest[len(view) :]
        view[: len(piece)] = piece
    member.commit(12 + len(data))
    member.flush()
    return True


def udp_of_odd_flow() -> bytes:
    """A frame to A that is not received on the first of two queue pairs."""
    for port in range(256):
        ip = bytes.fromhex("45000030000000004011") + b"\0\0" + b"\x0a\0\0\2" + b"\x0a\0\0\1"
        data = MAC_A + MAC_B + b"\x08\x00" + ip + struct.pack(">HHHH", port, 7, 28, 0) + bytes(20)
        if flow_slot(data) % 2:
            return data
    raise AssertionError("no flow has an odd slot")


async def test_a_driver_with_one_queue_pair_follows_one_with_two() -> None:
    """A guest reboots into its firmware; the last frame was for a pair that is no longer there."""
    async with guests(*configs(MAC_A, queue_pairs=2)) as (guest,):
        driver = guest.driver(max_pairs=2)
        await driver.start()
        odd = udp_of_odd_flow()
        assert come_in(guest.member, odd)
        assert (await receive(driver, 1)).data == odd
        for features in (without(Feature.MQ), without()):
            driver = guest.driver(features=features)
            await driver.start()
            assert come_in(guest.member, odd)
            assert (await receive(driver)).data == odd


async def test_frames_of_running_queues_are_counted_too() -> None:
    async with guests(*configs(MAC_A)) as (guest,):
        driver = guest.driver(features=without(Feature.MRG_RXBUF), rx_buffer_size=1000)
        await driver.start()
        assert come_in(guest.member, frame(MAC_A, MAC_B, size=2000))
        await driver.send(b"", b"runt")
        await driver.flush()
        for _ in range(2):
            counts = guest.member.statistics()
            assert (counts.too_long, counts.invalid) == (1, 1)
            await driver.stop()


async def test_who_waited_for_room_goes_on_though_its_queues_were_closed_meanwhile() -> None:
    """Another queue's RING_RESET closes all of them; no kick and no mapping will come."""
    async with guests(*configs(MAC_A)) as (guest,):
        wire = wired(guest)
        driver = guest.driver()
        await driver.start()
        wire.full = True
        sent = frame(MAC_B, MAC_A, b"patience")
        await driver.send(sent)
        await trio.testing.wait_all_tasks_blocked()
        await guest.pci.reset_queue(0)
        wire.full = False
        guest.member._switch.writable(wire)
        await until(lambda: wire.frames == [sent])

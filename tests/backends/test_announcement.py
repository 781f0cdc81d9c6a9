"""A member that has moved says so: to its driver, and to the network."""

from __future__ import annotations

import trio

from tests.backends.member_rig import LONG, MAC_A, RARP, nothing_comes
from tests.backends.migration_rig import rig
from vfio_user_virtio.backends.software.announcement import rarp_request
from vfio_user_virtio.virtio.net_config import NetStatus


def test_the_frame_is_a_reverse_arp_request() -> None:
    frame, size = rarp_request(bytes.fromhex("020000000001"))
    assert b"".join(frame) == bytes(12) + bytes.fromhex(
        "ffffffffffff 020000000001 8035"
        "0001 0800 06 04 0003 020000000001 00000000 020000000001 00000000"
    ) + bytes(18)
    assert size == 12 + 60


async def test_a_member_that_moved_is_announced_once() -> None:
    async with rig() as made:
        await made.migrate()
        with trio.fail_after(LONG):
            frame = await made.peer.receive()
        assert frame.data[6:14] == MAC_A + RARP
        assert await nothing_comes(made.peer)
        assert made.here.member.state.announce
        assert (await made.driver.config()).status & NetStatus.ANNOUNCE


async def test_a_member_that_was_only_stopped_is_not() -> None:
    async with rig() as made:
        member = made.here.member
        assert await member.mode.stop()
        member.mode.resume()
        assert await nothing_comes(made.peer)
        assert not member.state.announce

"""The link of a member that is alone with an uplink, and of members that are not."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

import trio
import trio.testing

from tests.backends.member_rig import LONG, MAC_A, MAC_B, configs, frame, ping_pong
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.backends.software.uplinks.stream import StreamServerUplink
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.loopback import served, ungrouped_nursery
from vfio_user_virtio.testing.net_driver import NetDriver
from vfio_user_virtio.testing.virtio_pci import VirtioPci
from vfio_user_virtio.virtio.net_config import NetStatus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import pytest


@contextlib.asynccontextmanager
async def drivers(path: str, *macs: bytes) -> AsyncIterator[list[NetDriver]]:
    """Started drivers on the members of an owner whose uplink waits for a peer at `path`."""
    owner = Owner("owner")
    owner.add_uplink(StreamServerUplink(owner.switch, path=path))
    async with ungrouped_nursery() as nursery, contextlib.AsyncExitStack() as stack:
        found = []
        for config in configs(*macs):
            ram = stack.enter_context(GuestRam(1 << 22))
            client = await stack.enter_async_context(served(owner.add_member(config), memory=ram))
            await ram.map(client)
            pci = await VirtioPci.open(client)
            stack.callback(pci.close)
            found.append(NetDriver(pci, ram, queue_size=16))
            await found[-1].start()
        nursery.start_soon(owner.run)
        await trio.testing.wait_all_tasks_blocked()
        yield found
        nursery.cancel_scope.cancel()


def peer_at(path: str) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(path)
    return peer


async def test_alone_with_an_uplink_its_link_is_the_uplinks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = str(tmp_path / "uplink")
    async with drivers(path, MAC_A) as (driver,):
        assert (await driver.config()).status == NetStatus(0)
        for _ in range(3):
            with trio.fail_after(LONG), peer_at(path) as peer:
                await driver.config_changed()
                assert (await driver.config()).status == NetStatus.LINK_UP
                sent = frame(MAC_B, MAC_A, b"out")
                await driver.send(sent)
                await trio.lowlevel.wait_readable(peer)
                assert peer.recv(100)[4:] == sent
            with trio.fail_after(LONG):
                await driver.config_changed()
            assert (await driver.config()).status == NetStatus(0)
    links = [text for text in caplog.messages if "link" in text and "uplink" not in text]
    assert links == ["owner/1: the guest's link is up", "owner/1: the guest's link is down"] * 3


async def test_members_that_reach_each_other_keep_their_link(tmp_path: Path) -> None:
    path = str(tmp_path / "uplink")
    async with drivers(path, MAC_A, MAC_B) as (a, b):
        for driver in (a, b):
            assert (await driver.config()).status == NetStatus.LINK_UP
        await ping_pong(a, b)
        with peer_at(path):
            await trio.testing.wait_all_tasks_blocked()
        await trio.testing.wait_all_tasks_blocked()
        await ping_pong(a, b)
        for driver in (a, b):
            assert (await driver.config()).status == NetStatus.LINK_UP

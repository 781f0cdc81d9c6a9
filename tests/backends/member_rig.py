"""Members of one owner, each with a session, a client and a guest of its own, in one event loop."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import attrs
import trio

from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.loopback import served, ungrouped_nursery
from vfio_user_virtio.testing.net_driver import KNOWN_FEATURES, NetDriver
from vfio_user_virtio.testing.virtio_pci import VirtioPci
from vfio_user_virtio.virtio.features import Feature, mask_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from vfio_user_virtio.backends.software.member import Member
    from vfio_user_virtio.testing.net_driver import ReceivedFrame
    from vfio_user_virtio.transport.client import Client

MAC_A = bytes.fromhex("020000000001")
MAC_B = bytes.fromhex("020000000002")
MAC_C = bytes.fromhex("020000000003")
BROADCAST = b"\xff" * 6
ETHERTYPE = b"\x88\xb5"  # for local experiments (IEEE 802)
VERSION_1 = Feature.VERSION_1.mask
LONG = 30.0
"""Seconds after which something that should have happened has not."""


@attrs.frozen
class Guest:
    """One member and all that is on the other side of it."""

    member: Member
    client: Client
    ram: GuestRam
    pci: VirtioPci

    def driver(self, **options: object) -> NetDriver:
        return NetDriver(self.pci, self.ram, **options)  # type: ignore[arg-type]  # passed through


def configs(*macs: bytes, **options: object) -> list[MemberConfig]:
    return [
        MemberConfig(member_id=number, mac=mac, **options)  # type: ignore[arg-type]  # as above
        for number, mac in enumerate(macs, 1)
    ]


@contextlib.asynccontextmanager
async def guests(
    *members: MemberConfig, remote: bool = False, step: int | None = None, ram_size: int = 32 << 20
) -> AsyncIterator[Sequence[Guest]]:
    """Guests on the members of one owner; their memory comes as `GuestRam.map` is told."""
    owner = Owner("owner")
    async with ungrouped_nursery() as nursery, contextlib.AsyncExitStack() as stack:
        nursery.start_soon(owner.run)
        found: list[Guest] = []
        for config in members:
            member = owner.add_member(config)
            ram = stack.enter_context(GuestRam(ram_size))
            client = await stack.enter_async_context(served(member, memory=ram))
            await ram.map(client, remote=remote, step=step)
            pci = await VirtioPci.open(client)
            stack.callback(pci.close)
            found.append(Guest(member, client, ram, pci))
        yield found
        nursery.cancel_scope.cancel()


def frame(to: bytes, sender: bytes, payload: bytes = b"", *, size: int = 60) -> bytes:
    """An Ethernet frame of at least `size` bytes."""
    return (to + sender + ETHERTYPE + payload).ljust(size, b"\0")


RARP = b"\x80\x35"


async def receive(driver: NetDriver, pair: int = 0) -> ReceivedFrame:
    """The next frame that is not a member's announcement; fails if none comes."""
    with trio.fail_after(LONG):
        while (frame := await driver.receive(pair)).data[12:14] == RARP:
            pass
        return frame


async def receive_on_any(driver: NetDriver) -> list[ReceivedFrame]:
    """The next frame, and what else is there with it, whichever pairs they come to."""
    found: list[ReceivedFrame] = []

    async def one(pair: int, scope: trio.CancelScope) -> None:
        found.append(await driver.receive(pair))
        scope.cancel()

    with trio.fail_after(LONG):
        async with trio.open_nursery() as nursery:
            for pair in range(driver.pairs):
                nursery.start_soon(one, pair, nursery.cancel_scope)
    return found


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something in memory to happen, which nothing signals; fails if it does not."""
    with trio.fail_after(LONG):
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await trio.sleep(0.001)


async def nothing_comes(driver: NetDriver, pair: int = 0) -> bool:
    """Whether no frame comes within a while."""
    with trio.move_on_after(0.05):
        await driver.receive(pair)
        return False
    return True


def without(*features: Feature) -> int:
    return KNOWN_FEATURES & ~mask_of(features)


async def ping_pong(
    a: NetDriver,
    b: NetDriver,
    count: int = 3,
    size: int = 60,
    *,
    sender: bytes = MAC_A,
    to: bytes = MAC_B,
) -> None:
    """Frames there and back, each with something of its own in it."""
    for number in range(count):
        there = frame(to, sender, b"there %d" % number, size=size)
        await a.send(there)
        assert (await receive(b)).data == there
        back = frame(sender, to, b"back %d" % number, size=size)
        await b.send(back)
        assert (await receive(a)).data == back

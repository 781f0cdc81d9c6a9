"""A guest under load that moves between two servers, by sockets, with its memory.

The servers are in this process, or wherever `places` says.  Each has a member, and an uplink to the
same `Host`.  What the guest sends has to arrive there once and in order.  Of what the host sends,
the guest has to get all that the device was given, once and in order.
"""

from __future__ import annotations

import contextlib
import socket
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING

import attrs
import trio

from tests.backends.member_rig import LONG, MAC_A, MAC_B
from tests.migration.guest_move_network import MAC_HOST, Host, flow_and_number, numbered
from tests.server.server_process import short_folder
from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.backends.software.migratable import migratable_members
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.backends.software.uplinks.datagram import DatagramUplink
from vfio_user_virtio.migration.states import EVERYTHING
from vfio_user_virtio.protocol.version import OWN_CAPABILITIES
from vfio_user_virtio.testing import loopback
from vfio_user_virtio.testing.guest_move import MovableGuest, Place
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.loopback import ungrouped_nursery
from vfio_user_virtio.testing.movable_ram import MovableRam
from vfio_user_virtio.testing.net_driver import NetDriver
from vfio_user_virtio.transport.client import PROPOSAL, connect
from vfio_user_virtio.transport.listener import serve_listener

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.migration.guest_move_network import Network
    from vfio_user_virtio.backends.software.member import Member
    from vfio_user_virtio.protocol.migration import MigrationFlags
    from vfio_user_virtio.transport.device_migration import Migration

MIB = 1 << 20
POISON = b"\xa5"


class Traffic:
    """Numbered frames of one flow per queue pair, both ways, as fast as they go, until `finish`.

    No more of them are under way at once than the wire has room for, and the driver has buffers
    (`to_host`, `to_guest`), since a switch may drop what has to wait too long.
    """

    def __init__(self, driver: NetDriver, host: Network, *, size: int = 0) -> None:
        self.driver = driver
        self.host = host
        self.size = size
        self.to_host = 8
        self.to_guest = 8
        self.news = host.news
        self.sent: dict[int, int] = defaultdict(int)
        """The next number of what the guest sends, by flow."""
        self.got: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        """The numbers of what the guest has got, by flow and by queue pair."""
        self.seen: set[tuple[int, int]] = set()
        """Flow and number of all that the guest has got."""
        self.buffers: dict[int, int] = defaultdict(int)
        """How many buffers they came in, by queue pair."""
        self.moves_given_up = 0
        """After one the host must not wait for what it sent meanwhile."""
        self._ends = False
        self._sending = 0

    def start(self, nursery: trio.Nursery) -> None:
        for pair in range(self.driver.pairs):
            nursery.start_soon(self.receive, pair)
            nursery.start_soon(self._send_from_guest, pair)
            nursery.start_soon(self._send_from_host, pair)

    async def receive(self, pair: int) -> None:
        while True:
            frame = await self.driver.receive(pair)
            found = flow_and_number(frame.data)
            assert found is not None, frame.data.hex()
            assert found not in self.seen, "a frame came twice"
            self.seen.add(found)
            flow, number = found
            assert frame.data == numbered(MAC_A, MAC_HOST, flow, number, self.size)
            self.got[flow][pair].append(number)
            self.buffers[pair] += frame.buffers
            self.news.tell()

    def given_up(self) -> None:
        """The guest goes on where it was, and what the host sent meanwhile may be lost."""
        self.moves_given_up += 1
        self.news.tell()

    async def _send_from_guest(self, pair: int) -> None:
        self._sending += 1
        window = max(1, self.to_host // self.driver.pairs)
        while not self._ends:
            if self.sent[pair] - len(self.host.got[pair]) < window:
                await self.send(pair)
            else:
                await self.news.changed()
        self._sending -= 1
        self.news.tell()

    async def send(self, pair: int) -> None:
        """The guest sends the next frame of the flow of `pair`."""
        frame = numbered(MAC_HOST, MAC_A, pair, self.sent[pair], self.size)
        await self.driver.send(frame, pair=pair)
        self.sent[pair] += 1

    async def _send_from_host(self, flow: int) -> None:
        self._sending += 1
        window = max(1, self.to_guest // self.driver.pairs)
        seen, first = (0, 0, ""), 0
        while not self._ends:
            where = self.host.where.get(MAC_A, "")
            place = (self.moves_given_up, len(self.host.announced), where)
            if place != seen:
                seen, first = place, self.host.sent[flow]
            latest = max((got[-1] for got in self.got[flow].values()), default=-1)
            if where and self.host.sent[flow] - max(first, latest + 1) < window:
                await self.host.send_numbered(MAC_A, flow, self.size)
            else:
                await self.news.changed()
        self._sending -= 1
        self.news.tell()

    async def goes_on(self, server: str, frames: int = 3) -> None:
        """Return when `frames` more have come through `server` in each flow, both ways."""
        host = self.host
        await self.news.until(partial(host.is_behind, MAC_A, server), f"the guest behind {server}")
        expected = [
            (flow, self.sent[flow] + frames - 1, host.sent[flow] + frames - 1)
            for flow in range(self.driver.pairs)
        ]
        for flow, mine, theirs in expected:
            await self.news.until(
                partial(self.host_is_at, flow, mine), f"frame {mine} of flow {flow} at the host"
            )
            await self.news.until(
                partial(self.guest_is_at, flow, theirs),
                f"frame {theirs} of flow {flow} at the guest",
            )

    def host_is_at(self, flow: int, number: int) -> bool:
        got = self.host.got[flow]
        return bool(got) and got[-1] >= number

    def guest_is_at(self, flow: int, number: int) -> bool:
        return any(numbers[-1] >= number for numbers in self.got[flow].values())

    async def finish(self) -> None:
        """Stop sending, and wait until all has come that is on its way."""
        self._ends = True
        self.news.tell()
        await self.news.until(lambda: self._sending == 0, "the senders' end")
        for pair in range(self.driver.pairs):
            with trio.fail_after(LONG):
                await self.driver.flush(pair)
            await self.news.until(
                partial(self.host_is_at, pair, self.sent[pair] - 1),
                f"all of flow {pair} at the host",
            )
        for flow in range(self.driver.pairs):
            with trio.fail_after(LONG):
                await self._send_the_last(flow)

    async def _send_the_last(self, flow: int) -> None:
        """Send a frame until it comes, since a switch may drop it if the guest was slow before."""
        while True:
            last = await self.host.send_numbered(MAC_A, flow, self.size)
            with trio.move_on_after(1):
                while not self.guest_is_at(flow, last):
                    await self.news.changed()
                return

    def check(self, given: int | None = None) -> None:
        """Nothing lost, doubled or reordered; `given`: how many frames the device was given."""
        for flow in range(self.driver.pairs):
            came, sent = self.host.got[flow], self.sent[flow]
            wrong = next((n for n, number in enumerate(came) if number != n), len(came))
            around = came[max(wrong - 3, 0) : wrong + 5]
            assert wrong == len(came) == sent, f"flow {flow} of {sent}: {wrong} is not in {around}"
        for pairs in self.got.values():
            for numbers in pairs.values():
                assert numbers == sorted(numbers), "a frame came late"
        if given is not None:
            assert len(self.seen) == given, "a frame was lost in the device"
        for pair in range(self.driver.pairs):
            rx, tx = (self.driver.queue(2 * pair + n).ring for n in (0, 1))
            assert tx.used_idx == tx.avail_idx == self.sent[pair] & 0xFFFF
            assert rx.used_idx == self.buffers[pair] & 0xFFFF
            posted = self.driver.queue(2 * pair).outstanding
            assert (rx.avail_idx - rx.used_idx) & 0xFFFF == posted


@attrs.define
class Rig:
    """`places` by the names of their servers; `members` of those that are in this process."""

    host: Network
    guest: MovableGuest
    driver: NetDriver
    traffic: Traffic
    places: dict[str, Place]
    members: dict[str, Member]
    nursery: trio.Nursery

    @property
    def here(self) -> str:
        """The server that the guest is on."""
        return next(name for name, place in self.places.items() if place is self.guest.place)

    @property
    def there(self) -> str:
        """The other one."""
        return next(name for name in self.places if name != self.here)

    @property
    def given(self) -> int:
        """Frames from the host that were given to members and passed their filters."""
        total = 0
        for member in self.members.values():
            own = member.statistics()
            assert own.driver_errors == 0
            total += member._switch.statistics(member).frames_out
            total -= own.filtered + own.missed + own.too_long
        return total

    async def start(self) -> None:
        """Start the driver and the traffic, and wait until it flows."""
        await self.driver.start()
        self.traffic.start(self.nursery)
        await self.traffic.goes_on(self.here)

    async def move(self, **options: object) -> Migration:
        """Move the guest to the other server; the one it leaves is made ready for the next time."""
        source, target = self.guest.place, self.places[self.there]
        try:
            migration = await self.guest.move_to(target, **options)  # type: ignore[arg-type]  # passed
        except BaseException:
            self.traffic.given_up()
            raise
        assert self.guest.place is target
        await source.client.reset()
        source.memory.view(source.memory.iova, source.memory.size)[:] = POISON * source.memory.size
        return migration

    async def finish(self) -> None:
        """End the traffic, and check all of it."""
        await self.traffic.finish()
        self.traffic.check(self.given if self.members else None)


@contextlib.asynccontextmanager
async def rig(
    *,
    options: tuple[MigrationFlags, MigrationFlags] = (EVERYTHING, EVERYTHING),
    size: int = 0,
    ram_size: int = 8 * MIB,
    remote: bool = False,
    twin: bool = False,
    step: int | None = None,
    member: dict[str, object] | None = None,
    target: dict[str, object] | None = None,
    **driver: object,
) -> AsyncIterator[Rig]:
    """A guest on server a that can move to b; not started.

    `options`: the migration states of a and b.  `size`: of frames.  `remote`, `step`: how guest
    memory is mapped.  `twin`: whether the servers have a socket of their own for messages.
    `member`, `target`: for the configuration of both members, and of b alone.  Other options are
    the driver's.
    """
    with short_folder() as folder, Host(folder) as host:
        async with ungrouped_nursery() as nursery:
            members = {}
            for name, mac, states in zip("ab", (MAC_A, MAC_B), options, strict=True):
                given = (member or {}) | ((target or {}) if name == "b" else {})
                config = MemberConfig(mac=mac, **given)  # type: ignore[arg-type]  # passed on
                members[name] = await serve(nursery, host, folder, name, config, states)
            mapping: dict[str, object] = {"remote": remote, "step": step}
            async with places(host, folder, ram_size, mapping, driver, size, twin=twin) as made:
                made.members = members
                yield made
            nursery.cancel_scope.cancel()


async def serve(
    nursery: trio.Nursery,
    host: Host,
    folder: Path,
    name: str,
    config: MemberConfig,
    options: MigrationFlags,
) -> Member:
    """A server in this process, listening in `folder` on `name`.sock."""
    owner = Owner(name)
    member = owner.add_member(config)
    owner.add_uplink(DatagramUplink(owner.switch, local=host.address_of(name), remote=host.address))
    (device,) = (await migratable_members(owner, options=options)).values()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / f"{name}.sock"))
    listener.listen()

    async def listen() -> None:
        with listener:
            await serve_listener(listener, device, name=name, make_session=loopback.make_session)

    nursery.start_soon(owner.run)
    nursery.start_soon(listen)
    return member


@contextlib.asynccontextmanager
async def places(
    host: Host,
    folder: Path,
    ram_size: int,
    mapping: dict[str, object],
    driver_options: dict[str, object],
    size: int = 0,
    *,
    twin: bool = False,
) -> AsyncIterator[Rig]:
    """A guest of the servers that listen in `folder` on a.sock and b.sock."""
    async with contextlib.AsyncExitStack() as stack:
        found = {}
        for name in "ab":
            memory = stack.enter_context(GuestRam(ram_size))
            client = await stack.enter_async_context(
                connect(
                    folder / f"{name}.sock",
                    memory=memory,
                    capabilities=OWN_CAPABILITIES if twin else PROPOSAL,
                )
            )
            found[name] = Place(client, memory)
            await found[name].map(**mapping)  # type: ignore[arg-type]  # passed on
        yield await stack.enter_async_context(
            moving_guest(host, found, ram_size, driver_options, size)
        )


@contextlib.asynccontextmanager
async def moving_guest(
    host: Network,
    places: dict[str, Place],
    ram_size: int,
    driver_options: dict[str, object],
    size: int = 0,
) -> AsyncIterator[Rig]:
    """A guest on the first of `places`, whose memory is mapped; not started."""
    with MovableRam(ram_size) as ram:
        guest = await MovableGuest.open(next(iter(places.values())), ram)
        driver = NetDriver(guest.pci, ram, **driver_options)  # type: ignore[arg-type]  # passed on
        with contextlib.closing(guest.pci):
            async with trio.open_nursery() as running:
                running.start_soon(host.run)
                yield Rig(
                    host, guest, driver, Traffic(driver, host, size=size), places, {}, running
                )
                running.cancel_scope.cancel()

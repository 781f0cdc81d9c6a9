"""A guest that moves between physical VFs: the rig of `tests.migration`, on kernel VFIO.

The inner host's hardware is two served PFs, each with members, all of them bound to vfio-pci.  Here
they are what `serve --vf` makes of them: our sessions serve the VFs, our owners have their
administration virtqueues in memory that the IOMMU maps.  Servers a and b are of one owner, c is of
another.  What the guest talks to is one more VF of each owner, on the same switch.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import attrs
import trio

from tests.migration.guest_move_network import MAC_HOST, Network
from tests.migration.guest_move_rig import moving_guest
from vfio_user_virtio.backends.vfio.opening import Way
from vfio_user_virtio.backends.vfio.owner import destroy_stale_objects
from vfio_user_virtio.backends.vfio.physical import PhysicalConfig, VfConfig, physical_functions
from vfio_user_virtio.backends.vfio.sysfs import PciAddress
from vfio_user_virtio.migration.migratable_device import MigratableDevice
from vfio_user_virtio.migration.states import EVERYTHING
from vfio_user_virtio.testing.guest_move import Place
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.loopback import served
from vfio_user_virtio.testing.net_driver import NetDriver
from vfio_user_virtio.testing.virtio_pci import VirtioPci

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from tests.inner.conftest import InnerFacts
    from tests.migration.guest_move_rig import Rig
    from vfio_user_virtio.device import Device
    from vfio_user_virtio.migration.member_migration import MemberMigration
    from vfio_user_virtio.migration.states import Options
    from vfio_user_virtio.transport.client import Client

OWNERS: Final = (("pf1", "a", "b", "peer1"), ("pf2", "c", "peer2"))
"""The functions of the host, in their order: of each owner its PF, and its members from 1 on."""
PEERS: Final = {"a": "peer1", "b": "peer1", "c": "peer2"}
BOTH: Final = (EVERYTHING, EVERYTHING)
RAM: Final = 2 << 20
RX_BUFFERS: Final = 32


def addresses(inner: InnerFacts) -> dict[str, PciAddress]:
    names = [name for owner in OWNERS for name in owner]
    found = map(PciAddress.parse, inner.functions)
    return dict(zip(names, found, strict=True))


def config_of(
    inner: InnerFacts, way: str, names: Sequence[str], **options: object
) -> PhysicalConfig:
    """The VFs called `names`, which are of one owner."""
    where = addresses(inner)
    pf, *members = next(owner for owner in OWNERS if names[0] in owner)
    vfs = [VfConfig(address=where[name], member_id=members.index(name) + 1) for name in names]
    given = {"pf": where[pf], "vfs": tuple(vfs), "way": Way[way.upper()]} | options
    return PhysicalConfig(**given)  # type: ignore[arg-type]  # passed on


@contextlib.asynccontextmanager
async def physical_devices(
    inner: InnerFacts, way: str, names: Sequence[str], options: Sequence[Options] = BOTH
) -> AsyncIterator[dict[str, MigratableDevice]]:
    """The members called `names`; `options`: the migration states of those of each owner."""
    async with contextlib.AsyncExitStack() as stack:
        found: dict[str, MigratableDevice] = {}
        for owner, states in zip(OWNERS, options, strict=True):
            if its := [name for name in names if name in owner]:
                config = config_of(inner, way, its, states=states)
                devices = await stack.enter_async_context(physical_functions(config))
                for name, device in zip(its, devices, strict=True):
                    assert isinstance(device, MigratableDevice)
                    found[name] = device
        yield found


@contextlib.asynccontextmanager
async def place(device: Device) -> AsyncIterator[Place]:
    """A client of `device`, with guest memory."""
    with GuestRam(RAM) as memory:
        async with served(device, memory=memory) as client:
            made = Place(client, memory)
            await made.map()
            yield made


@attrs.frozen
class Guest:
    """A guest of one VF that stays there."""

    client: Client
    memory: GuestRam
    driver: NetDriver


@contextlib.asynccontextmanager
async def started_guest(device: Device) -> AsyncIterator[Guest]:
    """A guest of `device` whose driver is up."""
    async with place(device) as made:
        pci = await VirtioPci.open(made.client)
        with contextlib.closing(pci):
            driver = NetDriver(pci, made.memory, rx_buffers=RX_BUFFERS)
            await driver.start()
            yield Guest(made.client, made.memory, driver)


async def left_at_owner(migration: MemberMigration) -> int:
    """How many objects of an idle member are left, here or at its owner."""
    owner, member = migration._owner, migration._member
    return owner.objects_in_use + await destroy_stale_objects(owner.client, (member,), range(2))


class PeerHost(Network):
    """A host that is on the network of each owner by the driver of a VF there.

    Where in a network a guest is only its switch knows, so servers on the same one are not told
    apart.
    """

    def __init__(self, drivers: Mapping[str, NetDriver]) -> None:
        super().__init__()
        self._drivers = drivers

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for name, driver in self._drivers.items():
                nursery.start_soon(self._listen, name, driver)

    async def _listen(self, name: str, driver: NetDriver) -> None:
        while True:
            self.take((await driver.receive()).data, name)
            self.news.tell()

    async def send(self, to: bytes, frame: bytes) -> None:
        driver = self._drivers.get(self.where.get(to, ""))
        if driver is None:
            await trio.lowlevel.checkpoint()
        else:
            await driver.send(frame)

    def is_behind(self, address: bytes, server: str) -> bool:
        return super().is_behind(address, PEERS[server])


@attrs.frozen
class PhysicalRig:
    """A guest that can move between two of `devices`, and its traffic."""

    rig: Rig
    devices: dict[str, MigratableDevice]


@contextlib.asynccontextmanager
async def physical_rig(
    inner: InnerFacts,
    way: str,
    servers: str = "ac",
    options: Sequence[Options] = BOTH,
    *,
    more: str = "",
    **driver: object,
) -> AsyncIterator[PhysicalRig]:
    """A guest on the first of two `servers`; not started.

    `options`: as `physical_devices`.  `more`: VFs to be opened as well.
    """
    peers = sorted({PEERS[server] for server in servers})
    async with contextlib.AsyncExitStack() as stack:
        found = physical_devices(inner, way, [*servers, *peers, *more], options)
        devices = await stack.enter_async_context(found)
        drivers = {}
        for name in peers:
            peer = await stack.enter_async_context(started_guest(devices[name]))
            await peer.driver.control.set_mac(MAC_HOST)
            drivers[name] = peer.driver
        places = {name: await stack.enter_async_context(place(devices[name])) for name in servers}
        made = moving_guest(PeerHost(drivers), places, RAM, {"rx_buffers": RX_BUFFERS} | driver)
        yield PhysicalRig(await stack.enter_async_context(made), devices)

"""Two servers to migrate between, and devices on them that a driver has set up.

Both are processes of their own.  The client, which drives the migration and is the guest's driver,
is this process.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from tests.bench.contenders import native_members, running, session
from vfio_user_virtio.device import FeatureOperation
from vfio_user_virtio.limits import KIB
from vfio_user_virtio.protocol.feature import Feature
from vfio_user_virtio.protocol.migration import MigrationState, encode_device_state
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.net_driver import NetDriver
from vfio_user_virtio.testing.virtio_pci import VirtioPci
from vfio_user_virtio.transport.device_migration import Migration

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.bench.contenders import Contender
    from vfio_user_virtio.transport.client import Client

MODEL_COMMAND: Final = (sys.executable, str(Path(__file__).with_name("migration_server.py")))
RAM_PER_PAIR: Final = 512 * KIB


@attrs.frozen
class Side:
    """A server, and where its members are."""

    server: Contender
    paths: list[Path]


@contextmanager
def two_folders() -> Iterator[tuple[Path, Path]]:
    with tempfile.TemporaryDirectory() as name:
        folders = Path(name, "a"), Path(name, "b")
        for folder in folders:
            folder.mkdir()
        yield folders


@contextmanager
def native_sides(members: int, queue_pairs: int) -> Iterator[tuple[Side, Side]]:
    """Servers as users run them."""
    with (
        two_folders() as (a, b),
        native_members(a, members, queue_pairs) as source,
        native_members(b, members, queue_pairs) as target,
    ):
        yield Side(*source), Side(*target)


@contextmanager
def model_side(folder: Path, members: int = 1, **options: float) -> Iterator[Side]:
    """A server of `migration_server.py`; `options` are its own."""
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    paths = [folder / f"vf{number}.sock" for number in range(members)]
    with running(paths[0], *MODEL_COMMAND, str(folder), f"--members={members}", *argv) as server:
        yield Side(server, paths)


async def set_state(client: Client, state: MigrationState) -> None:
    data = encode_device_state(state)
    await client.feature(Feature.MIG_DEVICE_STATE, FeatureOperation.SET, data)


@attrs.define
class Guest:
    """Who has a device on one of two servers, and moves there and back."""

    here: Client
    there: Client
    _functions: dict[Client, VirtioPci] = attrs.field(factory=dict)
    """What its machine sets up anew after a reset, if it has a driver."""

    async def drive(self, client: Client) -> VirtioPci:
        """The device of `client` for a driver."""
        self._functions[client] = pci = await VirtioPci.open(client)
        return pci

    async def migrate(self, *, precopy: bool = True) -> Migration:
        """Move the device, and reset what is left of it behind."""
        migration = Migration(self.here, self.there, precopy=precopy)
        await migration.run()
        await self.here.reset()
        if self.here in self._functions:
            await self._functions[self.here].set_up()
        self.here, self.there = self.there, self.here
        return migration


@asynccontextmanager
async def guest(source: Side, target: Side, number: int = 0) -> AsyncIterator[Guest]:
    """The guest of member `number`, whose device nobody drives."""
    async with (
        session(source.server, source.paths[number]) as here,
        session(target.server, target.paths[number]) as there,
    ):
        yield Guest(here, there)


@asynccontextmanager
async def driven_guest(
    source: Side, target: Side, number: int = 0, *, queue_pairs: int = 1
) -> AsyncIterator[Guest]:
    """The same; a driver has set it up, with so many queue pairs, all of which are empty."""
    async with guest(source, target, number) as moving:
        with GuestRam(queue_pairs * RAM_PER_PAIR) as ram:
            await ram.map(moving.here)
            await ram.map(moving.there)
            await moving.drive(moving.there)
            pci = await moving.drive(moving.here)
            driver = NetDriver(pci, ram, max_pairs=queue_pairs, msix=False)
            await driver.start(rx=False)
            try:
                yield moving
            finally:
                pci.close()

"""Two members of two owners, each behind a session that notes what it is asked and can meddle."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import attrs
import trio

from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.backends.software.migratable import migratable_members
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.device import FeatureOperation
from vfio_user_virtio.migration.states import EVERYTHING
from vfio_user_virtio.protocol.feature import Feature
from vfio_user_virtio.protocol.migration import MigrationFlags, MigrationState
from vfio_user_virtio.testing.loopback import served
from vfio_user_virtio.transport.device_migration import Migration

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from vfio_user_virtio.backends.software.member import Member
    from vfio_user_virtio.migration.migratable_device import MigratableDevice
    from vfio_user_virtio.transport.client import Client

RUNNING: Final = MigrationState.RUNNING
SET: Final = FeatureOperation.SET
MAC_A: Final = bytes.fromhex("52540000000a")
MAC_B: Final = bytes.fromhex("52540000000b")


class Watched:
    """A device whose requests of a migration are noted, and may do something else first."""

    def __init__(self, side: str, device: MigratableDevice, requests: list[str]) -> None:
        self.device = device
        self.meddle: Callable[[], None] = lambda: None
        self.hangs_at = ""
        self.goes_on = trio.Event()
        self._side = side
        self._requests = requests

    def __getattr__(self, name: str) -> object:
        return getattr(self.device, name)

    async def feature(self, index: int, operation: FeatureOperation, data: bytes) -> bytes:
        what = Feature(index).name
        if operation & SET:
            what = MigrationState(int.from_bytes(data[:4], "little")).name
        await self._note(what)
        return await self.device.feature(index, operation, data)

    async def migration_read(self, count: int) -> bytes | bytearray | memoryview:
        await self._note("read")
        return await self.device.migration_read(count)

    async def migration_write(self, data: bytes | memoryview) -> None:
        await self._note("write")
        await self.device.migration_write(data)

    async def precopy_info(self) -> tuple[int, int]:
        await self._note("info")
        return await self.device.precopy_info()

    async def reset(self, cause: object) -> None:
        await self._note("reset")
        await self.device.reset(cause)  # type: ignore[arg-type]  # whatever came

    async def _note(self, what: str) -> None:
        self._requests.append(f"{self._side} {what}")
        self.meddle()
        if what == self.hangs_at:
            await self.goes_on.wait()


@attrs.define
class Pair:
    """Source and target, and what they were asked, in order."""

    source: Watched
    target: Watched
    members: list[Member]
    clients: list[Client]
    requests: list[str]

    def migration(self, **options: object) -> Migration:
        return Migration(*self.clients, **options)  # type: ignore[arg-type]  # passed on

    @property
    def states(self) -> list[MigrationState]:
        return [watched.device.migration.state for watched in (self.source, self.target)]

    @property
    def objects(self) -> int:
        """Resource objects that were not given back."""
        devices = (self.source.device, self.target.device)
        return sum(device.migration._owner.objects_in_use for device in devices)


@contextlib.asynccontextmanager
async def pair(
    source: MigrationFlags = EVERYTHING,
    target: MigrationFlags = EVERYTHING,
    *,
    target_pairs: int = 2,
) -> AsyncIterator[Pair]:
    """Members of two owners; the source has a state of its own."""
    requests: list[str] = []
    members: list[Member] = []
    watched: list[Watched] = []
    async with contextlib.AsyncExitStack() as stack:
        clients: list[Client] = []
        for side, mac, queue_pairs, options in (
            ("source", MAC_A, 2, source),
            ("target", MAC_B, target_pairs, target),
        ):
            owner = Owner(side)
            members.append(owner.add_member(MemberConfig(mac=mac, queue_pairs=queue_pairs)))
            (device,) = (await migratable_members(owner, options=options)).values()
            watched.append(Watched(side, device, requests))
            served_device = served(watched[-1], name=side)  # type: ignore[arg-type]  # delegates
            clients.append(await stack.enter_async_context(served_device))
        common = members[0].function.common.state
        common.queue_select, common.config_msix_vector = 3, 1
        yield Pair(watched[0], watched[1], members, clients, requests)
        watched[1].goes_on.set()


async def check_how_things_stand(both: Pair, migration: Migration, *, committed: bool) -> None:
    """After a failure: one of the two runs; nothing is left over; if it is the source, the whole
    thing can be done again."""
    assert migration.target_runs == committed
    if committed:
        assert both.states[1] is RUNNING
        assert not both.members[1].mode.stopped
        assert both.members[0].mode.stopped
        assert migration.source_state is None
        return
    assert both.states == [RUNNING, RUNNING]
    assert migration.source_state is RUNNING
    assert not both.members[0].mode.stopped
    assert both.objects == 0
    assert both.members[0].function.common.state.queue_select == 3, "the source was not reset"
    asked = [what for side, what in map(str.split, both.requests) if side == "target"]
    if "STOP_COPY" not in asked:  # it was looked at beforehand, and resets have no other cause
        assert ("reset" in asked) == ("RESUMING" in asked)
    both.source.meddle = both.target.meddle = lambda: None
    await both.migration().run()
    assert both.members[1].state.filter.mac == MAC_A


async def check_refused(both: Pair, migration: Migration) -> None:
    assert both.states == [RUNNING, RUNNING]
    assert migration.downtime == 0, "it was found out while the source ran"
    assert both.members[1].state.filter.mac == MAC_B
    assert both.objects == 0

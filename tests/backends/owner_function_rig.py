"""A served PF with members, and who drives it: all over a vfio-user socket, in one event loop."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from tests.backends.administration_rig import a_config
from vfio_user_virtio.backends.software.admin_queue import NO_DELAY
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.backends.software.owner_function import OwnerFunction
from vfio_user_virtio.backends.software.owner_function_config import OwnerFunctionConfig
from vfio_user_virtio.backends.vfio.owner import VfioOwner, owned
from vfio_user_virtio.migration.admin_client import AdminClient
from vfio_user_virtio.migration.parts_owner import PartsOwner
from vfio_user_virtio.testing.loopback import served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vfio_user_virtio.backends.software.admin_queue import DeviceTiming
    from vfio_user_virtio.backends.software.member import Member
    from vfio_user_virtio.transport.client import Client

PF_MAC: Final = bytes.fromhex("020000000100")


class Pf:
    """A PF whose owner has `members` members; `options` are `OwnerFunctionConfig`'s."""

    def __init__(
        self, members: int = 2, *, timing: DeviceTiming = NO_DELAY, **options: object
    ) -> None:
        self.owner = Owner("owner")
        for number in range(1, members + 1):
            self.owner.add_member(a_config(number, queue_pairs=2), f"vf{number}")
        config = OwnerFunctionConfig(mac=PF_MAC, **options)  # type: ignore[arg-type]  # passed on
        self.function = OwnerFunction("pf", config, self.owner, timing)

    def member(self, number: int = 1) -> Member:
        return self.owner.members[number]


@contextlib.asynccontextmanager
async def driven(pf: Pf) -> AsyncIterator[Driven]:
    """Our own owner on the PF, for the length of the block."""
    async with served(pf.function, name="pf") as client, owned(client, "pf") as owner:
        yield Driven(client, owner)


class Driven:
    """Who drives a PF: the `owner`, its `client` below, and those who send commands above."""

    def __init__(self, client: Client, owner: VfioOwner) -> None:
        self.client = client
        self.owner = owner
        self.admin = AdminClient(owner)
        self.parts = PartsOwner(self.admin)

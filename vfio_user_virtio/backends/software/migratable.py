"""The members of a software owner as devices that can be migrated.

The migration code speaks to the owner as it would to hardware, by encoded commands; so here the
owner's administration virtqueue is set up, asked what it can do, and given to one
`MemberMigration` per member.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from vfio_user_virtio.backends.software.admin_queue import NO_DELAY, SoftwareAdminQueue
from vfio_user_virtio.backends.software.administration import Administration
from vfio_user_virtio.migration.admin_client import AdminClient
from vfio_user_virtio.migration.member_migration import MemberMigration
from vfio_user_virtio.migration.migratable_device import MigratableDevice
from vfio_user_virtio.migration.parts_owner import PartsOwner
from vfio_user_virtio.migration.states import EVERYTHING

if TYPE_CHECKING:
    from vfio_user_virtio.backends.software.admin_queue import DeviceTiming
    from vfio_user_virtio.backends.software.owner import Owner
    from vfio_user_virtio.migration.states import Options


async def administered(owner: Owner, timing: DeviceTiming = NO_DELAY) -> PartsOwner:
    """`owner` behind an administration virtqueue of its own, asked what it can do."""
    parts_owner = PartsOwner(AdminClient(SoftwareAdminQueue(Administration(owner), timing)))
    support = await parts_owner.discover()
    if support.lack is not None:
        raise RuntimeError(f"the software owner cannot migrate its members: {support.lack}")
    return parts_owner


async def migratable_members(
    owner: Owner,
    *,
    options: Options = EVERYTHING,
    timing: DeviceTiming = NO_DELAY,
    parts_owner: PartsOwner | None = None,
) -> dict[int, MigratableDevice]:
    """A device for each member of `owner`, by member id; `options` are the states on offer.

    `parts_owner` is the result of `administered`, if there is one already.
    """
    parts_owner = parts_owner or await administered(owner, timing)
    return {
        member_id: MigratableDevice(
            member,
            MemberMigration(
                parts_owner,
                member_id,
                name=member.name,
                clock=trio.current_time,
                options=options,
                private=member.mode,
            ),
            member.logging,
        )
        for member_id, member in owner.members.items()
    }

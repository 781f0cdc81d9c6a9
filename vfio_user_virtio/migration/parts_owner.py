"""What an owner can do for the migration of its members, found out once, and its object ids.

The order of discovery is the standard's (virtio 1.4, Device parts, and Capabilities): which
commands the self group knows, which capabilities there are, how many resource objects; then which
commands the SR-IOV group knows.  Where Linux's driver departs from that, so that a device made for
it departs too, both are tried: a self group that refuses its lists is used all the same, and a
SR-IOV group that is not there yet (no VFs) is asked again later.

Migration is offered only if all that it takes is there.  Ids are the owner's, shared by members
and kinds of object; an id whose object could not be destroyed stays taken, since the device may
still hold it, until it can be: that is tried when the owner has just destroyed another one, and
when no id is left.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.migration.admin_client import UNANSWERED, AdminError
from vfio_user_virtio.virtio import admin_commands as commands
from vfio_user_virtio.virtio.admin import (
    CAPABILITY_OPCODES,
    DEV_PARTS_OPCODES,
    LEGACY_OPCODES,
    GroupType,
    Opcode,
    decode_bits_untrusted,
    opcode_name,
)
from vfio_user_virtio.virtio.admin_commands import DEV_PARTS_CAPABILITY, ObjectKind

if TYPE_CHECKING:
    from vfio_user_virtio.migration.admin_client import AdminClient

_BITMAP_SIZE: Final = 8
_LIST_OPCODES: Final = frozenset((Opcode.LIST_QUERY, Opcode.LIST_USE))
_NOT_NEEDED: Final = frozenset((Opcode.RESOURCE_OBJ_MODIFY, Opcode.RESOURCE_OBJ_QUERY))
NEEDED: Final = DEV_PARTS_OPCODES - _NOT_NEEDED


@attrs.frozen
class Support:
    """What was found: why migration cannot be offered, or None if it can."""

    lack: str | None
    objects: int = 0


class PartsOwner:
    """An owner, as those see it who migrate its members."""

    def __init__(self, client: AdminClient) -> None:
        self.client = client
        self.support = Support("the owner has not been asked yet")
        self._taken: set[int] = set()
        self._lost: dict[int, int] = {}
        """Ids that are taken by an object, of this member, that nobody uses and that may exist."""
        self._limit = 0

    def forget_objects(self) -> None:
        """The owner has been reset: it holds no objects any more, and has to be asked anew."""
        self._taken.clear()
        self.support = Support("the owner has been reset and not been asked yet")

    async def discover(self) -> Support:
        """Ask the owner.  Raises HostError when it is gone; a refusal is in the answer."""
        try:
            self.support = await self._discover()
        except AdminError as error:
            self.support = Support(str(error))
        return self.support

    async def _discover(self) -> Support:
        await self._use_self_group()
        capabilities = decode_bits_untrusted(
            await self.client.execute(commands.cap_id_list_query(), _BITMAP_SIZE)
        )
        if DEV_PARTS_CAPABILITY not in capabilities:
            return Support("the owner has no device-parts capability (VIRTIO_DEV_PARTS_CAP)")
        value = await self.client.execute(
            commands.device_cap_get(DEV_PARTS_CAPABILITY), _BITMAP_SIZE
        )
        self._limit = min(commands.decode_object_limits_untrusted(value))
        if not self._limit:
            return Support("the owner allows no device-parts objects")
        limits = commands.encode_object_limits(self._limit, self._limit)
        await self.client.execute(commands.driver_cap_set(DEV_PARTS_CAPABILITY, limits))
        known = decode_bits_untrusted(
            await self.client.execute(commands.list_query(GroupType.SR_IOV), _BITMAP_SIZE)
        )
        if missing := NEEDED - known:
            names = ", ".join(opcode_name(opcode) for opcode in sorted(missing))
            return Support(f"the owner does not know {names}")
        wanted = known & (DEV_PARTS_OPCODES | LEGACY_OPCODES | _LIST_OPCODES)
        await self.client.execute(commands.list_use(GroupType.SR_IOV, wanted))
        return Support(None, self._limit)

    async def _use_self_group(self) -> None:
        """Announce the capability commands; Linux's driver does not, and its devices may refuse."""
        try:
            known = decode_bits_untrusted(
                await self.client.execute(commands.list_query(GroupType.SELF), _BITMAP_SIZE)
            )
            wanted = known & (CAPABILITY_OPCODES | _LIST_OPCODES)
            await self.client.execute(commands.list_use(GroupType.SELF, wanted))
        except AdminError:
            return

    async def create(self, member: int, kind: ObjectKind) -> int:
        """Make an object of `member`; its id.  Raises AdminError: ENOSPC if no id is free."""
        if len(self._taken) >= self._limit:
            await self._destroy_lost()
        free = next((i for i in range(self._limit) if i not in self._taken), None)
        if free is None:
            raise AdminError(
                errno.ENOSPC,
                f"all {self._limit} device-parts objects of the owner are in use; "
                "wait until other members have been migrated",
            )
        self._taken.add(free)
        try:
            await self.client.execute(commands.object_create(member, free, kind))
        except AdminError as error:
            if error.errno in UNANSWERED or error.errno == errno.EEXIST:
                self._lost[free] = member
            else:
                self._taken.discard(free)
            raise
        except BaseException:
            self._lost[free] = member
            raise
        return free

    async def destroy(self, member: int, object_id: int) -> None:
        """Forget an object; one that is not there is as good.  Raises AdminError."""
        await self._destroy(member, object_id)
        await self._destroy_lost()

    async def _destroy(self, member: int, object_id: int) -> None:
        try:
            await self.client.execute(commands.object_destroy(member, object_id))
        except AdminError as error:
            if error.errno != errno.ENXIO:
                self._lost[object_id] = member
                raise
        except BaseException:
            self._lost[object_id] = member
            raise
        self._taken.discard(object_id)

    async def _destroy_lost(self) -> None:
        """Try once more, up to the first that still cannot be destroyed."""
        while self._lost:
            object_id, member = self._lost.popitem()
            try:
                await self._destroy(member, object_id)
            except AdminError:
                return

    @property
    def objects_in_use(self) -> int:
        return len(self._taken)

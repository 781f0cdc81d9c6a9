"""The software owner's administration virtqueue, as those use it who migrate its members.

It is the device behind an `AdminQueue` (`migration.admin_client`): commands take effect in the
order in which they come, those for one member one after the other.  A stop of one member, which may
have to wait for its client, holds up no other.

`DeviceTiming` is a model of a device that is slower than this one.  It is for benchmarks only,
which label their results as modelled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import trio

from vfio_user_virtio.migration.admin_client import held
from vfio_user_virtio.virtio.admin import (
    GroupType,
    Opcode,
    Status,
    decode_answer_untrusted,
    decode_command_untrusted,
)
from vfio_user_virtio.virtio.admin_commands import (
    decode_object_spec_untrusted,
    decode_parts_set_untrusted,
)

if TYPE_CHECKING:
    from vfio_user_virtio.backends.software.administration import Administration
    from vfio_user_virtio.virtio.admin import Command


@attrs.frozen(kw_only=True)
class DeviceTiming:
    """Seconds that commands take: the first DEV_PARTS_SET with an object, each further one with it,
    and any other command."""

    first_set: float = 0.0
    similar_set: float = 0.0
    command: float = 0.0


NO_DELAY: Final = DeviceTiming()
_ENOUGH: Final = 64
"""Bytes of a command that say whom it is for, and which object; there may be 64 MiB behind."""


class SoftwareAdminQueue:
    """An `AdminQueue` on `administration`."""

    def __init__(self, administration: Administration, timing: DeviceTiming = NO_DELAY) -> None:
        self._administration = administration
        self._timing = timing
        self._locks: dict[int, trio.Lock] = {}
        self._set_before: set[int] = set()

    async def execute(self, readable: bytes, writable: int) -> bytes:
        """Carry out one encoded command; what the device wrote, at most `writable` bytes.

        A call that is cancelled may have been carried out.
        """
        command = decode_command_untrusted(readable[:_ENOUGH])  # who is meant, and which object
        async with held(self._lock(command)):
            written = await self._administration.execute(readable, writable)
            seconds = self._seconds(command, written)
            if seconds:
                await trio.sleep(seconds)
        return written

    def _lock(self, command: Command) -> trio.Lock:
        known = (
            command.group_type == GroupType.SR_IOV
            and command.member_id in self._administration.member_ids
        )
        return self._locks.setdefault(command.member_id if known else 0, trio.Lock())

    def _seconds(self, command: Command, written: bytes) -> float:
        answer = decode_answer_untrusted(written)
        if answer is None or answer.status != Status.OK:
            return self._timing.command
        if command.opcode == Opcode.RESOURCE_OBJ_CREATE:
            self._set_before.discard(decode_object_spec_untrusted(command.data).object_id)
        elif command.opcode == Opcode.DEV_PARTS_SET:
            _, object_id, _ = decode_parts_set_untrusted(command.data)
            if object_id in self._set_before:
                return self._timing.similar_set
            self._set_before.add(object_id)
            return self._timing.first_set
        return self._timing.command

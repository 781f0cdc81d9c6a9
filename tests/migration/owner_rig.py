"""A software owner whose administration virtqueue can be made to fail, and what it has seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from vfio_user_virtio.backends.software.admin_queue import SoftwareAdminQueue
from vfio_user_virtio.backends.software.administration import Administration
from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.migration.admin_client import AdminClient
from vfio_user_virtio.migration.member_migration import MemberMigration
from vfio_user_virtio.migration.parts_owner import PartsOwner
from vfio_user_virtio.migration.states import EVERYTHING
from vfio_user_virtio.virtio.admin import (
    Answer,
    Opcode,
    Status,
    decode_command_untrusted,
    encode_answer,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_user_virtio.backends.software.member import Member
    from vfio_user_virtio.protocol.migration import MigrationFlags
    from vfio_user_virtio.virtio.admin import Command


class FaultyQueue:
    """The owner's queue, with a log of opcodes; `fault` may answer instead of the device."""

    def __init__(self, administration: Administration) -> None:
        self._queue = SoftwareAdminQueue(administration)
        self.seen: list[Opcode] = []
        self.fault: Callable[[Command], Answer | None] | None = None

    async def execute(self, readable: bytes, writable: int) -> bytes:
        command = decode_command_untrusted(readable)
        self.seen.append(Opcode(command.opcode))
        answer = None if self.fault is None else self.fault(command)
        if answer is not None:
            return encode_answer(answer, writable)
        return await self._queue.execute(readable, writable)

    def take_seen(self) -> list[Opcode]:
        seen, self.seen = self.seen, []
        return seen

    def fail_command(self, number: int, status: int = Status.EINVAL) -> None:
        """Let the `number`th command from now on fail, and all others pass."""
        left = number

        def fault(_: Command) -> Answer | None:
            nonlocal left
            left -= 1
            return Answer(status) if left == 0 else None

        self.fault = fault


class OwnerRig:
    """An owner with some members, and the migration of each."""

    def __init__(
        self,
        members: int = 2,
        *,
        options: MigrationFlags = EVERYTHING,
        private: bool = True,
        objects: int = 255,
    ) -> None:
        self.owner = Owner("owner")
        for number in range(1, members + 1):
            mac = bytes((2, 0, 0, 0, 0, number))
            self.owner.add_member(MemberConfig(member_id=number, mac=mac, queue_pairs=2))
        self.administration = Administration(self.owner, get_objects=objects, set_objects=objects)
        self.queue = FaultyQueue(self.administration)
        self.parts_owner = PartsOwner(AdminClient(self.queue))
        self.migrations = [
            MemberMigration(
                self.parts_owner,
                member.config.member_id,
                name=member.name,
                clock=trio.current_time,
                options=options,
                private=member.mode if private else None,
            )
            for member in self.members
        ]

    @property
    def members(self) -> list[Member]:
        return list(self.owner.members.values())

    async def discover(self) -> OwnerRig:
        support = await self.parts_owner.discover()
        assert support.lack is None
        self.queue.take_seen()
        return self

"""An owner with members that nobody serves, and commands for it one by one: no event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tests.virtio.rings import finish
from vfio_user_virtio.backends.software.administration import Administration
from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.virtio import admin_commands as commands
from vfio_user_virtio.virtio.admin import (
    Answer,
    GroupType,
    Qualifier,
    Status,
    decode_answer_untrusted,
    decode_bits_untrusted,
    encode_command,
)
from vfio_user_virtio.virtio.admin_commands import ObjectKind

if TYPE_CHECKING:
    from vfio_user_virtio.backends.software.member import Member
    from vfio_user_virtio.virtio.admin import Command

ROOM: Final = 1 << 20
OK: Final = (Status.OK, Qualifier.OK)


def a_config(number: int = 1, **options: object) -> MemberConfig:
    mac = bytes((2, 0, 0, 0, 0, number))
    return MemberConfig(member_id=number, mac=mac, **options)  # type: ignore[arg-type]  # passed on


class Driver:
    """What the driver of an owner does, with nothing hidden."""

    def __init__(self, *members: MemberConfig, **options: object) -> None:
        self.owner = Owner("owner")
        for config in members:
            self.owner.add_member(config)
        self.device = Administration(self.owner, **options)  # type: ignore[arg-type]  # passed on

    def raw(self, readable: bytes, writable: int = ROOM) -> bytes:
        return finish(self.device.execute(readable, writable))

    def answer(self, command: Command, writable: int = ROOM) -> Answer:
        found = decode_answer_untrusted(self.raw(encode_command(command), writable))
        assert found is not None
        return found

    def status(self, command: Command, writable: int = ROOM) -> tuple[int, int]:
        answer = self.answer(command, writable)
        if not answer.ok:
            assert not any(answer.result)
        return answer.status, answer.qualifier

    def result(self, command: Command, writable: int = ROOM) -> bytes:
        answer = self.answer(command, writable)
        assert answer.ok, answer.describe()
        return answer.result

    def use(self, group: GroupType) -> None:
        """Use all that the group has."""
        known = decode_bits_untrusted(self.result(commands.list_query(group)))
        self.result(commands.list_use(group, known))

    def set_up(self, get: int = 8, set_: int = 8) -> None:
        """As the standard has it, up to the first object."""
        self.use(GroupType.SELF)
        limits = commands.encode_object_limits(get, set_)
        self.result(commands.driver_cap_set(commands.DEV_PARTS_CAPABILITY, limits))
        self.use(GroupType.SR_IOV)

    def member(self, number: int = 1) -> Member:
        return self.owner.members[number]


def ready(*members: MemberConfig, objects: bool = True) -> Driver:
    """A driver that has set up; with `objects` member 1 has 5 for GET and 6 for SET."""
    driver = Driver(*(members or (a_config(),)))
    driver.set_up()
    if objects:
        driver.result(commands.object_create(1, 5, ObjectKind.GET))
        driver.result(commands.object_create(1, 6, ObjectKind.SET))
    return driver

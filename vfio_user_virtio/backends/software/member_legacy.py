"""A member under a legacy driver: what the legacy commands of its owner do to it (virtio 1.4,
Legacy Interfaces of group administration commands).

The registers are `LegacyConfig`.  Of the device's configuration a command reaches one field, or any
bytes of the MAC address, which legacy drivers also write, byte by byte.  Notifications have an
address of their own in the member (`function.LEGACY_NOTIFY`), where they cost no command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vfio_user_virtio.backends.software.function import LEGACY_NOTIFY, VIRTIO_BAR
from vfio_user_virtio.backends.software.parts_objects import Refused
from vfio_user_virtio.virtio.admin import Opcode, Qualifier, Status
from vfio_user_virtio.virtio.admin_commands import (
    NotifyInfo,
    NotifyPlace,
    decode_legacy_untrusted,
    encode_notify_info,
)
from vfio_user_virtio.virtio.legacy_config import LegacyConfig, NotOneField

if TYPE_CHECKING:
    from vfio_user_virtio.backends.software.member import Member
    from vfio_user_virtio.virtio.admin import Command

_MAC_SIZE: Final = 6
_DEVICE_FIELDS: Final = frozenset(((6, 2), (8, 2), (10, 2), (12, 4), (16, 1)))
"""(offset, size) of the fields behind the MAC address (`virtio.net_config`)."""


class MemberLegacy:
    """The legacy commands for `member`."""

    def __init__(self, member: Member) -> None:
        self._member = member
        function = member.function
        self._registers = LegacyConfig(
            function.common,
            member.config.offered,
            read_isr=lambda: function.read_isr()[0],
            kick=member.kick,
            vectors=lambda: function.msix_enabled,
        )

    def execute_untrusted(self, command: Command, room: int) -> bytes:
        """The result of a legacy command with `room` for it.  Raises Refused."""
        offset, data = decode_legacy_untrusted(command.data)
        try:
            match command.opcode:
                case Opcode.LEGACY_COMMON_CFG_READ:
                    return self._registers.read_untrusted(offset, room)
                case Opcode.LEGACY_COMMON_CFG_WRITE:
                    self._write_common(offset, data)
                case Opcode.LEGACY_DEV_CFG_READ:
                    return self._read_device(offset, room)
                case Opcode.LEGACY_DEV_CFG_WRITE:
                    self._write_device(offset, data)
                case _:
                    return encode_notify_info(
                        [NotifyInfo(NotifyPlace.MEMBER, VIRTIO_BAR, LEGACY_NOTIFY)]
                    )
        except NotOneField:
            raise Refused(Status.EINVAL, Qualifier.INVALID_FIELD) from None
        return b""

    def _write_common(self, offset: int, data: bytes) -> None:
        self._registers.write_untrusted(offset, data)
        self._member.work()

    def _read_device(self, offset: int, size: int) -> bytes:
        self._check_untrusted(offset, size)
        return self._member.device_config()[offset : offset + size]

    def _write_device(self, offset: int, data: bytes) -> None:
        self._check_untrusted(offset, len(data))
        if offset < _MAC_SIZE:
            mac = bytearray(self._member.state.filter.mac)
            mac[offset : offset + len(data)] = data
            self._member.state.filter.mac = bytes(mac)

    @staticmethod
    def _check_untrusted(offset: int, size: int) -> None:
        in_mac = 0 < size <= _MAC_SIZE - offset
        if not in_mac and (offset, size) not in _DEVICE_FIELDS:
            raise NotOneField

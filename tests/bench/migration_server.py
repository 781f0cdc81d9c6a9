"""A server of members that are slower, or have more to save, than the software model's.

    python migration_server.py FOLDER [--members N] [--first-set S] [--similar-set S] [--bulk BYTES]

listens at FOLDER/vf0.sock and so on.  All of it is the library's, but the owner's administration
queue: it can take its time (`DeviceTiming`), and the images that it gives can have so many bytes
more, in parts that no standard defines and that are marked OPTIONAL, so that any owner takes them.
"""

from __future__ import annotations

import argparse
import functools
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import trio

from vfio_user_virtio.backends.software.admin_queue import DeviceTiming, SoftwareAdminQueue
from vfio_user_virtio.backends.software.administration import Administration
from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.limits import MAX_MEMBERS, MAX_PART_SIZE
from vfio_user_virtio.migration.admin_client import AdminClient
from vfio_user_virtio.migration.member_migration import MemberMigration
from vfio_user_virtio.migration.migratable_device import MigratableDevice
from vfio_user_virtio.migration.parts_owner import PartsOwner
from vfio_user_virtio.transport.listener import serve_listener
from vfio_user_virtio.virtio.admin import (
    Opcode,
    decode_answer_untrusted,
    decode_command_untrusted,
    encode_answer,
)
from vfio_user_virtio.virtio.admin_commands import decode_count_untrusted, encode_count
from vfio_user_virtio.virtio.part_header import OPTIONAL
from vfio_user_virtio.virtio.parts import Part, encode_parts, parse_parts_untrusted

if TYPE_CHECKING:
    from vfio_user_virtio.migration.admin_client import AdminQueue

_BULK_PART: Final = 0x7F00
"""A part type that is not defined."""


class BulkyQueue:
    """`queue`, whose members' images have about `size` bytes more."""

    def __init__(self, queue: AdminQueue, size: int) -> None:
        self._queue = queue
        sizes = [MAX_PART_SIZE] * (size // MAX_PART_SIZE) + [size % MAX_PART_SIZE]
        self._bulk = encode_parts(
            Part(
                _BULK_PART,
                bytes(range(256)) * (length // 256),
                number.to_bytes(8, "little"),
                OPTIONAL,
            )
            for number, length in enumerate(sizes)
        )

    async def execute(self, readable: bytes, writable: int) -> bytes:
        written = await self._queue.execute(readable, writable)
        opcode = decode_command_untrusted(readable).opcode
        answer = decode_answer_untrusted(written)
        if answer is None or not answer.ok:
            return written
        if opcode == Opcode.DEV_PARTS_METADATA_GET:
            result = encode_count(decode_count_untrusted(answer.result) + len(self._bulk))
        elif opcode == Opcode.DEV_PARTS_GET:
            result = encode_parts(parse_parts_untrusted(answer.result)) + self._bulk
        else:
            return written
        return encode_answer(attrs.evolve(answer, result=result), writable)


async def main(options: argparse.Namespace) -> None:
    owner = Owner("owner")
    for number in range(options.members):
        owner.add_member(MemberConfig(member_id=number + 1, mac=bytes((2, 0, 0, 0, 0, number))))
    timing = DeviceTiming(first_set=options.first_set, similar_set=options.similar_set)
    queue: AdminQueue = SoftwareAdminQueue(Administration(owner), timing)
    if options.bulk:
        queue = BulkyQueue(queue, options.bulk)
    parts_owner = PartsOwner(AdminClient(queue))
    support = await parts_owner.discover()
    assert support.lack is None, support.lack
    async with trio.open_nursery() as nursery:
        nursery.start_soon(owner.run)
        for number, member in enumerate(owner.members.values()):
            migration = MemberMigration(
                parts_owner,
                member.config.member_id,
                name=member.name,
                clock=trio.current_time,
                private=member.mode,
            )
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(str(options.folder / f"vf{number}.sock"))
            listener.listen()
            device = MigratableDevice(member, migration, member.logging)
            nursery.start_soon(serve_listener, listener, device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--members", type=int, default=1, choices=range(1, MAX_MEMBERS + 1), metavar="N"
    )
    parser.add_argument("--first-set", type=float, default=0.0)
    parser.add_argument("--similar-set", type=float, default=0.0)
    parser.add_argument("--bulk", type=int, default=0)
    trio.run(functools.partial(main, parser.parse_args()))

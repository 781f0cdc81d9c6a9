"""Commands and what may become of them, and the discovery of what an owner can do."""

from __future__ import annotations

import errno

import pytest
import trio

from tests.migration.owner_rig import OwnerRig
from vfio_user_virtio import limits
from vfio_user_virtio.errors import HostError
from vfio_user_virtio.migration.admin_client import AdminClient, AdminError
from vfio_user_virtio.virtio.admin import (
    Answer,
    Command,
    GroupType,
    Opcode,
    Qualifier,
    Status,
    decode_command_untrusted,
    encode_answer,
    encode_bits,
)
from vfio_user_virtio.virtio.admin_commands import ObjectKind, list_query, mode_set


class Queue:
    """Answers in turn, after a time; counts what is under way."""

    def __init__(self, *answers: bytes | Answer, seconds: float = 0) -> None:
        self._answers = [
            encode_answer(one, 64) if isinstance(one, Answer) else one for one in answers
        ]
        self._seconds = seconds
        self.sent: list[Command] = []
        self.under_way = 0
        self.most = 0

    async def execute(self, readable: bytes, writable: int) -> bytes:
        self.sent.append(decode_command_untrusted(readable))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await trio.sleep(self._seconds)
        finally:
            self.under_way -= 1
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


AGAIN = Answer(Status.EAGAIN, Qualifier.TRYAGAIN)
NO_RESOURCE = Answer(Status.ENOMEM, Qualifier.NORESOURCE)
OK = Answer(Status.OK)


@pytest.mark.parametrize("answer", [AGAIN, NO_RESOURCE, Answer(Status.EAGAIN)])
async def test_what_wants_another_try_gets_it(answer: Answer, autojump_clock: object) -> None:
    queue = Queue(answer, answer, OK)
    await AdminClient(queue).execute(mode_set(1, stopped=True))
    assert len(queue.sent) == 3


async def test_tries_are_bounded(autojump_clock: object) -> None:
    queue = Queue(AGAIN)
    with pytest.raises(AdminError, match=r"DEV_MODE_SET for member 1 failed: EAGAIN \(TRYAGAIN\)"):
        await AdminClient(queue).execute(mode_set(1, stopped=True))
    assert len(queue.sent) == limits.ADMIN_RETRIES


@pytest.mark.parametrize(("status", "number"), [(Status.ENOSPC, errno.ENOSPC), (99, errno.EINVAL)])
async def test_an_error_has_status_qualifier_and_errno(status: int, number: int) -> None:
    queue = Queue(Answer(status, Qualifier.INVALID_FIELD))
    with pytest.raises(AdminError, match="INVALID_FIELD") as caught:
        await AdminClient(queue).execute(list_query(GroupType.SELF))
    assert caught.value.errno == number
    assert "LIST_QUERY for the owner" in str(caught.value)


async def test_no_status_is_no_success() -> None:
    with pytest.raises(AdminError, match="answered with 3 bytes") as caught:
        await AdminClient(Queue(b"\0\0\0")).execute(mode_set(1, stopped=False))
    assert caught.value.errno == errno.EIO


async def test_a_command_has_a_time_limit(autojump_clock: object) -> None:
    with pytest.raises(AdminError, match="not done within 3 s") as caught:
        await AdminClient(Queue(OK, seconds=10)).execute(mode_set(1, stopped=True))
    assert caught.value.errno == errno.ETIMEDOUT


async def test_one_at_a_time_per_member_and_a_depth_in_all(autojump_clock: object) -> None:
    queue = Queue(OK, seconds=0.5)
    client = AdminClient(queue, depth=4)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(client.execute, mode_set(1, stopped=True))
    assert queue.most == 1
    async with trio.open_nursery() as nursery:
        for member in range(1, 10):
            nursery.start_soon(client.execute, mode_set(member, stopped=True))
    assert queue.most == 4


async def test_discovery_finds_what_the_software_owner_has() -> None:
    rig = OwnerRig(objects=7)
    support = await rig.parts_owner.discover()
    assert (support.lack, support.objects) == (None, 7)


LACKS = {
    Opcode.CAP_ID_LIST_QUERY: (Answer(0, 0, encode_bits([1])), "VIRTIO_DEV_PARTS_CAP"),
    Opcode.DEVICE_CAP_GET: (Answer(0, 0, bytes(8)), "no device-parts objects"),
    Opcode.DRIVER_CAP_SET: (Answer(Status.EINVAL), "DRIVER_CAP_SET for the owner failed"),
}


@pytest.mark.parametrize("opcode", LACKS)
async def test_an_owner_that_lacks_something_is_not_offered(opcode: Opcode) -> None:
    answer, reason = LACKS[opcode]
    rig = OwnerRig()
    rig.queue.fault = lambda c: answer if c.opcode == opcode else None
    support = await rig.parts_owner.discover()
    assert support.lack is not None
    assert reason in support.lack


async def test_a_group_without_device_parts_is_named() -> None:
    rig = OwnerRig()
    rig.queue.fault = lambda c: (
        Answer(0, 0, encode_bits([0, 1, Opcode.DEV_MODE_SET]))
        if c.opcode == Opcode.LIST_QUERY and c.group_type == GroupType.SR_IOV
        else None
    )
    support = await rig.parts_owner.discover()
    assert support.lack is not None
    assert "RESOURCE_OBJ_CREATE" in support.lack
    assert "DEV_MODE_SET" not in support.lack


async def test_an_owner_made_for_linux_refuses_the_self_lists() -> None:
    """Linux's driver never sends them, so a device may refuse; that alone is no lack."""
    rig = OwnerRig()
    rig.queue.fault = lambda c: (
        Answer(Status.EINVAL)
        if c.group_type == GroupType.SELF and c.opcode == Opcode.LIST_QUERY
        else None
    )
    support = await rig.parts_owner.discover()
    assert support.lack is not None
    assert "CAP_ID_LIST_QUERY" in support.lack


async def test_ids_are_used_again_and_run_out() -> None:
    rig = await OwnerRig(objects=2).discover()
    owner = rig.parts_owner
    first = await owner.create(1, ObjectKind.GET)
    second = await owner.create(2, ObjectKind.SET)
    assert {first, second} == {0, 1}
    with pytest.raises(AdminError, match="all 2 device-parts objects") as caught:
        await owner.create(1, ObjectKind.SET)
    assert caught.value.errno == errno.ENOSPC
    await owner.destroy(1, first)
    assert await owner.create(2, ObjectKind.GET) == first


async def test_an_object_that_is_gone_is_destroyed() -> None:
    rig = await OwnerRig().discover()
    object_id = await rig.parts_owner.create(1, ObjectKind.GET)
    rig.queue.fault = lambda c: Answer(Status.ENXIO)
    await rig.parts_owner.destroy(1, object_id)
    assert rig.parts_owner.objects_in_use == 0


@pytest.mark.parametrize(("status", "left"), [(Status.ENOSPC, 0), (Status.EEXIST, 1)])
async def test_an_id_that_the_device_holds_is_not_tried_again(status: Status, left: int) -> None:
    rig = await OwnerRig().discover()
    rig.queue.fail_command(1, status)
    with pytest.raises(AdminError):
        await rig.parts_owner.create(1, ObjectKind.GET)
    assert rig.parts_owner.objects_in_use == left


async def test_an_owner_that_is_gone_is_the_hosts_trouble() -> None:
    class Gone:
        async def execute(self, readable: bytes, writable: int) -> bytes:
            raise HostError("the owner is gone")

    with pytest.raises(HostError, match="gone"):
        await AdminClient(Gone()).execute(mode_set(1, stopped=True))


async def test_commands_for_members_wait_while_the_owner_is_brought_up(
    autojump_clock: object,
) -> None:
    """The owner's own do not; and none waits longer than it may take."""
    queue = Queue(Answer(Status.OK))
    client = AdminClient(queue)
    async with trio.open_nursery() as nursery:
        with client.members_wait():
            nursery.start_soon(client.execute, mode_set(1, stopped=True))
            await trio.sleep(1)
            await client.execute(list_query(GroupType.SR_IOV), 8)
            assert [command.opcode for command in queue.sent] == [Opcode.LIST_QUERY]
    assert [command.opcode for command in queue.sent[1:]] == [Opcode.DEV_MODE_SET]
    with client.members_wait(), pytest.raises(AdminError, match="was not done within"):
        await client.execute(mode_set(1, stopped=True))
    await client.execute(mode_set(1, stopped=True))

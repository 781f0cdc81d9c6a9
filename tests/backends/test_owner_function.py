"""The served PF, driven register by register as a PCI driver of its own would."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests.backends.owner_function_rig import PF_MAC, Pf
from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.admin_queue import DeviceTiming, SoftwareAdminQueue
from vfio_user_virtio.backends.software.owner_function_config import ADMIN_QUEUE
from vfio_user_virtio.errors import RemoteError
from vfio_user_virtio.testing.driver_queue import DriverQueue
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.loopback import served
from vfio_user_virtio.testing.virtio_pci import COMMAND, Register, VirtioPci
from vfio_user_virtio.virtio import admin_commands as commands
from vfio_user_virtio.virtio.admin import (
    GroupType,
    Opcode,
    Qualifier,
    Status,
    decode_answer_untrusted,
    decode_bits_untrusted,
    decode_command_untrusted,
    encode_command,
)
from vfio_user_virtio.virtio.common_config import Status as DeviceStatus
from vfio_user_virtio.virtio.features import Feature, mask_of
from vfio_user_virtio.virtio.net_config import NET_CONFIG_SIZE, NetStatus, decode_net_config

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vfio_user_virtio.testing.guest_ram import GuestBuffer
    from vfio_user_virtio.testing.interrupt import Interrupt
    from vfio_user_virtio.transport.client import Client
    from vfio_user_virtio.virtio.admin import Answer, Command

PLAIN: Final = mask_of((Feature.VERSION_1, Feature.ADMIN_VQ))
ALL: Final = PLAIN | mask_of((Feature.INDIRECT_DESC, Feature.EVENT_IDX))
QUERY: Final = commands.list_query(GroupType.SR_IOV)


class Driver:
    """A driver of the PF with as little between as can be."""

    def __init__(self, client: Client, pci: VirtioPci, ram: GuestRam) -> None:
        self.client = client
        self.pci = pci
        self.ram = ram
        self.interrupts: list[Interrupt] = []
        self.queue: DriverQueue[GuestBuffer] = DriverQueue(ram, limits.ADMIN_RING_SIZE)

    async def start(self, features: int = ALL, *, queue: bool = True) -> None:
        await self.pci.negotiate(features)
        self.interrupts = await self.pci.take_msix(4)
        await self.pci.write(Register.CONFIG_MSIX_VECTOR, 0)
        self.queue = DriverQueue(
            self.ram,
            limits.ADMIN_RING_SIZE,
            event_idx=bool(features & Feature.EVENT_IDX.mask),
            indirect=bool(features & Feature.INDIRECT_DESC.mask),
        )
        if queue:
            await self.pci.enable_queue(ADMIN_QUEUE, self.queue.ring, vector=3)
        await self.pci.driver_ok()

    def add(self, readable: bytes, room: int) -> GuestBuffer:
        source = self.ram.allocate(max(len(readable), 1))
        source.memory[: len(readable)] = readable
        target = self.ram.allocate(room)
        half = len(readable) // 2
        self.queue.add(
            target,
            [(source.iova, half), (source.iova + half, len(readable) - half)],
            [(target.iova, room // 2), (target.iova + room // 2, room - room // 2)],
        )
        return target

    async def send(self, command: Command, room: int = 64) -> Answer:
        """One command, from kick to interrupt."""
        seen = self.interrupts[3].count
        self.add(encode_command(command), room)
        if self.queue.publish():
            await self.pci.notify(ADMIN_QUEUE)
        await self.interrupts[3].wait(seen)
        (used,) = self.queue.collect()
        assert self.queue.enable_interrupts()
        answer = decode_answer_untrusted(bytes(used.token.memory[: used.length]))
        assert answer is not None
        return answer


@contextlib.asynccontextmanager
async def a_driver(
    pf: Pf | None = None, *, remote: bool = False, step: int | None = None
) -> AsyncIterator[Driver]:
    with GuestRam() as ram:
        async with served((pf or Pf()).function, memory=ram, name="pf") as client:
            await ram.map(client, remote=remote, step=step)
            pci = await VirtioPci.open(client)
            yield Driver(client, pci, ram)
            pci.close()


async def test_what_a_driver_finds() -> None:
    async with a_driver() as driver:
        pci = driver.pci
        assert (await pci.config_read(0, 4), await pci.msix_vectors()) == (0x1041_1AF4, 4)
        assert await pci.read(Register.NUM_QUEUES) == 2
        assert await pci.read(Register.ADMIN_QUEUE_INDEX) == 2
        assert await pci.read(Register.ADMIN_QUEUE_NUM) == 1
        assert [await pci.queue_size(index) for index in range(4)] == [64, 64, 64, 0]
        offered = await pci.offered()
        assert offered & Feature.ADMIN_VQ.mask
        assert offered & Feature.ACCESS_PLATFORM.mask
        assert not offered & Feature.SR_IOV.mask
        config = decode_net_config(await pci.device_config(0, NET_CONFIG_SIZE))
        assert config.mac == PF_MAC
        assert not config.status & NetStatus.LINK_UP


async def test_sr_iov_is_offered_where_asked() -> None:
    async with a_driver(Pf(sr_iov=True)) as driver:
        assert await driver.pci.offered() & Feature.SR_IOV.mask


@pytest.mark.parametrize("features", [PLAIN, ALL], ids=["plain", "all"])
@pytest.mark.parametrize(
    ("remote", "step"),
    [(False, None), (False, 4096), (True, None)],
    ids=["mapped", "pages", "messages"],
)
async def test_commands_by_ring_and_interrupt(
    features: int, remote: bool, step: int | None
) -> None:
    async with a_driver(remote=remote, step=step) as driver:
        await driver.start(features)
        for _ in range(2 * limits.ADMIN_RING_SIZE):
            answer = await driver.send(QUERY)
            assert answer.ok
        known = decode_bits_untrusted(answer.result)
        assert Opcode.DEV_PARTS_GET in known
        assert (await driver.send(commands.list_use(GroupType.SR_IOV, known))).ok
        assert (await driver.send(commands.mode_set(2, stopped=True))).ok
        assert driver.interrupts[0].count == 0


async def test_what_the_driver_is_told_is_that_of_the_owner() -> None:
    pf = Pf()
    async with a_driver(pf) as driver:
        await driver.start()
        known = decode_bits_untrusted((await driver.send(QUERY)).result)
        await driver.send(commands.list_use(GroupType.SR_IOV, known))
        await driver.send(commands.mode_set(2, stopped=True))
        assert [member.mode.stopped for member in pf.owner.members.values()] == [False, True]
        answer = await driver.send(commands.mode_set(3, stopped=True))
        assert (answer.status, answer.qualifier) == (Status.EINVAL, Qualifier.INVALID_MEMBER)


async def test_linux_compatibility_can_be_turned_off() -> None:
    async with a_driver(Pf(linux_compat=False)) as driver:
        await driver.start()
        answer = await driver.send(commands.cap_id_list_query())
        assert (answer.status, answer.qualifier) == (Status.EINVAL, Qualifier.INVALID_OPCODE)


async def test_commands_for_two_members_at_the_same_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Each takes 1 s: three for one member beside two for the other take 3 s."""
    pf = Pf(timing=DeviceTiming(command=1.0))
    async with a_driver(pf) as driver:
        await driver.start()
        for member in (1, 1, 2, 1, 2):
            driver.add(encode_command(commands.mode_set(member, stopped=False)), 8)
        start = trio.current_time()
        driver.queue.publish()
        await driver.pci.notify(ADMIN_QUEUE)
        ends = []
        while driver.queue.outstanding:
            await driver.interrupts[3].wait()
            ends += [round(trio.current_time() - start)] * len(driver.queue.collect())
            driver.queue.enable_interrupts()
        assert ends == [1, 1, 2, 2, 3]


async def test_commands_begin_in_the_order_of_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    execute = SoftwareAdminQueue.execute

    async def watched(queue: SoftwareAdminQueue, readable: bytes, writable: int) -> bytes:
        begun.append(decode_command_untrusted(readable).member_id)
        return await execute(queue, readable, writable)

    monkeypatch.setattr(SoftwareAdminQueue, "execute", watched)
    count = limits.ADMIN_QUEUE_DEPTH // 2
    async with a_driver() as driver:
        await driver.start()
        for member in range(count):  # known or not: both are answered
            driver.add(encode_command(commands.mode_set(member, stopped=False)), 8)
        driver.queue.publish()
        await driver.pci.notify(ADMIN_QUEUE)
        while len(begun) < count:
            await trio.lowlevel.checkpoint()
    assert begun == list(range(count))


async def test_a_reset_ends_what_is_under_way(autojump_clock: trio.testing.MockClock) -> None:
    pf = Pf(timing=DeviceTiming(command=5.0))
    async with a_driver(pf) as driver:
        await driver.start()
        target = driver.add(encode_command(QUERY), 64)
        driver.queue.publish()
        await driver.pci.notify(ADMIN_QUEUE)
        await trio.sleep(1)
        await driver.pci.reset()
        await trio.sleep(100)
        assert driver.queue.ring.used_idx == 0
        assert not any(target.memory)
        await driver.start()
        assert (await driver.send(QUERY)).ok


async def test_a_reset_forgets_what_was_negotiated() -> None:
    pf = Pf()
    async with a_driver(pf) as driver:
        for _ in range(2):
            await driver.start()
            refused = await driver.send(commands.mode_set(1, stopped=True))
            assert refused.qualifier == Qualifier.INVALID_OPCODE
            used = commands.list_use(GroupType.SR_IOV, [0, 1, Opcode.DEV_MODE_SET])
            assert (await driver.send(used)).ok
            assert (await driver.send(commands.mode_set(1, stopped=True))).ok
    assert pf.member(1).mode.stopped, "a member is left as it is"
    async with a_driver(pf) as driver:
        await driver.start()
        assert (await driver.send(QUERY)).ok
        refused = await driver.send(commands.mode_set(1, stopped=True))
        assert refused.qualifier == Qualifier.INVALID_OPCODE
        await driver.pci.function_level_reset()
        await driver.pci.set_up()
        await driver.start()
        assert (await driver.send(QUERY)).ok


async def test_a_log_for_debugging_tells_each_command(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with a_driver() as driver:
        await driver.start()
        await driver.send(QUERY, room=16)
        await driver.send(commands.parts_set(1, 7, bytes(100)))
        driver.add(encode_command(QUERY), 4)
        driver.queue.publish()
        await driver.pci.notify(ADMIN_QUEUE)
        await driver.interrupts[3].wait(2)
    lines = [line for line in caplog.messages if " of group " in line]
    assert lines == [
        "pf: LIST_QUERY of group 1, member 0: OK (OK); data none, result ffff030000000000",
        "pf: DEV_PARTS_SET of group 1, member 1: EINVAL (INVALID_OPCODE); "
        "data 000000000700000000000000000000000000000000000000… (112 bytes), result none",
        "pf: LIST_QUERY of group 1, member 0: no room for an answer",
    ]


@pytest.mark.parametrize("fault", ["buffer", "ring", "alignment", "chain"])
async def test_a_broken_driver_has_to_reset(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with a_driver() as driver:
        await driver.start(queue=fault in ("buffer", "chain"))
        pci, ring = driver.pci, driver.queue.ring
        if fault == "buffer":
            driver.queue.add(driver.ram.allocate(8), [(0x10, 24)], [(0x100, 64)])
            driver.queue.publish()
        elif fault == "chain":
            ring.set_descriptor(0, driver.ram.iova, 24, flags=1, next_index=0)
            ring.avail_idx = 1
        else:
            address = 0x1000 if fault == "ring" else ring.desc + 8
            await pci.enable_queue(ADMIN_QUEUE, ring, instead={Register.QUEUE_DESC: address})
            ring.avail_idx = 1
        seen = driver.interrupts[0].count
        await pci.notify(ADMIN_QUEUE)
        if not driver.interrupts[0].poll():
            await driver.interrupts[0].wait(seen)
        assert await pci.status() & DeviceStatus.DEVICE_NEEDS_RESET
        assert "the driver broke a rule" in caplog.text
        await driver.start()
        assert (await driver.send(QUERY)).ok


async def test_a_command_that_is_too_long_changes_nothing() -> None:
    async with a_driver() as driver:
        await driver.start()
        used = commands.list_use(GroupType.SR_IOV, [0, 1, Opcode.DEV_MODE_SET])
        padding = bytes(limits.MAX_ADMIN_COMMAND_SIZE)
        seen = driver.interrupts[3].count
        target = driver.add(encode_command(used) + padding, 8)
        driver.queue.publish()
        await driver.pci.notify(ADMIN_QUEUE)
        await driver.interrupts[3].wait(seen)
        assert len(driver.queue.collect()) == 1
        answer = decode_answer_untrusted(bytes(target.memory))
        assert answer is not None
        assert answer.status == Status.ENOMEM
        driver.queue.enable_interrupts()
        refused = await driver.send(commands.mode_set(1, stopped=True))
        assert refused.qualifier == Qualifier.INVALID_OPCODE


@pytest.mark.parametrize("why", ["not negotiated", "no bus master"])
async def test_a_queue_that_may_not_run_is_left_alone(
    why: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with a_driver() as driver:
        await driver.start(ALL & ~Feature.ADMIN_VQ.mask if why == "not negotiated" else ALL)
        if why == "no bus master":
            await driver.pci.config_write(COMMAND, 2, 2)
        driver.add(encode_command(QUERY), 64)
        driver.queue.publish()
        await driver.pci.notify(ADMIN_QUEUE)
        await trio.sleep(10)
        assert driver.queue.ring.used_idx == 0
        assert not await driver.pci.status() & DeviceStatus.DEVICE_NEEDS_RESET


async def test_a_pf_does_not_migrate() -> None:
    async with a_driver() as driver:
        for ask in (
            lambda: driver.client.migration_read(8),
            lambda: driver.client.migration_write(b"x"),
            driver.client.precopy_info,
        ):
            with pytest.raises(RemoteError):
                await ask()


async def test_what_a_driver_brings_about_is_logged_so_often(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with a_driver() as driver:
        for _ in range(limits.MAX_GUEST_LOG_LINES + 10):
            await driver.pci.negotiate(PLAIN)
            await driver.pci.driver_ok()
    lines = [line for line in caplog.messages if "the driver is ready" in line]
    assert len(lines) == limits.MAX_GUEST_LOG_LINES
    assert lines[-1].endswith("(no more of this until the next session)")

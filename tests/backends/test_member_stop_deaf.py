"""A stop that the client waits for, answering nothing meanwhile: QEMU, whose memory has no fd.

Whatever was under way, the stop is over in time, and the rings stand where their used indices say:
whether the client carries the last access out afterwards, as QEMU does, or never.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest
import trio
import trio.testing

from tests.backends.member_rig import MAC_A, MAC_B, frame, ping_pong, receive, until
from tests.backends.migration_rig import rig
from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.backends.software.migratable import migratable_members
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.device import FeatureOperation
from vfio_user_virtio.protocol.feature import Feature
from vfio_user_virtio.protocol.migration import MigrationState, encode_device_state
from vfio_user_virtio.testing.guest_ram import GuestRam
from vfio_user_virtio.testing.loopback import served
from vfio_user_virtio.testing.net_driver import NetDriver
from vfio_user_virtio.testing.virtio_pci import VirtioPci
from vfio_user_virtio.virtio.common_config import Status

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.backends.migration_rig import Place
    from vfio_user_virtio.protocol.framing import Frame
    from vfio_user_virtio.transport.endpoint import Endpoint

FRAMES: Final = 3


class DeafClient:
    """The device's way to the memory of a client that answers nothing from access `left` on."""

    def __init__(self, place: Place) -> None:
        access = place.member._queues.access
        assert access is not None
        self._access = access
        self.left = 0
        self.asked: list[Callable[[], Awaitable[object]]] = []

    async def _answer(self, carry_out: Callable[[], Awaitable[object]]) -> None:
        self.left -= 1
        if self.left == 0 or self.asked:
            self.asked.append(carry_out)
            await trio.sleep_forever()

    async def read(self, iova: int, size: int) -> bytes:
        await self._answer(lambda: self._access.read(iova, size))
        return await self._access.read(iova, size)

    async def write(self, iova: int, data: bytes) -> None:
        await self._answer(lambda: self._access.write(iova, data))
        await self._access.write(iova, data)


async def numbers(driver: NetDriver) -> list[int]:
    """The numbers of all frames that have come."""
    found: list[int] = []
    while True:
        with trio.move_on_after(1) as patience:
            data = (await driver.receive()).data
        if patience.cancelled_caught:
            return found
        if data[12:14] == b"\x88\xb5":
            found.append(data[14])


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("at", range(1, 42, 3))
async def test_stop_while_the_client_answers_nothing(
    at: int, late: bool, moves: bool, autojump_clock: trio.testing.MockClock
) -> None:
    async with rig(remote=True, rx_buffers=4) as made:
        source = made.here
        deaf = DeafClient(source)
        source.member._queues.access = deaf  # type: ignore[assignment]  # has what is used of it
        await made.driver.stop()
        await made.driver.start()
        await trio.testing.wait_all_tasks_blocked()
        deaf.left = at
        for number in range(FRAMES):
            await made.driver.send(frame(MAC_B, MAC_A, bytes([number])))
            await made.peer.send(frame(MAC_A, MAC_B, bytes([number])))
        await made.peer.flush()
        await until(lambda: bool(deaf.asked))
        began = trio.current_time()
        assert await source.member.mode.stop()
        assert trio.current_time() - began <= limits.STOP_SECONDS
        await trio.testing.wait_all_tasks_blocked()
        assert len(deaf.asked) == 1, "a member that is stopped asks for nothing"
        carry_out, deaf.asked = deaf.asked[0], []
        if late:
            await carry_out()
        if moves:
            await made.migrate()
        else:
            source.member.mode.resume()
        sent = await numbers(made.peer)
        assert sorted(set(sent)) == list(range(FRAMES)), "nothing that was sent is lost"
        assert sent == sorted(sent)
        assert len(sent) <= FRAMES + 1, "one that was not finished may be sent twice"
        received = await numbers(made.driver)
        assert received == sorted(set(received)), "nothing comes twice"
        assert moves or len(received) >= FRAMES - 1, "but one that was being received may be lost"
        await made.driver.flush()
        await ping_pong(made.driver, made.peer)
        assert not await made.here.pci.status() & Status.DEVICE_NEEDS_RESET


@pytest.mark.parametrize("at", range(1, 9))
async def test_a_command_under_a_stop_is_answered_after_it(
    at: int, autojump_clock: trio.testing.MockClock
) -> None:
    async with rig(remote=True) as made:
        source = made.here
        deaf = DeafClient(source)
        source.member._queues.access = deaf  # type: ignore[assignment]  # has what is used of it
        await made.driver.stop()
        await made.driver.start()
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            deaf.left = at
            nursery.start_soon(made.driver.control.set_rx_mode, "promisc", True)
            await until(lambda: bool(deaf.asked))
            assert await source.member.mode.stop()
            carry_out, deaf.asked = deaf.asked[0], []
            await carry_out()
            await made.migrate()
        assert made.here.member.state.filter.promisc
        await made.peer.send(frame(b"\2other", MAC_B, b"to somebody else"))
        assert (await receive(made.driver)).data[14:30] == b"to somebody else"


async def test_a_real_client_that_serves_no_memory_while_it_waits(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """What it was asked meanwhile it answers afterwards; nobody waits for that, nor minds."""
    owner = Owner("owner")
    owner.add_member(MemberConfig(mac=MAC_A))
    device = (await migratable_members(owner))[1]
    with GuestRam(1 << 22) as ram:
        async with served(device, memory=ram) as client:
            await ram.map(client, remote=True)
            pci = await VirtioPci.open(client)
            driver = NetDriver(pci, ram, queue_size=16)
            await driver.start()
            await trio.testing.wait_all_tasks_blocked()
            serve = client._serve
            held: list[tuple[Endpoint, Frame]] = []

            async def hold(endpoint: Endpoint, asked: Frame) -> None:
                held.append((endpoint, asked))

            async def go_to(state: MigrationState) -> None:
                data = encode_device_state(state)
                await client.feature(Feature.MIG_DEVICE_STATE, FeatureOperation.SET, data)

            for _ in range(3):
                monkeypatch.setattr(client, "_serve", hold)
                await driver.send(frame(MAC_B, MAC_A))
                await until(lambda: bool(held))
                began = trio.current_time()
                await go_to(MigrationState.STOP)
                assert trio.current_time() - began <= limits.STOP_SECONDS
                monkeypatch.setattr(client, "_serve", serve)
                assert len(held) == 1
                await serve(*held.pop())
                await go_to(MigrationState.RUNNING)
                await driver.flush()
            pci.close()

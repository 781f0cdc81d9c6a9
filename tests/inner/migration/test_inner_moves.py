"""A guest under traffic moves between physical VFs: of one owner, and of two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from tests.inner.physical_rig import RAM, PhysicalRig, left_at_owner, physical_rig, place
from tests.migration.test_guest_move_failures import (
    SOURCE_STATES,
    TARGET_STATES,
    at_the_change_to,
    refuse,
)
from vfio_user_virtio.backends.vfio.owner import VfioOwner
from vfio_user_virtio.errors import ConnectionLost, RemoteError
from vfio_user_virtio.limits import PAGE_SIZE
from vfio_user_virtio.migration.states import (
    EVERYTHING,
    RESUMING,
    RUNNING,
    STOP_AND_COPY,
    STOP_COPY,
    VFIO_USER,
    WITHOUT_PRE_COPY,
)
from vfio_user_virtio.protocol.migration import MigrationFlags

if TYPE_CHECKING:
    from tests.inner.conftest import InnerFacts

MEMBER_ID: Final = slice(16, 24)
NO_MEMBER: Final = (9).to_bytes(8, "little")


async def check_idle(made: PhysicalRig, servers: str) -> None:
    for name in servers:
        assert made.devices[name].migration.state is RUNNING
        assert await left_at_owner(made.devices[name].migration) == 0


async def test_one_owner(
    inner: InnerFacts, best_way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each round of copying copies all: no IOMMU that QEMU emulates tracks what is written, which
    is told."""
    async with physical_rig(inner, best_way, "ab") as made:
        await made.rig.start()
        here = made.rig.guest.place
        await here.start_logging()
        for _ in range(2):
            assert await here.written() == set(range(RAM // PAGE_SIZE))
        await here.stop_logging()
        assert "the host's IOMMU cannot tell which pages a device has written" in caplog.text
        await moves_under_traffic(made, "ab")


async def test_two_owners(inner: InnerFacts, way: str) -> None:
    async with physical_rig(inner, way, "ac") as made:
        await made.rig.start()
        await moves_under_traffic(made, "ac")


async def moves_under_traffic(made: PhysicalRig, servers: str) -> None:
    rig = made.rig
    for precopy in (True, False):
        for _ in range(2):
            migration = await rig.move(precopy=precopy)
            assert migration.precopy == precopy
            await rig.traffic.goes_on(rig.here)
    await rig.finish()
    assert len(rig.host.announced) == 4
    await check_idle(made, servers)


@pytest.mark.parametrize(
    "options",
    [(STOP_AND_COPY, EVERYTHING), (VFIO_USER, WITHOUT_PRE_COPY)],
    ids=["none and all", "PRE_COPY and P2P"],
)
async def test_states_that_servers_have(
    inner: InnerFacts, best_way: str, options: tuple[MigrationFlags, MigrationFlags]
) -> None:
    async with physical_rig(inner, best_way, "ac", options) as made:
        rig = made.rig
        await rig.start()
        for _ in range(2):
            migration = await rig.move()
            assert migration.precopy == (MigrationFlags.PRE_COPY in options[0] & options[1])
            await rig.traffic.goes_on(rig.here)
        await rig.finish()


async def test_moves_that_fail(inner: InnerFacts, best_way: str) -> None:
    """At any step: the guest goes on where it was, and moves later.  If the target's client goes it
    goes on too; if its own does, it is over, and neither VF runs."""
    async with physical_rig(inner, best_way, more="b") as made:
        rig = made.rig
        await rig.start()
        for server, side, states in (
            ("c", "target", TARGET_STATES),
            ("a", "source", SOURCE_STATES),
        ):
            for state in states:
                at_the_change_to(rig.places[server].client, state, refuse)
                with pytest.raises(RemoteError, match=f"the {side} refuses the change to"):
                    await rig.move()
                assert rig.here == "a"
                await rig.traffic.goes_on("a")
        assert rig.host.announced == []
        await rig.move()
        await rig.traffic.goes_on("c")
        target, source = rig.places["a"].client, rig.places["c"].client
        at_the_change_to(target, RESUMING, target.close)
        with pytest.raises(ConnectionLost, match="the target"):
            await rig.move()
        await rig.traffic.goes_on("c")
        await rig.finish()
        async with place(made.devices["b"]) as another:
            rig.places["a"] = another
            at_the_change_to(source, STOP_COPY, source.close)
            with pytest.raises(ConnectionLost, match="the source"):
                await rig.move()
        assert not rig.guest.client.running
    for device in made.devices.values():
        assert device.migration.state is RUNNING


async def test_a_command_fails(
    inner: InnerFacts, best_way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each one once, refused by the owner itself: it is sent for a member that there is none."""
    execute = VfioOwner.execute
    sent, spoilt = 0, 0

    async def counted(owner: VfioOwner, readable: bytes, writable: int) -> bytes:
        nonlocal sent
        sent += 1
        if sent == spoilt:
            changed = bytearray(readable)
            changed[MEMBER_ID] = NO_MEMBER
            readable = bytes(changed)
        return await execute(owner, readable, writable)

    monkeypatch.setattr(VfioOwner, "execute", counted)
    async with physical_rig(inner, best_way) as made:
        rig = made.rig
        await rig.start()
        sent = 0
        await rig.move()
        await rig.move()
        commands, moved = sent // 2, 0
        for number in range(1, commands + 1):
            sent, spoilt, before = 0, number, rig.here
            try:
                await rig.move()
            except RemoteError:
                assert rig.here == before
            else:
                moved += 1
            assert sent >= spoilt
        spoilt = 0
        assert 0 < moved < commands, "an object that is not destroyed is no reason to stop"
        await rig.move()
        await rig.finish()
        await check_idle(made, "ac")

"""A live guest under traffic moves between two servers by their control interfaces alone: nothing
lost, doubled or reordered inside a device, and its memory is what it was, page by page."""

from __future__ import annotations

import pytest

from tests.control.control_rig import controlled_rig, move
from vfio_user_virtio.control.varlink import VarlinkError
from vfio_user_virtio.device import FeatureOperation
from vfio_user_virtio.errors import RemoteError
from vfio_user_virtio.protocol.feature import Feature
from vfio_user_virtio.protocol.migration import MigrationState, encode_device_state


@pytest.mark.parametrize("remote", [False, True], ids=["mapped", "messages"])
@pytest.mark.parametrize("msix", [True, False], ids=["msix", "intx"])
async def test_there_and_back(msix: bool, remote: bool) -> None:
    async with controlled_rig(msix=msix, remote=remote) as (made, servers):
        await made.start()
        async with servers["a"].control() as a, servers["b"].control() as b:
            for source, target, place in ((a, b, "b"), (b, a, "a"), (a, b, "b")):
                before = made.guest.place
                moved = await move(made, source, target)
                assert moved.image > 100
                assert moved.pages > 0
                await before.client.reset()
                await made.traffic.goes_on(place)
                (seen,) = await target.devices()
                assert seen.migration is not None
                assert (seen.migration.state, seen.migration.holder) == ("RUNNING", "nobody")
            await made.finish()
            assert made.host.announced == ["b", "a", "b"]


@pytest.mark.parametrize("pairs", [2, 8])
async def test_with_several_queue_pairs(pairs: int) -> None:
    async with controlled_rig(member={"queue_pairs": pairs}, max_pairs=pairs, rx_buffers=32) as (
        made,
        servers,
    ):
        await made.start()
        async with servers["a"].control() as a, servers["b"].control() as b:
            await move(made, a, b)
            await made.traffic.goes_on("b")
            await made.finish()


async def test_an_orchestrator_that_dies_leaves_a_guest_that_runs() -> None:
    """At the worst moment: the source is stopped, the target has all of it but the word to run."""
    async with controlled_rig() as (made, servers):
        await made.start()
        async with servers["a"].control() as a, servers["b"].control() as b:
            await a.start_dirty_log("vm")
            await a.quiesce("vm")
            await b.set_migration_state("vm", "RESUMING")
            await a.set_migration_state("vm", "STOP_COPY")
            await b.write_image("vm", await a.read_image("vm"))
            (target,) = await b.devices()
            assert target.migration is not None
            assert target.migration.half_loaded
            assert (target.migration.images, target.migration.holder) == (1, "control")
        made.traffic.given_up()
        async with servers["a"].control() as a, servers["b"].control() as b:
            await made.traffic.goes_on("a")
            for control in (a, b):
                (device,) = await control.devices()
                assert device.migration is not None
                assert device.migration.state == "RUNNING"
                assert not device.migration.half_loaded
                assert device.dirty_log == "nobody"
            # and the target is as new
            await move(made, a, b)
            await made.traffic.goes_on("b")
            await made.finish()
        assert made.host.announced == ["b"]


async def test_a_target_that_does_not_fit_is_refused_before_the_source_is_stopped() -> None:
    async with controlled_rig(target={"mtu": 1400}) as (made, servers):
        await made.start()
        async with servers["a"].control() as a, servers["b"].control() as b:
            await a.set_migration_state("vm", "PRE_COPY")
            await b.set_migration_state("vm", "RESUMING")
            image = await a.read_image("vm")
            with pytest.raises(VarlinkError, match=r"Refused.*DEV_PARTS_SET") as caught:
                await b.write_image("vm", image)
            assert caught.value.parameters["device"] == "vm"
            await b.release("vm")
            await a.release("vm")
        await made.traffic.goes_on("a")
        await made.finish()


async def test_a_client_that_migrates_comes_first_and_so_does_control() -> None:
    async with controlled_rig() as (made, servers):
        await made.start()
        client = made.places["a"].client

        async def ask(state: MigrationState) -> None:
            data = encode_device_state(state)
            await client.feature(Feature.MIG_DEVICE_STATE, FeatureOperation.SET, data)

        async with servers["a"].control() as a:
            await ask(MigrationState.PRE_COPY)
            with pytest.raises(VarlinkError, match=r"Busy.*PRE_COPY"):
                await a.quiesce("vm")
            await a.release("vm")  # nothing was begun here
            (device,) = await a.devices()
            assert device.migration is not None
            assert (device.migration.state, device.migration.holder) == ("PRE_COPY", "client")
            await ask(MigrationState.RUNNING)
            await a.quiesce("vm")
            with pytest.raises(RemoteError, match="busy"):
                await ask(MigrationState.STOP_COPY)
            with pytest.raises(RemoteError, match="busy"):
                await client.migration_read(10)
            await a.resume("vm")
            made.traffic.given_up()
            await ask(MigrationState.PRE_COPY)
            await ask(MigrationState.RUNNING)

            await made.places["a"].start_logging()
            with pytest.raises(VarlinkError, match="Busy"):
                await a.start_dirty_log("vm")
            with pytest.raises(VarlinkError, match="Busy"):
                await a.report_dirty_log("vm")
            await made.places["a"].stop_logging()
            await a.start_dirty_log("vm")
            for request in (made.places["a"].start_logging, made.places["a"].stop_logging):
                with pytest.raises(RemoteError, match="busy"):
                    await request()
            await a.stop_dirty_log("vm")
        await made.traffic.goes_on("a")
        await made.finish()


async def test_a_device_that_is_reset_in_between_is_saved_anew() -> None:
    """By its client, as a guest does that reboots: what the target has of it by then is not so."""
    async with controlled_rig() as (made, servers):
        await made.start()
        async with servers["a"].control() as a, servers["b"].control() as b:
            await b.set_migration_state("vm", "RESUMING")
            await a.set_migration_state("vm", "PRE_COPY")
            await b.write_image("vm", await a.read_image("vm"))
            await made.places["a"].client.reset()
            await a.set_migration_state("vm", "STOP_COPY")
            await b.write_image("vm", await a.read_image("vm"))
            await b.resume("vm")
        assert servers["a"].member.function.common.state.status == 0
        assert servers["b"].member.function.common.state.status == 0
        assert await made.guest.pci.status() == 0

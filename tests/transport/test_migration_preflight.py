"""Migrations that are looked at beforehand: what is asked for it, what is refused by name, and how
things stand after any failure."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests.transport.migration_pair import (
    MAC_A,
    MAC_B,
    RUNNING,
    check_how_things_stand,
    check_refused,
    pair,
)
from vfio_user_virtio.errors import ClientError, HostError, RemoteError
from vfio_user_virtio.migration.preflight import Preflight
from vfio_user_virtio.migration.states import EVERYTHING, WITHOUT_PRE_COPY
from vfio_user_virtio.protocol.migration import MigrationState
from vfio_user_virtio.virtio.common_config import QueueState

if TYPE_CHECKING:
    from vfio_user_virtio.device import IrqInfo
    from vfio_user_virtio.protocol.migration import MigrationFlags

OPTIONS: Final = [
    "source MIGRATION",
    "source MIG_DEVICE_STATE",
    "target MIGRATION",
    "target MIG_DEVICE_STATE",
]
LOOK: Final = ["target STOP_COPY", "target read", "target RUNNING"]
LOOK_AT_SOURCE: Final = ["source PRE_COPY", "source read", "source RUNNING"]


async def test_what_is_asked_beforehand() -> None:
    async with pair() as both:
        await both.migration(preflight=Preflight()).run()
        assert both.requests[:9] == [*OPTIONS, *LOOK, "target RESUMING", "source PRE_COPY"]
        assert both.states == [MigrationState.STOP, RUNNING]
        assert both.members[1].state.filter.mac == MAC_A
        assert both.objects == 0


async def test_without_pre_copy_the_source_is_looked_at_too() -> None:
    async with pair() as both:
        await both.migration(preflight=Preflight(), precopy=False).run()
        assert both.requests[4:12] == [
            *LOOK,
            *LOOK_AT_SOURCE,
            "target RESUMING",
            "source RUNNING_P2P",
        ]
        assert both.states == [MigrationState.STOP, RUNNING]
        assert both.objects == 0


async def test_with_pre_copy_the_source_runs_on() -> None:
    async with pair(target_pairs=1) as both:
        migration = both.migration(preflight=Preflight())
        with pytest.raises(HostError) as caught:
            await migration.run()
        await check_refused(both, migration)
        assert "target write" not in both.requests
    assert caught.value.exit_code == os.EX_CONFIG
    said = str(caught.value)
    assert "DEV_FEATURES" in said
    assert "this device does not offer MQ" in said
    assert "num_queues" in said
    assert "it is 5, this device has 3 queues" in said


async def test_without_it_in_the_migration_no_device_is_touched() -> None:
    async with pair(target=WITHOUT_PRE_COPY, target_pairs=1) as both:
        both.members[1].function.common.state.queue_select = 2
        migration = both.migration(preflight=Preflight())
        with pytest.raises(HostError, match="does not offer MQ"):
            await migration.run()
        await check_refused(both, migration)
        assert both.requests == [*OPTIONS, *LOOK, *LOOK_AT_SOURCE]
        assert both.members[1].function.common.state.queue_select == 2, "it was not reset"


async def test_a_source_without_pre_copy_is_resumed() -> None:
    """Its image cannot be had before it is stopped."""
    async with pair(source=WITHOUT_PRE_COPY, target_pairs=1) as both:
        migration = both.migration(preflight=Preflight())
        with pytest.raises(HostError, match="does not offer MQ"):
            await migration.run()
        assert "target write" not in both.requests
        assert both.requests[-3:] == ["source read", "target reset", "source RUNNING"]
        assert both.states == [RUNNING, RUNNING]
        assert not both.members[0].mode.stopped
        assert both.members[1].state.filter.mac == MAC_B
        assert both.objects == 0


async def test_the_state_of_a_driver_is_looked_at_as_well() -> None:
    """What changes while the source runs comes with the last image, and is seen then."""
    async with pair() as both:
        queue = both.members[0].function.common.state.queues[1]

        def change() -> None:
            if both.requests[-1] == "source PRE_COPY_P2P":
                both.members[0].function.common.state.queues[1] = QueueState(1024)

        both.source.meddle = change
        migration = both.migration(preflight=Preflight())
        with pytest.raises(HostError, match=r"VQ_CFG queue 1 .*1024; here it is a power of two"):
            await migration.run()
        both.members[0].function.common.state.queues[1] = queue
        assert both.requests.count("target write") == 1
        await check_how_things_stand(both, migration, committed=False)


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EIO])
async def test_targets_that_do_not_tell_their_vectors(error: int) -> None:
    async with pair() as both:

        def refuse(index: int) -> IrqInfo:
            raise ClientError(error, "no")

        both.target.irq_info = refuse  # type: ignore[attr-defined]  # instead of the device's
        migration = both.migration(preflight=Preflight())
        if error == errno.EINVAL:
            await migration.run()
            assert both.states == [MigrationState.STOP, RUNNING]
        else:
            with pytest.raises(RemoteError, match="the target refuses DEVICE_GET_IRQ_INFO"):
                await migration.run()
            await check_how_things_stand(both, migration, committed=False)


# --- failures -------------------------------------------------------------------------------------

CASES: Final = [
    pytest.param(options, number, id=f"{name}-{number}")
    for options, name in ((EVERYTHING, "pre-copy"), (WITHOUT_PRE_COPY, "stop-copy"))
    for number in range(19)
]
"""Each request of a migration, with PRE_COPY and without."""


@pytest.mark.parametrize(("target", "number"), CASES)
async def test_any_request_may_be_refused(target: MigrationFlags, number: int) -> None:
    async with pair(target=target) as both:

        def refuse() -> None:
            if len(both.requests) == number + 1:
                raise ClientError(errno.EIO, "no")

        both.source.meddle = both.target.meddle = refuse
        migration = both.migration(preflight=Preflight())
        with pytest.raises(RemoteError) as caught:
            await migration.run()
        side, what = both.requests[number].split()
        assert f"the {side} refuses" in str(caught.value)
        committed = (side, what) == ("source", "STOP")
        await check_how_things_stand(both, migration, committed=committed)


@pytest.mark.parametrize(("target", "number"), CASES)
async def test_it_may_be_cancelled_at_any_request(target: MigrationFlags, number: int) -> None:
    async with pair(target=target) as both:
        with trio.CancelScope() as scope:

            def cancel() -> None:
                if len(both.requests) == number + 1:
                    scope.cancel()

            both.source.meddle = both.target.meddle = cancel
            migration = both.migration(preflight=Preflight())
            await migration.run()
        if migration.target_runs:
            assert both.states == [MigrationState.STOP, RUNNING]
            assert both.requests[number] in ("target RUNNING", "source STOP")
        else:
            await check_how_things_stand(both, migration, committed=False)

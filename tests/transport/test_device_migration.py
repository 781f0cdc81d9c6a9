"""Whole migrations between two members: what moves, and how things stand after any failure."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests.transport.migration_pair import (
    MAC_A,
    MAC_B,
    RUNNING,
    SET,
    check_how_things_stand,
    check_refused,
    pair,
)
from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.backends.software.owner import Owner
from vfio_user_virtio.errors import ClientError, ConnectionLost, HostError, RemoteError
from vfio_user_virtio.migration.states import (
    EVERYTHING,
    STOP_AND_COPY,
    VFIO_USER,
    WITHOUT_PRE_COPY,
)
from vfio_user_virtio.migration.stream_facts import final_state, read_stream_untrusted
from vfio_user_virtio.protocol.feature import Feature
from vfio_user_virtio.protocol.migration import MigrationFlags, MigrationState, encode_device_state
from vfio_user_virtio.testing.loopback import served
from vfio_user_virtio.transport.device_migration import ROUND_SECONDS, Migration

if TYPE_CHECKING:
    from vfio_user_virtio.device import FeatureOperation


async def test_what_moves_and_in_which_order() -> None:
    pieces: list[bytes] = []
    async with pair() as both:
        migration = both.migration(on_data=pieces.append)
        await migration.run()
        assert both.states == [MigrationState.STOP, RUNNING]

        assert both.members[1].state.filter.mac == MAC_A
        common = both.members[1].function.common.state
        assert (common.queue_select, common.config_msix_vector) == (3, 1)
        assert both.objects == 0
    assert both.requests == [
        "source MIGRATION",
        "source MIG_DEVICE_STATE",
        "target MIGRATION",
        "target MIG_DEVICE_STATE",
        "target RESUMING",
        "source PRE_COPY",
        "source read",
        "target write",
        "source PRE_COPY_P2P",
        "source STOP_COPY",
        "source read",
        "target write",
        "target STOP",
        "target RUNNING_P2P",
        "target RUNNING",
        "source STOP",
    ]
    assert migration.target_runs
    assert migration.source_state is MigrationState.STOP
    kinds = [record.kind for record in read_stream_untrusted(pieces)]
    assert kinds == ["image", "image", "private"]
    assert migration.byte_count == len(b"".join(pieces))
    facts = {fact.name: fact.value for fact in final_state(read_stream_untrusted(pieces))}
    assert facts["PCI_COMMON_CFG queue_select"] == 3


async def test_when_a_guest_is_told() -> None:
    async with pair() as both:

        class Guest:
            async def pause(self) -> None:
                both.requests.append("pause")

            async def carry(self) -> None:
                both.requests.append("carry")

            async def carry_back(self) -> None:
                both.requests.append("carry back")

        await both.migration(guest=Guest()).run()
        told = [n for n, request in enumerate(both.requests) if request in ("pause", "carry")]
        assert [both.requests[n - 1 : n + 2] for n in told] == [
            ["target write", "pause", "source PRE_COPY_P2P"],
            ["target write", "carry", "target STOP"],
        ]
        assert "carry back" not in both.requests

        await both.clients[0].reset()
        await both.clients[1].reset()
        both.requests.clear()

        def refuse() -> None:
            if both.requests[-1] == "target RUNNING":
                raise ClientError(errno.EIO, "no")

        both.target.meddle = refuse
        with pytest.raises(RemoteError):
            await both.migration(guest=Guest()).run()
        assert both.requests[-4:] == [
            "target RUNNING",
            "target reset",
            "carry back",
            "source RUNNING",
        ]


async def test_phases(autojump_clock: trio.testing.MockClock) -> None:
    """Time is the test's: nothing takes any but what is made to wait."""
    seen: list[tuple[str, int]] = []

    def note(migration: Migration) -> None:
        seen.append((migration.phases[-1].name, migration.byte_count))

    pieces: list[bytes] = []
    async with pair() as both:
        migration = both.migration(
            on_progress=note, on_data=pieces.append, rounds=2, keep_source=True
        )
        await migration.run()
        assert both.states == [RUNNING, RUNNING]
    kinds = [record.kind for record in read_stream_untrusted(pieces)]
    assert kinds == ["image"] * 4 + ["private"], "the first, one for each round, the last"
    names = [phase.name for phase in migration.phases]
    assert names == ["prepare", "pre-copy", "stop", "copy", "resume", "finish"]
    seconds = {phase.name: phase.seconds for phase in migration.phases}
    assert seconds["pre-copy"] == pytest.approx(2 * ROUND_SECONDS)
    assert migration.seconds == pytest.approx(2 * ROUND_SECONDS)
    assert migration.downtime == pytest.approx(0)
    moved = {phase.name: phase.byte_count for phase in migration.phases if phase.byte_count}
    assert list(moved) == ["pre-copy", "copy"]
    assert seen[0] == ("prepare", 0)
    assert ("pre-copy", moved["pre-copy"]) in seen
    assert seen[-1] == ("finish", migration.byte_count)
    assert migration.source_state is RUNNING


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EIO])
async def test_rounds_of_a_server_without_precopy_info(
    error: int, autojump_clock: trio.testing.MockClock
) -> None:
    async with pair() as both:

        def refuse() -> None:
            if both.requests[-1] == "source info":
                raise ClientError(error, "no")

        both.source.meddle = refuse
        migration = both.migration(rounds=1)
        if error == errno.ENOSYS:
            await migration.run()
            assert both.requests.count("source read") == 3
        else:
            with pytest.raises(RemoteError, match="the source refuses MIG_GET_PRECOPY_INFO"):
                await migration.run()
            await check_how_things_stand(both, migration, committed=False)


@pytest.mark.parametrize("target", [STOP_AND_COPY, VFIO_USER, WITHOUT_PRE_COPY, EVERYTHING])
@pytest.mark.parametrize("source", [STOP_AND_COPY, VFIO_USER, WITHOUT_PRE_COPY, EVERYTHING])
async def test_states_that_both_have(source: MigrationFlags, target: MigrationFlags) -> None:
    async with pair(source, target) as both:
        migration = both.migration()
        await migration.run()
        assert both.states == [MigrationState.STOP, RUNNING]
        assert both.members[1].state.filter.mac == MAC_A
    asked = {request for request in both.requests if "P" in request}
    assert migration.precopy == (MigrationFlags.PRE_COPY in source & target)
    assert migration.precopy == ("source PRE_COPY" in asked)
    p2p = "source PRE_COPY_P2P" if migration.precopy else "source RUNNING_P2P"
    assert (p2p in asked) == (MigrationFlags.P2P in source)
    assert ("target RUNNING_P2P" in asked) == (MigrationFlags.P2P in target)
    assert (migration.source_options, migration.target_options) == (source, target)


async def test_without_pre_copy() -> None:
    async with pair() as both:
        migration = both.migration(precopy=False)
        await migration.run()
        assert "source PRE_COPY" not in both.requests
        assert "source RUNNING_P2P" in both.requests
        assert "pre-copy" not in [phase.name for phase in migration.phases]


async def test_more_than_one_message_of_data() -> None:
    stream = b"".join((b"x" * 2_000_000, b"y"))
    written = bytearray()

    async with pair() as both:
        left = memoryview(stream)

        async def read(count: int) -> bytes:
            nonlocal left
            piece, left = bytes(left[:count]), left[count:]
            return piece

        async def write(data: bytes | memoryview) -> None:
            written.extend(data)
            raise_at_the_end()

        def raise_at_the_end() -> None:
            if len(written) == len(stream):
                raise ClientError(errno.EINVAL, "enough")

        both.source.migration_read = read  # type: ignore[method-assign]  # a longer stream
        both.target.migration_write = write  # type: ignore[method-assign]  # which none takes
        with pytest.raises(RemoteError, match="MIG_DATA_WRITE of 951425 bytes"):
            await both.migration().run()
        assert both.states == [RUNNING, RUNNING]
    assert written == stream


# --- failures -----------------------------------------------------------------------------------

REQUESTS: Final = 16
"""Requests of a whole migration."""
COMMITTED: Final = 15
"""From this one on the target runs."""


@pytest.mark.parametrize("number", range(REQUESTS))
async def test_any_request_may_be_refused(number: int) -> None:
    async with pair() as both:

        def refuse() -> None:
            if len(both.requests) == number + 1:
                raise ClientError(errno.EIO, "no")

        both.source.meddle = both.target.meddle = refuse
        migration = both.migration()
        with pytest.raises(RemoteError) as caught:
            await migration.run()
        assert caught.value.errno == errno.EIO
        side, what = both.requests[number].split()
        assert f"the {side} refuses" in str(caught.value)
        if what in MigrationState.__members__:
            assert f"the change to {what}" in str(caught.value)
        await check_how_things_stand(both, migration, committed=number >= COMMITTED)


@pytest.mark.parametrize("number", range(REQUESTS))
async def test_it_may_be_cancelled_at_any_request(number: int) -> None:
    async with pair() as both:
        with trio.CancelScope() as scope:

            def cancel() -> None:
                if len(both.requests) == number + 1:
                    scope.cancel()

            both.source.meddle = both.target.meddle = cancel
            migration = both.migration()
            await migration.run()
        done = number >= COMMITTED - 1  # RUNNING on the target is not cancelled any more
        assert migration.target_runs == done
        if done:
            assert both.states == [MigrationState.STOP, RUNNING]
        else:
            await check_how_things_stand(both, migration, committed=False)


@pytest.mark.parametrize("phase", ["prepare", "pre-copy", "stop", "copy", "resume"])
async def test_what_looks_on_may_fail(phase: str) -> None:
    async with pair() as both:

        def fail(migration: Migration) -> None:
            if migration.phases[-1].name == phase:
                raise HostError("the disk is full")

        migration = both.migration(on_progress=fail)
        with pytest.raises(HostError, match="disk"):
            await migration.run()
        await check_how_things_stand(both, migration, committed=False)


@pytest.mark.parametrize("number", range(4, COMMITTED))
async def test_the_target_may_go(number: int) -> None:
    async with pair() as both:

        def go() -> None:
            if len(both.requests) == number + 1:
                both.clients[1].close()

        both.source.meddle = both.target.meddle = go
        migration = both.migration()
        with pytest.raises(ConnectionLost, match="the target, at "):
            await migration.run()
        assert both.states[0] is RUNNING
        assert migration.source_state is RUNNING
        assert both.source.device.migration._owner.objects_in_use == 0


async def test_the_source_may_go() -> None:
    async with pair() as both:
        both.target.meddle = lambda: (
            both.clients[0].close() if both.requests[-1] == "target write" else None
        )
        migration = both.migration()
        with pytest.raises(ConnectionLost, match="the source, at "):
            await migration.run()
        assert migration.source_state is None
        assert both.states[1] is RUNNING
        assert both.members[1].state.filter.mac == MAC_B, "the target was reset"


@pytest.mark.parametrize(
    ("state", "stays"), [("RESUMING", RUNNING), ("RUNNING", MigrationState.STOP_COPY)]
)
async def test_a_target_that_does_not_answer(
    state: str, stays: MigrationState, autojump_clock: trio.testing.MockClock
) -> None:
    """Where it may be running all the same, the source stays stopped."""
    async with pair() as both:
        both.target.hangs_at = state
        migration = both.migration(answer_seconds=3.0)
        message = f"the target did not answer the change to {state} within 3 s"
        with pytest.raises(ConnectionLost, match=message):
            await migration.run()
        assert both.states[0] is stays
        assert migration.source_state is stays
        assert not migration.target_runs


async def test_a_target_that_does_not_fit() -> None:
    async with pair(target_pairs=1) as both:
        migration = both.migration()
        with pytest.raises(RemoteError, match=r"target refuses MIG_DATA_WRITE of .* its log"):
            await migration.run()
        await check_refused(both, migration)


async def test_devices_that_cannot_migrate() -> None:
    owner = Owner("o")
    member = owner.add_member(MemberConfig(mac=MAC_A))
    async with pair() as both, served(member) as client:
        with pytest.raises(HostError, match="the target does not offer migration"):
            await Migration(both.clients[0], client).run()
        with pytest.raises(HostError, match="the source does not offer migration"):
            await Migration(client, both.clients[0]).run()
        assert both.states == [RUNNING, RUNNING]

        async def no_stop_copy(index: int, operation: FeatureOperation, data: bytes) -> bytes:
            return bytes((4, 0, 0, 0, 0, 0, 0, 0))

        both.target.feature = no_stop_copy  # type: ignore[method-assign]  # an odd server
        with pytest.raises(HostError, match=r"target offers migration without STOP_COPY \(0x4\)"):
            await both.migration().run()


async def test_a_device_that_is_in_a_migration() -> None:
    async with pair() as both:
        stop = encode_device_state(MigrationState.STOP)
        await both.clients[1].feature(Feature.MIG_DEVICE_STATE, SET, stop)
        with pytest.raises(HostError, match="the target is in state STOP, not RUNNING"):
            await both.migration().run()
        assert both.states == [RUNNING, MigrationState.STOP], "which is not ours to end"

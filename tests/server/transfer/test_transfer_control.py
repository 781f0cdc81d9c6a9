"""A guest that uses its device all along: state and written pages by the control interfaces."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.control.control_rig import controlled_rig, set_up
from tests.server.transfer.transfer_rig import Wire, carry
from vfio_user_virtio.control import records
from vfio_user_virtio.control.records import Range
from vfio_user_virtio.errors import ConnectionLost, HostError
from vfio_user_virtio.limits import CONTROL_RANGES, PAGE_SIZE
from vfio_user_virtio.migration.transfer_frames import FRAME_HEADER, Kind, Pages, ZeroPages
from vfio_user_virtio_server.transfer.control_ends import (
    ControlSource,
    ControlTarget,
    batches,
    frames_untrusted,
    split_pages,
)

if TYPE_CHECKING:
    from tests.control.control_rig import ControlledServer
    from tests.migration.guest_move_rig import Rig
    from tests.server.transfer.transfer_rig import Outcome
    from vfio_user_virtio.control.client import ControlClient

SECONDS: Final = 10.0


class GuestSource(ControlSource):
    """Does beside it what an orchestrator does to the guest."""

    guest: Rig

    async def stop(self) -> None:
        made = self.guest
        here, there = made.guest.place, made.places[made.there]
        await made.guest.client.pause()  # stop, of QMP
        await super().stop()
        await set_up(made.guest.pci, here, there)


class GuestTarget(ControlTarget):
    """Looks at the guest's memory before the device may use it."""

    guest: Rig

    async def run(self) -> None:
        made = self.guest
        there = made.places[made.there]
        # from here on without waiting: the guest's own memory must not change meanwhile
        made.guest.ram.copy_to(there.memory)  # QEMU's own last pass: what the guest has written
        assert made.guest.ram.difference(there.memory) == [], "a page did not come"
        made.guest.ram.move_into(there.memory)
        await super().run()


class RefusingTarget(ControlTarget):
    """Until the end all is well."""

    async def run(self) -> None:
        raise HostError("not here")


async def move(
    made: Rig, a: ControlClient, b: ControlClient, wire: Wire, **options: object
) -> Outcome:
    there = made.places[made.there]
    made.guest.ram.copy_to(there.memory, range(made.guest.ram.size // PAGE_SIZE))
    source, target = GuestSource(a, "vm", SECONDS), GuestTarget(b, "vm", SECONDS)
    source.guest = target.guest = made
    return await carry(source, target, wire, **options)  # type: ignore[arg-type]  # passed on


async def states(servers: dict[str, ControlledServer]) -> list[tuple[str, str]]:
    found = []
    for name in "ab":
        async with servers[name].control() as control:
            migration = (await control.device("vm")).migration
            assert migration is not None
            found.append((migration.state, migration.holder))
    return found


@pytest.mark.parametrize("one_way", [False, True], ids=["answers", "one way"])
async def test_a_guest_under_traffic_moves_with_its_memory(*, one_way: bool) -> None:
    wire = Wire()
    async with controlled_rig() as (made, servers):
        await made.start()
        async with servers["a"].control() as orchestrator:
            await orchestrator.start_dirty_log("vm", keep=True)
            async with servers["a"].control() as a, servers["b"].control() as b:
                here, there = made.guest.place, made.places["b"]
                outcome = await move(made, a, b, wire, one_way=one_way)
            assert (outcome.send_failure, outcome.receive_failure) == (None, None)
            assert await states(servers) == [("STOP", "control"), ("RUNNING", "nobody")]
            assert outcome.sending.page_bytes == outcome.receiving.page_bytes > 0
            pages = sum(span.page_count for span in outcome.sending.spans)
            assert pages * PAGE_SIZE == outcome.sending.page_bytes
            made.guest.place = there
            made.guest.client.go_on(there.client)  # cont, of QMP
            await made.guest.pci.disarm(here.client)
            await orchestrator.stop_dirty_log("vm")
        await made.traffic.goes_on("b")
        await made.finish()


def frame_at(wire: Wire, kind: Kind) -> int:
    """Where the first frame of a kind begins on the way there."""
    for border in wire.borders("forward"):
        if FRAME_HEADER.unpack_from(wire.seen["forward"], border)[0] == kind:
            return border
    raise AssertionError(f"no {kind.name}")


@pytest.mark.parametrize("kind", [Kind.STATE, Kind.SYNC, Kind.END], ids=lambda kind: kind.name)
async def test_cut_the_guest_goes_on_where_it_was(kind: Kind) -> None:
    """The guest's own part of a move that fails is its orchestrator's; here, none was paused."""
    wire = Wire()
    async with controlled_rig() as (made, servers):
        await made.start()
        for cut in (False, True):
            async with servers["a"].control() as a, servers["b"].control() as b:
                if cut:
                    wire = Wire(cut={"forward": frame_at(wire, kind) + 9})
                source = ControlSource(a, "vm", SECONDS)
                target = ControlTarget(b, "vm", SECONDS)
                if cut:
                    outcome = await carry(source, target, wire)
                    assert isinstance(outcome.receive_failure, ConnectionLost)
                else:  # to see where frames are, and refused so late that all have been sent
                    outcome = await carry(source, RefusingTarget(b, "vm", SECONDS), wire)
                    assert str(outcome.send_failure) == "the receiver refuses: not here"
            made.traffic.given_up()
            assert await states(servers) == [("RUNNING", "nobody")] * 2
            await made.traffic.goes_on("a")
        await made.finish()
        assert made.host.announced == []


async def test_a_device_that_is_in_other_hands() -> None:
    async with controlled_rig() as (made, servers):
        await made.start()
        async with servers["a"].control() as other, servers["a"].control() as a:
            await other.quiesce("vm")
            with pytest.raises(HostError, match="vm is in state STOP, and control has its migr"):
                await ControlSource(a, "vm", SECONDS).prepare()
            await other.resume("vm")
            with pytest.raises(HostError, match=r"other: GetDevice: .*DeviceNotFound"):
                await ControlSource(a, "other", SECONDS).prepare()
        made.traffic.given_up()
        await made.finish()


async def test_zero_pages_are_written_as_zeroes() -> None:
    async with controlled_rig() as (made, servers):
        await made.start()
        memory = made.places["b"].memory
        async with servers["b"].control() as b:
            target = ControlTarget(b, "vm", SECONDS)
            address = memory.iova + memory.size - (4 << 20)
            memory.view(address, 4 << 20)[:] = b"\xff" * (4 << 20)
            await target.write_pages(ZeroPages(address + PAGE_SIZE, 3 << 20))
            await target.write_pages(Pages(address + (3 << 20) + PAGE_SIZE, b"\1" * PAGE_SIZE))
            await target.load()
            after = bytes(memory.view(address, 4 << 20))
            assert after == (
                b"\xff" * PAGE_SIZE
                + bytes(3 << 20)
                + b"\1" * PAGE_SIZE
                + b"\xff" * ((1 << 20) - 2 * PAGE_SIZE)
            )
            await target.write_pages(Pages(0xDEAD_0000, bytes(PAGE_SIZE)))
            with pytest.raises(HostError, match="WriteMemory of 4096 bytes from 0xdead0000 on"):
                await target.load()
        await made.finish()


@given(st.lists(st.integers(1, 3000), max_size=20))
def test_ranges_are_read_in_batches(pages: list[int]) -> None:
    ranges, iova = [], 0
    for count in pages:
        ranges.append(Range(iova, count * PAGE_SIZE))
        iova += (count + 1) * PAGE_SIZE
    parts = list(batches(ranges))
    assert all(0 < sum(one.size for one in part) <= 4 << 20 for part in parts)
    flat = [one for part in parts for one in part]
    covered = [page for one in flat for page in range(one.iova, one.iova + one.size, PAGE_SIZE)]
    wanted = [page for one in ranges for page in range(one.iova, one.iova + one.size, PAGE_SIZE)]
    assert covered == wanted


def test_many_small_ranges_are_many_batches() -> None:
    parts = list(batches(Range(n * 2, 1) for n in range(2 * CONTROL_RANGES + 1)))
    assert [len(part) for part in parts] == [CONTROL_RANGES, CONTROL_RANGES, 1]


@given(st.lists(st.booleans(), max_size=12))
def test_pages_are_split_into_runs(zero: list[bool]) -> None:
    data = b"".join(bytes(PAGE_SIZE) if one else b"\1" * PAGE_SIZE for one in zero)
    frames = list(split_pages(0x10000, data))
    found, position = b"", 0x10000
    for frame in frames:
        assert frame.iova == position
        piece = bytes(frame.size) if isinstance(frame, ZeroPages) else bytes(frame.data)
        assert isinstance(frame, ZeroPages) == (not any(piece))
        found, position = found + piece, position + len(piece)
    assert found == data
    kinds = [type(frame) for frame in frames]
    assert all(one is not other for one, other in itertools.pairwise(kinds)), "as few"


@pytest.mark.parametrize("data", ["", "AAAA", "no base64", "=="])
def test_a_server_that_lies_about_memory(data: str) -> None:
    with pytest.raises(ConnectionLost, match="has not the bytes of its ranges"):
        list(frames_untrusted(records.Pages([Range(0, PAGE_SIZE)], data)))

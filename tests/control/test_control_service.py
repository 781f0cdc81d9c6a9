"""Each method of the control interface on a served member whose guest is under traffic."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import pytest
import trio

from tests.backends.member_rig import MAC_A
from tests.control.control_rig import controlled_rig, serve
from tests.migration.guest_move_network import Host
from tests.server.server_process import short_folder
from vfio_user_virtio import limits
from vfio_user_virtio.backends.software.config import MemberConfig
from vfio_user_virtio.control.device_control import Caller, DeviceControl
from vfio_user_virtio.control.interface import CONTROL, INTERFACES, SERVICE
from vfio_user_virtio.control.records import Range
from vfio_user_virtio.control.service import ControlService, bitmap_runs
from vfio_user_virtio.control.varlink import Call, Json, Object, VarlinkError
from vfio_user_virtio.limits import PAGE_SIZE
from vfio_user_virtio.testing.loopback import ungrouped_nursery
from vfio_user_virtio.transport.client import connect

if TYPE_CHECKING:
    from collections.abc import Awaitable


def page_numbers(ranges: list[Range]) -> set[int]:
    return {
        page
        for one in ranges
        for page in range(one.iova // PAGE_SIZE, (one.iova + one.size) // PAGE_SIZE)
    }


def shown(iova: int, size: int) -> dict[str, Json]:
    return {"iova": iova, "size": size}


async def refused(call: Awaitable[object], name: str) -> VarlinkError:
    with pytest.raises(VarlinkError) as caught:
        await call
    assert caught.value.name.rpartition(".")[2] == name, caught.value
    return caught.value


async def test_what_it_is() -> None:
    async with controlled_rig() as (_, servers), servers["a"].control() as control:
        info = await control.info()
        assert info["vendor"] == "vfio-user-virtio"
        assert info["interfaces"] == [*INTERFACES]
        for interface in INTERFACES.values():
            call = control._client.call(
                SERVICE, "GetInterfaceDescription", {"interface": interface.name}
            )
            assert (await call)["description"] == interface.text
        unknown = control._client.call(SERVICE, "GetInterfaceDescription", {"interface": "a.b"})
        assert (await refused(unknown, "InterfaceNotFound")).parameters == {"interface": "a.b"}


async def test_devices_and_their_sessions() -> None:
    async with controlled_rig() as (made, servers), servers["a"].control() as control:
        await made.start()
        (device,) = await control.devices()
        assert device == await control.device("vm") or device.session is not None
        assert (device.name, device.kind) == ("vm", "software")
        assert device.identity == MAC_A.hex(":")
        assert device.abilities == [
            "migration",
            "dirty_log",
            "dirty_pages",
            "memory",
            "replay",
            "announce",
        ]
        session = device.session
        assert session is not None
        assert session.version == "0.0"
        assert session.commands["DMA_MAP"] == 1
        assert session.bytes_received > 0
        assert session.process is not None
        assert device.memory is not None
        assert (device.memory.mapped, device.memory.remote) == (made.guest.ram.size, 0)
        error = await refused(control.device("other"), "DeviceNotFound")
        assert error.parameters == {"device": "other"}
        await made.finish()


async def test_without_a_client_there_is_no_session_and_no_memory() -> None:
    with short_folder() as folder, Host(folder) as host:
        async with ungrouped_nursery() as nursery:
            server = await serve(nursery, host, folder, "a", MemberConfig(mac=MAC_A))
            async with server.control() as control:
                device = await control.device("vm")
                assert (device.session, device.memory) == (None, None)
                await control.start_dirty_log("vm")
                await refused(control.mappings("vm"), "NoClient")
                await refused(control.read_memory("vm", 0, 1), "NoClient")
                await refused(control.report_dirty_log("vm"), "NoClient")
                await refused(control.replay("vm"), "Busy")
                async with connect(folder / "a.sock"):
                    while (await control.device("vm")).session is None:
                        await trio.lowlevel.checkpoint()
                    await control.set_migration_state("vm", "RESUMING")
                while (await control.device("vm")).session is not None:
                    await trio.lowlevel.checkpoint()
                device = await control.device("vm")
                assert device.migration is not None
                assert (device.migration.state, device.migration.holder) == ("RUNNING", "nobody")
                assert device.dirty_log == "nobody"
            nursery.cancel_scope.cancel()


async def test_counters() -> None:
    async with controlled_rig() as (made, servers), servers["a"].control() as control:
        await made.start()
        await made.finish()
        (found,) = await control.statistics("vm")
        assert [found] == await control.statistics()
        groups = {one.group: one.counts for one in found.counters}
        port = servers["a"].member._switch.statistics(servers["a"].member)
        assert groups["port"]["frames_out"] == port.frames_out > 0
        assert groups["uplink"]["frames_in"] >= port.frames_out
        assert groups["interrupts"]["signalled"] > 0
        assert set(groups["port_drops"]) >= {"runt", "no_room"}
        assert groups["device"]["driver_errors"] == 0


async def test_quiesce_and_resume() -> None:
    async with controlled_rig() as (made, servers), servers["a"].control() as control:
        await made.start()
        await control.quiesce("vm")
        await control.quiesce("vm")
        assert servers["a"].member.mode.stopped
        memory = made.guest.place.memory
        used = bytes(memory.view(memory.iova, memory.size))
        stopped = await control.device("vm")
        assert stopped.migration is not None
        assert (stopped.migration.state, stopped.migration.holder) == ("STOP", "control")
        await refused(control.replay("vm"), "Busy")
        assert not servers["a"].member.running
        assert len(used) == memory.size
        await control.resume("vm")
        made.traffic.given_up()
        await made.traffic.goes_on("a")
        await made.finish()
        assert made.host.announced == []


async def test_what_is_kept_outlasts_its_connection_and_anybody_may_end_it() -> None:
    async with controlled_rig() as (made, servers):
        server = servers["a"]
        await made.start()
        async with server.control() as one:
            await one.quiesce("vm", keep=True)
            await one.start_dirty_log("vm", keep=True)
        async with server.control() as two:
            device = await two.device("vm")
            assert device.migration is not None
            assert (device.migration.state, device.dirty_log) == ("STOP", "control")
            assert await two.image_size("vm") > 100
        async with server.control() as three:
            await three.release("vm")
            device = await three.device("vm")
            assert device.migration is not None
            assert (device.migration.state, device.dirty_log) == ("RUNNING", "nobody")
        made.traffic.given_up()
        await made.traffic.goes_on("a")
        await made.finish()


async def test_what_is_not_kept_is_its_connections_alone() -> None:
    async with controlled_rig() as (made, servers), servers["a"].control() as one:
        await made.start()
        await one.quiesce("vm")
        await one.start_dirty_log("vm")
        async with servers["a"].control() as two:
            for call in (two.resume("vm"), two.release("vm"), two.image_size("vm")):
                await refused(call, "Busy")
            for other in (two.stop_dirty_log("vm"), two.report_dirty_log("vm")):
                await refused(other, "Busy")
        await one.stop_dirty_log("vm")
        await one.resume("vm")
        made.traffic.given_up()
        await made.traffic.goes_on("a")
        await made.finish()


async def test_the_end_of_a_connection_ends_what_it_began() -> None:
    async with controlled_rig() as (made, servers):
        await made.start()
        async with servers["a"].control() as one:
            await one.quiesce("vm")
            await one.start_dirty_log("vm")
        made.traffic.given_up()
        await made.traffic.goes_on("a")
        await made.finish()
        assert not servers["a"].member.logging.active


async def test_a_reset_by_the_client_ends_it() -> None:
    async with controlled_rig() as (made, servers), servers["b"].control() as control:
        await control.set_migration_state("vm", "RESUMING")
        await made.places["b"].client.reset()
        device = await control.device("vm")
        assert device.migration is not None
        assert (device.migration.state, device.migration.holder) == ("RUNNING", "nobody")
        await refused(control.write_image("vm", b"x"), "Refused")


async def test_precopy_and_what_is_said_of_it() -> None:
    async with controlled_rig() as (made, servers), servers["a"].control() as control:
        await made.start()
        assert (await control.set_migration_state("vm", "PRE_COPY")).to_read > 100
        initial, dirty = await control.precopy_info("vm")
        assert initial > 100
        assert dirty == 0
        image = await control.read_image("vm")
        assert len(image) == initial
        device = await control.device("vm")
        assert device.migration is not None
        assert (device.migration.read, device.migration.to_read) == (len(image), 0)
        await refused(control.set_migration_state("vm", "ERROR"), "Refused")
        await control.resume("vm")
        await refused(control.precopy_info("vm"), "Refused")
        await refused(control.read_image("vm"), "Refused")
        await made.traffic.goes_on("a")
        await made.finish()


async def test_one_reply_for_a_caller_that_wants_one() -> None:
    async with controlled_rig() as (_, servers), servers["a"].control() as control:
        await control.set_migration_state("vm", "STOP_COPY")
        data = ""
        while piece := (await control._call("ReadImage", device="vm"))["data"]:
            assert isinstance(piece, str)
            data += piece
        assert base64.b64decode(data)
        await control.start_dirty_log("vm")
        for method in ("GetMappings", "ReportDirtyLog"):
            await refused(control._call(method, device="vm"), "ExpectedMore")
        small, large = (shown(0x4000_0000, size) for size in (16, 1 << 20))
        await control._call("ReadMemory", device="vm", ranges=[small])
        await refused(control._call("ReadMemory", device="vm", ranges=[large]), "ExpectedMore")


async def test_the_dirty_log_is_what_the_device_wrote() -> None:
    async with controlled_rig() as (made, servers), servers["a"].control() as control:
        await made.driver.start()
        memory = made.guest.place.memory
        await control.start_dirty_log("vm")
        assert (await control.device("vm")).dirty_log == "control"
        before = bytes(memory.view(memory.iova, memory.size))
        made.traffic.start(made.nursery)
        await made.traffic.goes_on("a")
        await made.finish()
        told = page_numbers(await control.report_dirty_log("vm"))
        after = bytes(memory.view(memory.iova, memory.size))
        first = memory.iova // PAGE_SIZE
        ring_pages = {
            first + page
            for page in range(memory.size // PAGE_SIZE)
            if before[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            != after[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        }
        of_device = {first + page for page in made.guest.ram._of_device}
        assert told >= ring_pages & of_device
        assert told & of_device
        assert told <= set(range(first, first + memory.size // PAGE_SIZE))
        one = shown(memory.iova, PAGE_SIZE)
        (reply,) = await control._more("ReportDirtyLog", device="vm", range=one)
        assert reply == {"ranges": []}
        await control.stop_dirty_log("vm")
        await refused(control.report_dirty_log("vm"), "Refused")
        await control.start_dirty_log("vm", [Range(0, PAGE_SIZE)])
        await refused(control.start_dirty_log("vm"), "Refused")
        assert await control.report_dirty_log("vm") == []


@pytest.mark.parametrize("remote", [False, True], ids=["mapped", "messages"])
async def test_guest_memory_out_and_in(remote: bool) -> None:
    async with controlled_rig(remote=remote) as (made, servers), servers["b"].control() as control:
        memory = made.places["b"].memory
        (mapping,) = await control.mappings("vm")
        assert (mapping.iova, mapping.size) == (memory.iova, memory.size)
        assert (mapping.read, mapping.write, mapping.file) == (True, True, not remote)
        size = limits.CONTROL_CHUNK + 5 * PAGE_SIZE + 7
        data = bytes(range(251)) * (size // 251 + 1)
        await control.write_memory("vm", memory.iova + 3, data[:size])
        assert memory.view(memory.iova + 3, size) == data[:size]
        assert await control.read_memory("vm", memory.iova + 3, size) == data[:size]

        wanted = [Range(memory.iova + n * 2 * PAGE_SIZE, PAGE_SIZE) for n in range(200)]
        got: list[Range] = []
        async with control.reading_memory("vm", wanted) as replies:
            async for pages in replies:
                content = base64.b64decode(pages.data)
                assert len(content) <= limits.CONTROL_CHUNK
                for one in pages.ranges:
                    assert content[: one.size] == memory.view(one.iova, one.size)
                    content = content[one.size :]
                assert content == b""
                got += pages.ranges
        assert got == wanted


async def test_memory_that_is_not_there_is_refused_by_address() -> None:
    async with controlled_rig() as (made, servers), servers["b"].control() as control:
        memory = made.places["b"].memory
        end = memory.iova + memory.size
        error = await refused(control.read_memory("vm", end - 8, 16), "Refused")
        assert f"{end:#x}" in str(error.parameters["why"])
        before = bytes(memory.view(end - 8, 8))
        await refused(control.write_memory("vm", end - 8, bytes(16)), "Refused")
        assert memory.view(end - 8, 8) == before


async def test_parameters_that_make_no_sense_are_named() -> None:
    async with controlled_rig() as (_, servers), servers["a"].control() as control:
        top = (1 << 63) - 1

        async def invalid(method: str, parameter: str, **parameters: Json) -> None:
            error = await refused(control._more(method, **parameters), "InvalidParameter")
            assert error.parameters == {"parameter": parameter}

        await invalid("GetDevice", "device")
        await invalid("GetDevice", "device", device=1)
        await invalid("GetDevice", "more", device="vm", more=True)
        await invalid("SetMigrationState", "state", device="vm", state="SLEEPING")
        await invalid("WriteImage", "data", device="vm", data="?")
        await invalid("ReadMemory", "ranges[0].size", device="vm", ranges=[{"iova": 1}])
        for iova, size in ((-1, 1), (0, 0), (0, -1)):
            one = shown(iova, size)
            await invalid("ReadMemory", "ranges", device="vm", ranges=[one])
            await invalid("StartDirtyLog", "ranges", device="vm", ranges=[one])
            await invalid("ReportDirtyLog", "range", device="vm", range=one)
        for one, data in ((shown(0, 1), "x"), (shown(-1, 1), "AA=="), (shown(0, 2), "AA==")):
            pages: dict[str, Json] = {"ranges": [one], "data": data}
            await invalid("WriteMemory", "pages", device="vm", pages=pages)
        far = control._more("ReadMemory", device="vm", ranges=[shown(top, top)])
        await refused(far, "Refused")
        unknown = control._client.call(CONTROL, "GetNothing", {})
        assert (await refused(unknown, "MethodNotFound")).parameters == {
            "method": f"{CONTROL.name}.GetNothing"
        }


async def test_replay_wakes_both_ends() -> None:
    async with controlled_rig() as (made, servers), servers["a"].control() as control:
        await made.start()
        member = servers["a"].member
        before = member.function.interrupts.statistics().signalled
        await control.replay("vm")
        assert member.function.interrupts.statistics().signalled >= before + 3
        await made.traffic.goes_on("a")
        await made.finish()


async def test_announce() -> None:
    async with controlled_rig() as (made, servers), servers["a"].control() as control:
        await made.start()
        await control.announce("vm")
        await made.host.news.until(lambda: made.host.announced == ["a"], "the announcement")
        await made.finish()


async def test_a_device_that_offers_nothing_says_what() -> None:
    async with controlled_rig() as (made, servers):
        member = servers["b"].member
        device = DeviceControl("bare", member, kind="software", identity="x")
        assert device.abilities == ["memory", "replay", "announce"]
        assert device.status().migration is None
        service = ControlService([device])

        async def emit(parameters: Object) -> None:
            raise AssertionError("nothing is emitted")

        for method, ability in (("Quiesce", "migration"), ("StartDirtyLog", "dirty_log")):
            call = Call(f"{CONTROL.name}.{method}", {"device": "bare"})
            error = await refused(service.answer_untrusted(call, Caller(), emit), "NotSupported")
            assert error.parameters["ability"] == ability
            assert error.parameters["why"]
        await service.caller_is_gone(Caller())
        assert made.here == "a"


@pytest.mark.parametrize(
    ("words", "runs"),
    [
        ((), []),
        ((0, 0), []),
        ((1,), [(0, 1)]),
        ((1 << 63, 1), [(63, 2)]),
        (((1 << 64) - 1, (1 << 64) - 1, 1), [(0, 129)]),
        ((0b1011, 0, 1 << 5), [(0, 2), (3, 1), (133, 1)]),
        (((1 << 64) - 1,), [(0, 64)]),
    ],
)
def test_runs_of_a_bitmap(words: tuple[int, ...], runs: list[tuple[int, int]]) -> None:
    assert list(bitmap_runs(b"".join(word.to_bytes(8, "little") for word in words))) == runs

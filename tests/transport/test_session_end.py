"""How a session ends, whoever ends it, and that it ends alone."""

from __future__ import annotations

import logging
import struct
from typing import TYPE_CHECKING

import pytest
import trio

from tests.transport.memory_device import MemoryDevice
from tests.transport.served import PATIENCE, RawClient, Served, client_of, message, served, version
from vfio_user_virtio.device import VfioRegion
from vfio_user_virtio.errors import ConnectionLost
from vfio_user_virtio.limits import RELEASE_SECONDS
from vfio_user_virtio.protocol.header import Command

if TYPE_CHECKING:
    from vfio_user_virtio.device import RemoteMemory

pytestmark = pytest.mark.usefixtures("engine")


def errors(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_device_failure_ends_its_session_and_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with (
        served(name="other") as other,
        client_of(other) as bystander,
        served(name="one") as one,
        client_of(one) as client,
    ):
        one.device.failure = ZeroDivisionError("a bug of the device")
        with pytest.raises(ConnectionLost):
            await client.region_read(VfioRegion.BAR0, 0x1234, 4)
        await one.over.wait()
        assert await bystander.region_read(VfioRegion.BAR0, 0, 4) == bytes(4)
        assert not other.over.is_set()
    (record,) = errors(caplog)
    assert record.getMessage() == "one: unexpected failure"
    assert "a bug of the device" in caplog.text
    assert "while answering REGION_READ (message 1, 16 bytes: 34120000 " in caplog.text


async def test_device_task_failure_ends_its_session(caplog: pytest.LogCaptureFixture) -> None:
    fail = trio.Event()

    async def serve(memory: RemoteMemory) -> None:
        del memory
        await fail.wait()
        raise ValueError("the device's own task failed")

    async with served(serve) as one, client_of(one) as client:
        await client.device_info()
        fail.set()
        await client.lost.wait()
        await one.over.wait()
    (record,) = errors(caplog)
    assert "in the device's own task (Device.serve)" in caplog.text
    assert record.levelno == logging.ERROR


async def test_failure_of_the_device_in_work_ends_its_session(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        raise ArithmeticError("no work today")

    async with served() as one, client_of(one) as client:
        await client.device_info()
        monkeypatch.setattr(one.device, "work", work)
        assert await client.region_read(VfioRegion.BAR0, 0, 1) == b"\0", "answers come first"
        await client.lost.wait()
    assert "in Device.work" in caplog.text
    assert len(errors(caplog)) == 1


async def test_device_that_has_no_task_of_its_own() -> None:
    async def serve(memory: RemoteMemory) -> None:
        del memory

    async with served(serve) as one, client_of(one) as client:
        await client.device_info()
        await client.device_info()


async def test_failure_while_releasing_is_logged_and_goes_no_further(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with served() as one:
        async with client_of(one) as client:
            await client.device_info()
            one.device.failure = OSError("cannot release")
        await one.over.wait()
    (record,) = errors(caplog)
    assert record.getMessage() == "test: unexpected failure"
    assert "while releasing the device (Device.release)" in caplog.text


async def test_release_that_hangs_is_given_up(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    async with served() as one:
        async with client_of(one) as client:
            await client.device_info()
            one.device.hold = trio.Event()
        started = trio.current_time()
        await one.over.wait()
        assert trio.current_time() - started == pytest.approx(RELEASE_SECONDS)
    (record,) = errors(caplog)
    assert record.getMessage() == "test: the device was not released within 1 s"


@pytest.mark.parametrize("negotiated", [False, True])
async def test_cancelled_session_releases_its_device_once(
    negotiated: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    device = MemoryDevice()
    one = Served(device, "test")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run)
        raw = RawClient(one)
        if negotiated:
            await raw.negotiate()
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert device.releases == 1
    assert device.serving == 0
    with pytest.raises(ConnectionLost):
        await raw.endpoint.send(message(Command.DEVICE_RESET))
    raw.endpoint.close()
    device.close()
    assert caplog.messages[-1] == "test: session over: it was stopped"


async def test_session_cancelled_inside_a_command() -> None:
    device = MemoryDevice()
    device.hold = trio.Event()
    one = Served(device, "test")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run)
        raw = RawClient(one)
        await raw.negotiate()
        await raw.say(message(Command.DEVICE_RESET))
        with trio.fail_after(PATIENCE):
            while device.calls != ["reset CLIENT"]:  # noqa: ASYNC110 - it may be a thread that calls
                await trio.sleep(0.001)
        device.hold.set()
        device.hold = None
        nursery.cancel_scope.cancel()
    assert device.releases == 1
    raw.endpoint.close()
    device.close()


async def test_client_that_leaves_before_version(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with served() as one:
        one.socket.close()
        await one.over.wait()
    assert caplog.messages[-1] == "test: session over: the client left before VERSION"


SCRIPT = (
    message(Command.VERSION, version()),
    message(Command.REGION_WRITE, struct.pack("<QII", 0, 0, 4) + b"data"),
)


@pytest.mark.parametrize("stop", range(sum(map(len, SCRIPT))))
async def test_client_hangs_up_after_any_byte(stop: int) -> None:
    async with served() as one:
        raw = RawClient(one)
        script = b"".join(SCRIPT)[:stop]
        await raw.say(script[: len(SCRIPT[0])])
        if stop > len(SCRIPT[0]):
            await raw.say(script[len(SCRIPT[0]) :])
        raw.endpoint.close()
        with trio.fail_after(PATIENCE):
            await one.over.wait()
        assert one.device.writes == []


async def test_byte_at_a_time_does_the_same_as_all_at_once() -> None:
    script = b"".join((*SCRIPT, message(Command.REGION_READ, struct.pack("<QII", 0, 0, 8))))
    outcomes = []
    for size in (1, 7, 16, len(script)):
        async with served() as one:
            raw = RawClient(one)
            for start in range(0, len(script), size):
                await raw.say(script[start : start + size])
                await trio.testing.wait_all_tasks_blocked()
            replies = [await raw.hear() for _ in range(3)]
            raw.endpoint.close()
        heard = [(reply.command, reply.flags, reply.payload) for reply in replies]
        outcomes.append((heard, one.device.writes))
    assert outcomes[0][0][2][2].endswith(b"data\0\0\0\0")
    assert all(outcome == outcomes[0] for outcome in outcomes)


async def test_statistics_of_a_session_that_is_over_remain() -> None:
    async with served() as one:
        assert one.session.statistics().version is None
        async with client_of(one) as client:
            await client.device_info()
        await one.over.wait()
        statistics = one.session.statistics()
    assert statistics.commands == {"VERSION": 1, "DEVICE_GET_INFO": 1}
    assert statistics.bytes_sent > 2 * 16

"""DMA_READ and DMA_WRITE: from the device's own task to the client's memory."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Final

import attrs
import pytest
import trio

from tests.transport.memory_device import MemoryDevice
from tests.transport.served import RawClient, Served, client_of, message, served, version
from vfio_user_virtio.device import RemoteMemory, VfioRegion
from vfio_user_virtio.errors import ConnectionLost, RemoteError
from vfio_user_virtio.limits import KIB, REMOTE_DMA_CHUNK, REMOTE_DMA_SECONDS
from vfio_user_virtio.protocol.header import ERROR, HEADER, REPLY, Command
from vfio_user_virtio.protocol.version import TwinSocketCapability
from vfio_user_virtio.transport.client import PROPOSAL

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vfio_user_virtio.protocol.framing import Frame
    from vfio_user_virtio.protocol.version import Capabilities

TWIN: Final = attrs.evolve(PROPOSAL, twin_socket=TwinSocketCapability(supported=True))


class Memory:
    """A client's memory, 1 MiB at 0, that writes down each access."""

    def __init__(self) -> None:
        self.data = bytearray(os.urandom(1024 * KIB))
        self.accesses: list[tuple[str, int, int]] = []

    def _check(self, address: int, count: int) -> None:
        if address + count > len(self.data):
            raise OSError(errno.ENODEV, "no memory there")

    def read(self, address: int, count: int) -> bytes:
        self._check(address, count)
        self.accesses.append(("read", address, count))
        return bytes(self.data[address : address + count])

    def write(self, address: int, data: bytes) -> None:
        self._check(address, len(data))
        self.accesses.append(("write", address, len(data)))
        self.data[address : address + len(data)] = data


class Task:
    """A device's own task, that does what a test gives it to do."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[
            "Callable[[RemoteMemory], Awaitable[None]]"
        ](0)
        self._done, self._hear_done = trio.open_memory_channel[None](0)

    async def serve(self, memory: RemoteMemory) -> None:
        async for job in self._receive:
            await job(memory)
            await self._done.send(None)

    async def do(self, job: Callable[[RemoteMemory], Awaitable[None]]) -> None:
        """Have `job` done, and wait for its end."""
        await self._send.send(job)
        await self._hear_done.receive()

    async def begin(self, job: Callable[[RemoteMemory], Awaitable[None]]) -> None:
        """Have `job` done, and do not wait."""
        await self._send.send(job)

    async def end(self) -> None:
        await self._hear_done.receive()


@pytest.mark.parametrize("proposal", [PROPOSAL, TWIN], ids=["one socket", "twin socket"])
@pytest.mark.parametrize("count", [0, 1, REMOTE_DMA_CHUNK, REMOTE_DMA_CHUNK + 1, 300 * KIB])
async def test_memory_is_read_and_written_in_pieces(proposal: Capabilities, count: int) -> None:
    task, memory = Task(), Memory()
    expected = bytes(memory.data[4096 : 4096 + count])
    new = os.urandom(count)
    seen = []

    async def job(remote: RemoteMemory) -> None:
        seen.append(await remote.dma_read(4096, count))
        await remote.dma_write(8192, new)

    async with (
        served(task.serve) as one,
        client_of(one, capabilities=proposal, memory=memory) as client,
    ):
        twin = client.version.capabilities.twin_socket
        assert (twin is not None and twin.supported) == (proposal is TWIN)
        await task.do(job)
        await client.device_info()
    assert seen == [expected]
    assert memory.data[8192 : 8192 + count] == new
    assert all(size <= REMOTE_DMA_CHUNK for _, _, size in memory.accesses)
    assert len(memory.accesses) == 2 * -(-count // REMOTE_DMA_CHUNK)


@pytest.mark.parametrize("proposal", [PROPOSAL, TWIN], ids=["one socket", "twin socket"])
async def test_dma_between_commands_of_the_client(proposal: Capabilities) -> None:
    task, memory = Task(), Memory()
    rounds = 200

    async def job(remote: RemoteMemory) -> None:
        for number in range(rounds):
            await remote.dma_write(number * 8, number.to_bytes(8, "little"))
            assert await remote.dma_read(number * 8, 8) == number.to_bytes(8, "little")

    async with (
        served(task.serve) as one,
        client_of(one, capabilities=proposal, memory=memory) as client,
    ):
        await task.begin(job)
        async with trio.open_nursery() as nursery:

            async def poke(base: int) -> None:
                for number in range(rounds):
                    data = number.to_bytes(4, "little")
                    await client.region_write(VfioRegion.BAR0, base, data)
                    assert await client.region_read(VfioRegion.BAR0, base, 4) == data

            for base in (0, 64, 128):
                nursery.start_soon(poke, base)
        await task.end()
    assert memory.data[: 8 * rounds] == b"".join(n.to_bytes(8, "little") for n in range(rounds))


async def test_client_refuses_and_the_device_is_told_why() -> None:
    task = Task()

    async def job(remote: RemoteMemory) -> None:
        with pytest.raises(RemoteError) as refused:
            await remote.dma_read(1 << 40, 4)
        assert refused.value.errno == errno.ENODEV
        with pytest.raises(RemoteError):
            await remote.dma_write(1 << 40, b"data")
        assert len(await remote.dma_read(0, 4)) == 4

    async with served(task.serve) as one, client_of(one, memory=Memory()):
        await task.do(job)


async def test_client_without_memory_refuses() -> None:
    task = Task()

    async def job(remote: RemoteMemory) -> None:
        with pytest.raises(RemoteError) as refused:
            await remote.dma_read(0, 4)
        assert refused.value.errno == errno.ENODEV

    async with served(task.serve) as one, client_of(one):
        await task.do(job)


async def test_pieces_are_no_larger_than_the_client_takes() -> None:
    task, memory = Task(), Memory()

    async def job(remote: RemoteMemory) -> None:
        await remote.dma_read(0, 1000)

    proposal = attrs.evolve(PROPOSAL, max_data_xfer_size=256)
    async with served(task.serve) as one, client_of(one, capabilities=proposal, memory=memory):
        await task.do(job)
    assert [count for _, _, count in memory.accesses] == [256, 256, 256, 232]


async def test_one_piece_is_in_flight_at_a_time() -> None:
    async def serve(remote: RemoteMemory) -> None:
        async with trio.open_nursery() as nursery:
            for address in (0x1000, 0x2000, 0x3000):
                nursery.start_soon(remote.dma_read, address, 8)

    async with served(serve) as one:
        raw = RawClient(one)
        await raw.negotiate()
        asked = set()
        for _ in range(3):
            await trio.testing.wait_all_tasks_blocked()
            request = await raw.hear()
            asked.add(struct.unpack("<QQ", request.payload))
            await raw.alive()
            await raw.say(reply_to(request, request.payload + bytes(8)))
        assert asked == {(0x1000, 8), (0x2000, 8), (0x3000, 8)}
        await trio.testing.wait_all_tasks_blocked()
        await raw.alive()
        raw.endpoint.close()


def reply_to(request: Frame, payload: bytes = b"", *, flags: int = REPLY, errno: int = 0) -> bytes:
    size = HEADER.size + len(payload)
    return HEADER.pack(request.message_id, request.command, size, flags, errno) + payload


async def test_device_that_would_wait_for_the_client_inside_a_command_is_stopped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The client would answer only when it has its reply: a stall until the time is up."""
    remote: list[RemoteMemory] = []

    async def serve(memory: RemoteMemory) -> None:
        remote.append(memory)
        await trio.sleep_forever()

    class Impatient(MemoryDevice):
        async def region_read(self, index: int, offset: int, count: int) -> bytes:
            return await remote[0].dma_read(offset, count)

    device = Impatient(serve)
    one = Served(device, "test")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run)
        async with client_of(one, memory=Memory()) as client:
            await client.device_info()
            with pytest.raises(ConnectionLost):
                await client.region_read(VfioRegion.BAR0, 0, 4)
    device.close()
    assert "DMA_READ inside a command of the client would wait for ever" in caplog.text


async def test_late_reply_harms_nobody(autojump_clock: trio.testing.MockClock) -> None:
    outcomes: list[str] = []

    async def serve(remote: RemoteMemory) -> None:
        for address in (0x1000, 0x2000):
            try:
                outcomes.append((await remote.dma_read(address, 4)).decode())
            except ConnectionLost as lost:
                outcomes.append(str(lost))

    async with served(serve) as one:
        raw = RawClient(one)
        await raw.negotiate()
        first = await raw.hear()
        second = await raw.hear()
        assert trio.current_time() >= REMOTE_DMA_SECONDS
        await raw.say(reply_to(first, first.payload + b"late"))
        await raw.alive()
        await raw.say(reply_to(second, second.payload + b"good"))
        await raw.alive()
        await trio.testing.wait_all_tasks_blocked()
        assert outcomes == ["no reply to DMA_READ within 10 s", "good"]
        raw.endpoint.close()


@pytest.mark.parametrize(
    ("message_id", "command"),
    [
        pytest.param(999, Command.DMA_READ, id="id that was never used"),
        pytest.param(0, Command.DMA_WRITE, id="another command"),
        pytest.param(0, Command.REGION_READ, id="command that is not ours"),
    ],
)
async def test_reply_that_answers_nothing_ends_the_session(message_id: int, command: int) -> None:
    async def serve(remote: RemoteMemory) -> None:
        await remote.dma_read(0, 4)

    async with served(serve) as one:
        raw = RawClient(one)
        await raw.negotiate()
        request = attrs.evolve(await raw.hear(), message_id=message_id, command=command)
        await raw.say(reply_to(request, request.payload + bytes(4)))
        await raw.cut_off()


@pytest.mark.parametrize(
    "payload",
    [b"", bytes(16), struct.pack("<QQ", 0, 3) + b"four", struct.pack("<QQ", 0, 5) + b"five!"],
)
async def test_reply_that_is_not_what_was_asked_for_is_not_believed(payload: bytes) -> None:
    async def serve(remote: RemoteMemory) -> None:
        await remote.dma_read(0, 4)

    async with served(serve) as one:
        raw = RawClient(one)
        await raw.negotiate()
        await raw.say(reply_to(await raw.hear(), payload))
        await raw.cut_off()


async def test_error_reply_without_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    outcomes: list[RemoteError] = []

    async def serve(remote: RemoteMemory) -> None:
        with pytest.raises(RemoteError) as refused:
            await remote.dma_write(0, b"data")
        outcomes.append(refused.value)

    async with served(serve) as one:
        raw = RawClient(one)
        await raw.negotiate()
        await raw.say(reply_to(await raw.hear(), flags=REPLY | ERROR))
        await raw.alive()
        await trio.testing.wait_all_tasks_blocked()
        raw.endpoint.close()
    assert [str(error) for error in outcomes] == ["DMA_WRITE was refused: no reason given"]


async def test_fds_with_a_reply_are_closed(autojump_clock: trio.testing.MockClock) -> None:
    async def serve(remote: RemoteMemory) -> None:
        await remote.dma_write(0, b"data")

    async with served(serve) as one:
        raw = RawClient(one)
        await raw.negotiate()
        request = await raw.hear()
        fd = os.eventfd(0)
        await raw.say(reply_to(request, request.payload[:16]), [fd] * 5)
        os.close(fd)
        await raw.alive()
        raw.endpoint.close()


async def test_device_that_keeps_its_memory_beyond_the_session_is_refused() -> None:
    kept: list[RemoteMemory] = []

    async def serve(remote: RemoteMemory) -> None:
        kept.append(remote)
        await trio.sleep_forever()

    async with served(serve) as one:
        async with client_of(one, memory=Memory()) as client:
            await client.device_info()
        await one.over.wait()
        with pytest.raises(ConnectionLost, match="the session is over"):
            await kept[0].dma_read(0, 4)


async def test_client_goes_while_a_dma_is_in_flight() -> None:
    async def serve(remote: RemoteMemory) -> None:
        await remote.dma_read(0, 4)

    async with served(serve) as one:
        raw = RawClient(one)
        await raw.negotiate()
        await raw.hear()
        raw.endpoint.close()
        await one.over.wait()


# --- the twin socket ------------------------------------------------------------------------------


async def twin_of(raw: RawClient) -> RawClient:
    """Negotiate a twin socket; a raw client of it."""
    document = {"capabilities": {"max_msg_fds": 8, "twin_socket": {"supported": True}}}
    await raw.say(message(Command.VERSION, version(document=document)))
    reply = await raw.hear()
    assert b'"twin_socket":{"supported":true,"fd_index":0}' in reply.payload
    (fd,) = reply.take_fds()
    return raw.with_socket(fd)


async def test_command_on_the_twin_socket_ends_the_session() -> None:
    async with served() as one:
        raw = RawClient(one)
        twin = await twin_of(raw)
        await twin.say(message(Command.DEVICE_RESET))
        await raw.cut_off()
        twin.endpoint.close()


async def test_reply_on_the_main_socket_when_there_is_a_twin_ends_the_session() -> None:
    async def serve(remote: RemoteMemory) -> None:
        await remote.dma_read(0, 4)

    async with served(serve) as one:
        raw = RawClient(one)
        twin = await twin_of(raw)
        request = await twin.hear()
        await raw.say(reply_to(request, request.payload + bytes(4)))
        await raw.cut_off()
        twin.endpoint.close()


async def test_hang_up_of_the_twin_socket_ends_the_session() -> None:
    async with served() as one:
        raw = RawClient(one)
        twin = await twin_of(raw)
        twin.endpoint.close()
        await raw.cut_off()


async def test_no_twin_socket_for_a_client_that_takes_no_fds() -> None:
    async with served() as one:
        raw = RawClient(one)
        document = {"capabilities": {"max_msg_fds": 0, "twin_socket": {"supported": True}}}
        await raw.say(message(Command.VERSION, version(document=document)))
        reply = await raw.hear()
        assert b'"twin_socket":{"supported":false}' in reply.payload
        assert reply.fds == []
        await raw.alive()
        raw.endpoint.close()

"""Malformed and malicious messages, one by one, on a session with a real socket.

One test for each kind of message that a hostile client can think of, numbered as in the table this
was written from; `RawClient.refused` and `served` count fds before and after.  Here: VERSION,
framing, fds, silence, floods and hang-ups; test_hostile_commands.py has the commands.
"""

from __future__ import annotations

import errno
import os
import resource
import struct
from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests.transport.payloads import access, dma_map, set_irqs
from tests.transport.served import (
    QEMU_CAPABILITIES,
    message,
    raw_client,
    version,
)
from vfio_user_virtio.device import VfioRegion
from vfio_user_virtio.limits import (
    HANDSHAKE_SECONDS,
    MAX_ANCILLARY_FDS,
    MAX_DATA_XFER_SIZE,
    MAX_MESSAGE_SIZE,
    PARTIAL_MESSAGE_SECONDS,
)
from vfio_user_virtio.protocol.header import ERROR, HEADER_SIZE, NO_REPLY, REPLY, Command
from vfio_user_virtio.protocol.version import Version, decode_version_reply_untrusted

if TYPE_CHECKING:
    from tests.transport.served import RawClient

pytestmark = pytest.mark.usefixtures("engine")

U32_MAX: Final = (1 << 32) - 1
U64_MAX: Final = (1 << 64) - 1


async def cut_off_with(client: RawClient, code: int) -> None:
    """The client is told why in an error reply, then cut off."""
    reply = await client.hear()
    assert (reply.flags, reply.error, reply.payload) == (REPLY | ERROR, code, b"")
    await client.cut_off()


# --- VERSION --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [Command.DEVICE_GET_INFO, Command.REGION_READ, 99])
async def test_01_first_command_is_not_version(command: int) -> None:
    async with raw_client(negotiated=False) as client:
        await client.say(message(command, bytes(16)))
        await cut_off_with(client, errno.EINVAL)


async def test_01_first_message_is_a_reply() -> None:
    async with raw_client(negotiated=False) as client:
        await client.say(message(Command.VERSION, version(), flags=REPLY))
        await client.cut_off()


async def test_01_version_that_wants_no_reply() -> None:
    async with raw_client(negotiated=False) as client:
        await client.say(message(Command.VERSION, version(), flags=NO_REPLY))
        await client.cut_off()


async def test_02_version_major_1() -> None:
    async with raw_client(negotiated=False) as client:
        await client.say(message(Command.VERSION, version(major=1)))
        await cut_off_with(client, errno.EINVAL)


async def test_03_version_minor_99_is_answered_with_our_own() -> None:
    async with raw_client(negotiated=False) as client:
        await client.say(message(Command.VERSION, version(minor=99)))
        reply = await client.hear()
        assert decode_version_reply_untrusted(reply.payload).minor == 0
        await client.alive()


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(version()[:-1], id="without NUL"),
        pytest.param(version()[:20] + b"\0", id="cut"),
        pytest.param(b"\0\0\0\0[]\0", id="array"),
        pytest.param(b"\0\0\0\0\0", id="empty"),
        pytest.param(b"\0\0\0\0\xff\xfe\0", id="not UTF-8"),
        pytest.param(b"\0\0\0\0" + b"[" * 4000 + b"\0", id="deep"),
        pytest.param(b"\0\0\0\0" + b" " * 100_000 + b"{}\0", id="long"),
        pytest.param(b"\0\0\0", id="3 bytes"),
        pytest.param(b"", id="nothing"),
    ],
)
async def test_04_version_document_is_malformed(payload: bytes) -> None:
    async with raw_client(negotiated=False) as client:
        await client.say(message(Command.VERSION, payload))
        await cut_off_with(client, errno.EINVAL)


@pytest.mark.parametrize("value", [-1, 5000, "16", 1.5, None, True])
async def test_05_version_max_msg_fds_is_no_sensible_number(value: object) -> None:
    async with raw_client(negotiated=False) as client:
        document = {"capabilities": {**QEMU_CAPABILITIES["capabilities"], "max_msg_fds": value}}
        await client.say(message(Command.VERSION, version(document=document)))
        await cut_off_with(client, errno.EINVAL)


async def test_06_version_with_fds(eventfd: int) -> None:
    async with raw_client(negotiated=False) as client:
        await client.say(message(Command.VERSION, version()), [eventfd])
        await cut_off_with(client, errno.EINVAL)


async def test_07_second_version() -> None:
    async with raw_client() as client:
        assert await client.refused(Command.VERSION, version()) == errno.EINVAL
        assert isinstance(client.one.session.state.version, Version)
        await client.alive()


async def test_handshake_that_never_comes(autojump_clock: trio.testing.MockClock) -> None:
    async with raw_client(negotiated=False) as client:
        started = trio.current_time()
        await client.cut_off()
        assert trio.current_time() - started == pytest.approx(HANDSHAKE_SECONDS)


# --- framing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [REPLY, *range(2, 16)])
async def test_08_type_is_not_command(flags: int) -> None:
    async with raw_client() as client:
        await client.say(message(Command.DEVICE_GET_INFO, bytes(16), flags=flags))
        await client.cut_off()


async def test_08_complete_commands_before_the_bad_one_are_answered() -> None:
    async with raw_client() as client:
        good = message(Command.DEVICE_RESET)
        await client.say(good + good + message(Command.DEVICE_RESET, flags=5) + good)
        assert (await client.hear()).command == Command.DEVICE_RESET
        assert (await client.hear()).command == Command.DEVICE_RESET
        await client.cut_off()


@pytest.mark.parametrize("size", range(16))
async def test_09_size_is_smaller_than_a_header(size: int) -> None:
    async with raw_client() as client:
        await client.say(message(Command.DEVICE_RESET, size=size))
        await client.cut_off()


@pytest.mark.parametrize("size", [MAX_MESSAGE_SIZE + 1, 1 << 31, U32_MAX])
async def test_10_size_is_beyond_all_limits(size: int) -> None:
    async with raw_client() as client:
        await client.say(message(Command.REGION_WRITE, size=size))
        await client.cut_off()


@pytest.mark.parametrize("command", [0, 14, 20, 99, 0xFFFF])
async def test_11_unknown_command_is_drained(command: int) -> None:
    async with raw_client() as client:
        assert await client.refused(command, bytes(100_000)) == errno.ENOSYS
        await client.alive()
        assert client.one.session.statistics().commands["unknown"] == 1


@pytest.mark.parametrize("command", [Command.DMA_READ, Command.DMA_WRITE])
async def test_12_command_that_only_a_server_sends(command: int) -> None:
    async with raw_client() as client:
        assert await client.refused(command, struct.pack("<QQ", 0, 0)) == errno.EINVAL
        await client.alive()


@pytest.mark.parametrize("sent", [1, HEADER_SIZE - 1, HEADER_SIZE, HEADER_SIZE + 15])
async def test_13_message_that_never_ends(
    sent: int, autojump_clock: trio.testing.MockClock
) -> None:
    async with raw_client() as client:
        started = trio.current_time()
        await client.say(message(Command.REGION_READ, bytes(16))[:sent])
        await client.cut_off()
        assert trio.current_time() - started == pytest.approx(PARTIAL_MESSAGE_SECONDS)


async def test_13_a_byte_now_and_then_does_not_help(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with raw_client() as client:
        started = trio.current_time()
        for byte in message(Command.REGION_READ, bytes(16)):
            if client.one.over.is_set():
                break
            await client.say(bytes([byte]))
            await trio.sleep(1)
        await client.cut_off()
        assert trio.current_time() - started == pytest.approx(PARTIAL_MESSAGE_SECONDS, abs=1)


async def test_13_slow_but_whole_messages_are_taken(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with raw_client() as client:
        for _ in range(3):
            for byte in message(Command.DEVICE_RESET):
                await client.say(bytes([byte]))
                await trio.sleep(PARTIAL_MESSAGE_SECONDS / (HEADER_SIZE + 1))
            assert not (await client.hear()).is_error


# --- fds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [0, *Command])
async def test_14_as_many_fds_as_the_kernel_allows(command: int, eventfd: int) -> None:
    async with raw_client() as client:
        await client.refused(command, bytes(64), [eventfd] * MAX_ANCILLARY_FDS)
        await client.alive()


async def test_15_kernel_has_to_drop_fds(memory: int) -> None:
    async with raw_client() as client:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(memory)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 5, limits[1]))
        try:
            await client.say(message(Command.DMA_MAP, dma_map(0, 0x1000)), [memory] * 10)
            await client.cut_off()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# --- silence --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (Command.DEVICE_GET_INFO, struct.pack("<IIII", 16, 0, 0, 0)),
        (Command.DEVICE_GET_REGION_INFO, struct.pack("<IIIIQQ", 80, 0, 2, 0, 0, 0)),
        (Command.REGION_READ, access(0, 0, 4)),
        (Command.REGION_READ, access(0, 99, 4)),
        (Command.DEVICE_RESET, b""),
        (Command.VERSION, version()),
        (99, b""),
    ],
)
async def test_16_no_reply_is_silence_even_on_failure(command: int, payload: bytes) -> None:
    async with raw_client() as client:
        await client.say(message(command, payload, flags=NO_REPLY))
        await client.alive()


# --- floods and hang-ups --------------------------------------------------------------------------


async def test_44_client_that_sends_and_does_not_read_is_made_to_wait(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """It asks for replies without end; the session stops reading instead of keeping them."""
    async with raw_client() as client:
        request = message(Command.REGION_READ, access(0, 0, MAX_DATA_XFER_SIZE))
        with trio.move_on_after(100) as patience:
            while True:
                await client.say(request * 16)
        assert patience.cancelled_caught
        reads = client.one.device.calls.count("region_read")
        assert reads <= 2, "each reply is sent before the next command is done"
        client.endpoint.close()
        await client.one.over.wait()


async def test_44_flood_of_posted_writes_leaves_nothing_behind() -> None:
    async with raw_client() as client:
        request = message(Command.REGION_WRITE, access(0, 0, 4, b"data"), flags=NO_REPLY)
        for _ in range(100):
            await client.say(request * 100)
        await client.alive()
        assert len(client.one.device.writes) == 10_000


async def test_44_pipelined_reads_are_answered_in_order() -> None:
    async with raw_client() as client:
        client.one.device.memory[VfioRegion.BAR0][:1000] = os.urandom(1000)
        expected = bytes(client.one.device.memory[VfioRegion.BAR0][:1000])
        requests = [
            message(Command.REGION_READ, access(i, 0, 1), message_id=i) for i in range(1000)
        ]
        await client.say(b"".join(requests))
        replies = [await client.hear() for _ in range(1000)]
        assert [reply.message_id for reply in replies] == list(range(1000))
        assert b"".join(reply.payload[16:] for reply in replies) == expected


async def test_45_client_hangs_up_with_memory_and_interrupts_in_hand(
    memory: int, eventfd: int
) -> None:
    async with raw_client() as client:
        device = client.one.device
        await client.ask(Command.DMA_MAP, dma_map(0, 0x1000), [memory])
        await client.ask(Command.DEVICE_SET_IRQS, set_irqs(0x24, 2, 0, 1), [eventfd])
        await client.ask(Command.REGION_WRITE, access(0, 0, 4, b"kept"))
        client.endpoint.close()
        await client.one.over.wait()
        assert device.releases == 1
        assert device.guest.statistics().maps == 0
        assert device.memory[VfioRegion.BAR0][:4] == b"kept", "the device keeps its state"

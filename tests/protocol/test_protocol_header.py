from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.errors import ConnectionLost
from vfio_user_virtio.limits import MAX_MESSAGE_SIZE
from vfio_user_virtio.protocol.header import (
    COMMANDS_WITH_FDS,
    ERROR,
    HEADER_SIZE,
    NO_REPLY,
    REPLIES_WITH_FDS,
    REPLY,
    Command,
    Header,
    decode_header_untrusted,
    encode_command,
    encode_error_reply,
    encode_header,
    encode_reply,
)

U16 = st.integers(0, 0xFFFF)
U32 = st.integers(0, 0xFFFFFFFF)


def test_commands_are_those_of_the_specification_and_one_of_a_fork() -> None:
    assert sorted(Command) == [*range(1, 14), *range(15, 20)]


def test_only_these_commands_and_replies_carry_fds() -> None:
    assert {2, 8} == COMMANDS_WITH_FDS
    assert {1, 5, 6} == REPLIES_WITH_FDS


@given(U16, U16, st.integers(HEADER_SIZE, MAX_MESSAGE_SIZE), U32, U32)
def test_header_round_trip(
    message_id: int, command: int, size: int, flags: int, error: int
) -> None:
    header = Header(message_id, command, size, flags & ~0xE, error)
    assert decode_header_untrusted(encode_header(header)) == header
    assert decode_header_untrusted(b"???" + encode_header(header), 3) == header


@pytest.mark.parametrize("size", [0, 1, 15, MAX_MESSAGE_SIZE + 1, 0xFFFFFFFF])
def test_impossible_size_loses_the_connection(size: int) -> None:
    with pytest.raises(ConnectionLost, match=f"size {size} is outside 16…") as caught:
        decode_header_untrusted(encode_header(Header(1, 9, size)))
    assert caught.value.reply_errno == 0


@pytest.mark.parametrize("kind", range(2, 16))
def test_impossible_type_loses_the_connection(kind: int) -> None:
    with pytest.raises(ConnectionLost, match=f"type {kind} is neither"):
        decode_header_untrusted(encode_header(Header(1, 9, 16, kind)))


def test_size_limit_is_the_callers() -> None:
    message = encode_command(1, Command.REGION_READ, bytes(16))
    assert decode_header_untrusted(message, max_message_size=32).size == 32
    with pytest.raises(ConnectionLost, match="size 32 is outside 16…31"):
        decode_header_untrusted(message, max_message_size=31)


@pytest.mark.parametrize("length", [0, 15])
def test_short_header(length: int) -> None:
    with pytest.raises(ConnectionLost, match=f"{length} bytes are not a vfio-user header"):
        decode_header_untrusted(bytes(length))


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_command_and_its_replies(wrap: type[bytes | bytearray | memoryview]) -> None:
    command = encode_command(0xBEEF, Command.DMA_MAP, wrap(b"payload"), no_reply=True)
    header = decode_header_untrusted(command)
    assert header == Header(0xBEEF, Command.DMA_MAP, 23, NO_REPLY, 0)
    assert command[HEADER_SIZE:] == b"payload"
    assert decode_header_untrusted(encode_command(1, 13)).flags == 0

    reply = encode_reply(header, wrap(b"answer"))
    assert decode_header_untrusted(reply) == Header(0xBEEF, Command.DMA_MAP, 22, REPLY, 0)
    assert reply[HEADER_SIZE:] == b"answer"

    error = encode_error_reply(header, 17)
    assert decode_header_untrusted(error) == Header(0xBEEF, Command.DMA_MAP, 16, REPLY | ERROR, 17)
    assert len(error) == HEADER_SIZE

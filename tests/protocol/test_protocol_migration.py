from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.errors import ClientError, ConnectionLost
from vfio_user_virtio.limits import MAX_DATA_XFER_SIZE
from vfio_user_virtio.protocol.migration import (
    MigrationFlags,
    MigrationState,
    decode_data_size_untrusted,
    decode_device_state_reply_untrusted,
    decode_device_state_request_untrusted,
    decode_migration_flags_untrusted,
    decode_migration_read_reply_untrusted,
    decode_migration_read_request_untrusted,
    decode_migration_write_request_untrusted,
    encode_data_size,
    encode_device_state,
    encode_migration_data_head,
    encode_migration_flags,
    encode_migration_read_request,
)


def test_flags() -> None:
    flags = MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY
    assert encode_migration_flags(flags) == struct.pack("<Q", 5)
    assert decode_migration_flags_untrusted(encode_migration_flags(flags)) == flags
    with pytest.raises(ConnectionLost, match="the reply to GET MIGRATION"):
        decode_migration_flags_untrusted(bytes(7))


def test_data_size() -> None:
    assert decode_data_size_untrusted(encode_data_size(1 << 40)) == 1 << 40
    with pytest.raises(ConnectionLost, match="the reply to GET MIG_DATA_SIZE"):
        decode_data_size_untrusted(bytes(9))


@pytest.mark.parametrize("state", MigrationState)
def test_states(state: MigrationState) -> None:
    data = encode_device_state(state)
    assert data == struct.pack("<II", state, 0xFFFFFFFF)
    assert decode_device_state_reply_untrusted(data) is state
    if state is not MigrationState.ERROR:
        assert decode_device_state_request_untrusted(data) is state


@pytest.mark.parametrize("state", [0, 8, 0xFFFFFFFF])
def test_states_nobody_may_ask_for(state: int) -> None:
    with pytest.raises(ClientError, match=f"state {state}, not one of STOP \\(1\\), ") as caught:
        decode_device_state_request_untrusted(struct.pack("<II", state, 0))
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("length", [0, 4, 7, 9])
def test_state_of_wrong_length(length: int) -> None:
    with pytest.raises(ClientError, match=f"brings {length} bytes, not 8") as caught:
        decode_device_state_request_untrusted(bytes(length))
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(ConnectionLost, match="the reply to GET MIG_DEVICE_STATE"):
        decode_device_state_reply_untrusted(bytes(length))


def test_state_that_is_none() -> None:
    with pytest.raises(ConnectionLost, match="says 8, which is no state"):
        decode_device_state_reply_untrusted(struct.pack("<II", 8, 0))


@given(st.integers(0, MAX_DATA_XFER_SIZE))
def test_read_request_round_trip(size: int) -> None:
    payload = encode_migration_read_request(size)
    assert payload == struct.pack("<II", 8 + size, size)
    assert decode_migration_read_request_untrusted(payload) == size


def test_read_request_with_the_whole_buffer() -> None:
    payload = encode_migration_read_request(64) + bytes(64)
    assert decode_migration_read_request_untrusted(payload) == 64


@given(st.binary(max_size=40), st.integers(0, 40))
def test_read_reply_round_trip(data: bytes, more: int) -> None:
    payload = encode_migration_data_head(len(data)) + data
    assert payload[:8] == struct.pack("<II", 8 + len(data), len(data))
    assert decode_migration_read_reply_untrusted(payload, len(data) + more) == data
    assert decode_migration_read_reply_untrusted(payload + bytes(more), len(data) + more) == data


@given(st.binary(max_size=40))
def test_write_request_round_trip(data: bytes) -> None:
    payload = encode_migration_data_head(len(data)) + data
    assert decode_migration_write_request_untrusted(payload) == len(data)
    assert payload[8:] == data


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"", "payload of 0 bytes, 8 are needed"),
        (bytes(7), "payload of 7 bytes"),
        (struct.pack("<II", 109, 101), "of 101 bytes; max_data_xfer_size is 100"),
        (struct.pack("<II", 0, 0xFFFFFFFF), "of 4294967295 bytes; max"),
        (struct.pack("<II", 11, 4) + bytes(4), "argsz 11, at least 12"),
        (struct.pack("<II", 7, 0), "argsz 7, at least 8"),
    ],
)
def test_bad_requests(payload: bytes, says: str) -> None:
    for decode in (
        decode_migration_read_request_untrusted,
        decode_migration_write_request_untrusted,
    ):
        with pytest.raises(ClientError, match=says) as caught:
            decode(payload, 100)
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("brought", [3, 5])
def test_write_of_wrong_length(brought: int) -> None:
    with pytest.raises(ClientError, match=f"of 4 bytes brings {brought}") as caught:
        decode_migration_write_request_untrusted(struct.pack("<II", 12, 4) + bytes(brought))
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (bytes(7), "payload of 7 bytes"),
        (struct.pack("<II", 13, 5) + bytes(5), "of 4 bytes counts 5 and has 5"),
        (struct.pack("<II", 12, 4) + bytes(3), "of 4 bytes counts 4 and has 3"),
    ],
)
def test_bad_read_reply(payload: bytes, says: str) -> None:
    with pytest.raises(ConnectionLost, match=says):
        decode_migration_read_reply_untrusted(payload, 4)

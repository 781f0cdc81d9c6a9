from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.device import FeatureOperation
from vfio_user_virtio.errors import ClientError, ConnectionLost
from vfio_user_virtio.protocol.feature import (
    Feature,
    FeatureRequest,
    decode_feature_reply_untrusted,
    decode_feature_request_untrusted,
    encode_feature_reply,
    encode_feature_request,
)

GET, SET, PROBE = FeatureOperation.GET, FeatureOperation.SET, FeatureOperation.PROBE
LEGAL = [GET, SET, PROBE, PROBE | GET, PROBE | SET, PROBE | GET | SET]


@given(
    st.integers(0, 0xFFFF),
    st.sampled_from(LEGAL),
    st.binary(max_size=40),
    st.integers(8, 0xFFFFFFFF),
)
def test_request_round_trip(
    index: int, operation: FeatureOperation, data: bytes, argsz: int
) -> None:
    request = FeatureRequest(index, operation, data, argsz)
    assert decode_feature_request_untrusted(encode_feature_request(request)) == request


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"", "payload of 0 bytes, 8 are needed"),
        (bytes(7), "payload of 7 bytes"),
        (struct.pack("<II", 7, 1 | GET), "argsz 7, at least 8"),
        (struct.pack("<II", 8, 1), "flags 0x1;"),
        (struct.pack("<II", 8, 1 | GET | SET), "flags 0x30001;"),
        (struct.pack("<II", 8, 1 | GET | 1 << 19), "flags 0x90001;"),
        (struct.pack("<II", 8, 1 | 1 << 31), "flags 0x80000001;"),
    ],
)
def test_bad_request(payload: bytes, says: str) -> None:
    with pytest.raises(ClientError, match=says) as caught:
        decode_feature_request_untrusted(payload)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("operation", [one for one in LEGAL if one != GET])
def test_set_and_probe_are_repeated(operation: FeatureOperation) -> None:
    request = FeatureRequest(Feature.MIG_DEVICE_STATE, operation, b"12345678", 16)
    payload = encode_feature_reply(request, b"ignored")
    assert payload == encode_feature_request(request)
    assert decode_feature_reply_untrusted(payload, request) == request


def test_get_brings_data() -> None:
    request = FeatureRequest(Feature.MIGRATION, GET, b"", 16)
    payload = encode_feature_reply(request, b"12345678")
    assert payload == struct.pack("<II", 16, 1 | GET) + b"12345678"
    assert decode_feature_reply_untrusted(payload, request).data == b"12345678"


def test_get_without_room_says_how_much() -> None:
    request = FeatureRequest(Feature.MIGRATION, GET, b"", 15)
    payload = encode_feature_reply(request, b"12345678")
    reply = decode_feature_reply_untrusted(payload, request)
    assert (reply.argsz, reply.data) == (16, b"")


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (bytes(7), "payload of 7 bytes"),
        (struct.pack("<II", 8, 2 | GET), "flags 0x10002"),
        (struct.pack("<II", 8, 1 | SET), "flags 0x20001"),
        (struct.pack("<II", 0xFFFFFFFF, 1 | GET), "argsz 4294967295, at most"),
    ],
)
def test_bad_reply(payload: bytes, says: str) -> None:
    with pytest.raises(ConnectionLost, match=says):
        decode_feature_reply_untrusted(payload, FeatureRequest(1, GET, b"", 16))

from __future__ import annotations

import errno

import pytest

from vfio_user_virtio.device import DeviceFlags, DeviceInfo
from vfio_user_virtio.errors import ClientError, ConnectionLost
from vfio_user_virtio.protocol.device_info import (
    decode_device_info_reply_untrusted,
    decode_device_info_request_untrusted,
    encode_device_info_reply,
    encode_device_info_request,
)


def test_request() -> None:
    decode_device_info_request_untrusted(encode_device_info_request())


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"", "payload of 0 bytes, 16 are needed"),
        (encode_device_info_request()[:15], "payload of 15 bytes"),
        (b"\x0f" + bytes(15), "argsz 15, at least 16"),
    ],
)
def test_bad_request(payload: bytes, says: str) -> None:
    with pytest.raises(ClientError, match=says) as caught:
        decode_device_info_request_untrusted(payload)
    assert caught.value.errno == errno.EINVAL


def test_reply_round_trip() -> None:
    info = DeviceInfo(DeviceFlags.RESET | DeviceFlags.PCI, 9, 5)
    assert decode_device_info_reply_untrusted(encode_device_info_reply(info)) == info


def test_short_reply() -> None:
    with pytest.raises(ConnectionLost, match="reply to DEVICE_GET_INFO has a payload of 15"):
        decode_device_info_reply_untrusted(bytes(15))

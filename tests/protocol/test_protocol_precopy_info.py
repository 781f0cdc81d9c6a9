from __future__ import annotations

import errno

import pytest

from vfio_user_virtio.errors import ClientError, ConnectionLost
from vfio_user_virtio.protocol.precopy_info import (
    decode_precopy_info_reply_untrusted,
    decode_precopy_info_request_untrusted,
    encode_precopy_info_reply,
    encode_precopy_info_request,
)


def test_golden() -> None:
    assert encode_precopy_info_request() == bytes(24)
    assert encode_precopy_info_reply(0x1234, 1 << 40) == bytes.fromhex(
        "18000000 00000000 3412000000000000 0000000000010000"
    )


def test_there_and_back() -> None:
    decode_precopy_info_request_untrusted(encode_precopy_info_request())
    reply = encode_precopy_info_reply(1, 2)
    assert decode_precopy_info_reply_untrusted(reply) == (1, 2)


@pytest.mark.parametrize("length", [0, 8, 23])
def test_what_is_too_short_is_refused(length: int) -> None:
    with pytest.raises(ClientError) as caught:
        decode_precopy_info_request_untrusted(bytes(length))
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(ConnectionLost):
        decode_precopy_info_reply_untrusted(bytes(length))

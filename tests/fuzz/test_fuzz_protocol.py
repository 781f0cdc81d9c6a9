"""The fuzz target of the protocol, on hypothesis' bytes: it runs, and it can find something."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz import fuzz_protocol
from vfio_user_virtio.protocol.header import Command, Header, encode_header

commands = st.sampled_from([*Command, 0, 14, 99])
messages = st.builds(
    lambda command, flags, payload: (
        encode_header(Header(7, command, 16 + len(payload), flags)) + payload
    ),
    commands,
    st.sampled_from([0, 1, 16, 33]),
    st.binary(max_size=60),
)
plans = st.lists(st.binary(min_size=2, max_size=2), max_size=12).map(
    lambda pairs: bytes([len(pairs)]) + b"".join(pairs)
)


@given(st.binary(max_size=400))
@example(b"")
def test_any_bytes(data: bytes) -> None:
    fuzz_protocol.one_input(data)


@given(plans, st.lists(messages, max_size=5), st.binary(max_size=40))
def test_messages_cut_anyhow(plan: bytes, stream: list[bytes], tail: bytes) -> None:
    fuzz_protocol.one_input(plan + b"".join(stream) + tail)


@given(st.integers(0x80, 0xFF), st.binary(max_size=200))
def test_any_payload_for_every_decoder(mode: int, payload: bytes) -> None:
    fuzz_protocol.one_input(bytes([mode]) + payload)


@pytest.mark.parametrize("index", [*fuzz_protocol.FEATURE_DATA, 77])
def test_features_are_reached(index: int) -> None:
    payload = struct.pack("<II", 64, index | 1 << 17) + bytes(24)
    fuzz_protocol.one_input(b"\x80" + payload)


def test_it_finds_a_decoder_that_raises_something_else() -> None:
    with pytest.raises(struct.error):
        fuzz_protocol.decode_any(lambda payload, _: struct.unpack("<Q", payload), b"", [])


def test_it_finds_a_decoder_that_takes_fds() -> None:
    with pytest.raises(AssertionError, match="takes no fd"):
        fuzz_protocol.decode_any(lambda _, fds: fds.pop(), b"", [3])

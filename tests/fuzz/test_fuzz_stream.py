"""The fuzz target of migration streams, on hypothesis' bytes: it runs, and can find something."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz import fuzz_stream
from tests.migration.golden_streams import NAMES, golden
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.migration.private_record import PRIVATE_TAG
from vfio_user_virtio.migration.stream import Record, StreamDecoder

if TYPE_CHECKING:
    from collections.abc import Iterator

records = st.builds(
    lambda tag, flags, payload, error: (
        struct.pack("<QII", len(payload) + error, flags, tag) + payload
    ),
    st.sampled_from([0, PRIVATE_TAG, 1, 0xFFFF_FFFF]),
    st.integers(0, 3),
    st.binary(max_size=32) | st.binary(max_size=32).map(b"\1\0\0\0".__add__),
    st.sampled_from([0, 0, 0, 0, 1, 1 << 20, 1 << 63]),
)


@given(st.binary(max_size=200))
@example(b"")
def test_any_bytes(data: bytes) -> None:
    fuzz_stream.one_input(data)


@given(st.binary(max_size=12), st.lists(records, max_size=5), st.binary(max_size=17))
def test_likely_streams(cuts: bytes, stream: list[bytes], tail: bytes) -> None:
    fuzz_stream.one_input(bytes((len(cuts),)) + cuts + b"".join(stream) + tail)


@pytest.mark.parametrize("name", NAMES)
def test_golden_streams(name: str) -> None:
    stream = golden(name)
    fuzz_stream.one_input(b"\0" + stream)
    fuzz_stream.one_input(bytes((len(stream),)) + b"\1" * len(stream) + stream)


def test_it_finds_a_record_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    real = StreamDecoder.feed_untrusted

    def feed(self: StreamDecoder, data: bytes) -> Iterator[Record]:
        return iter(list(real(self, data))[1:])

    monkeypatch.setattr(StreamDecoder, "feed_untrusted", feed)
    with pytest.raises(AssertionError):
        fuzz_stream.one_input(b"\0" + golden("image"))


def test_it_finds_a_bad_stream_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def feed(self: StreamDecoder, data: bytes) -> Iterator[Record]:
        if data:
            raise ClientError(22, "bad")
        return iter(())

    monkeypatch.setattr(StreamDecoder, "feed_untrusted", feed)
    with pytest.raises(AssertionError, match="stays bad"):
        fuzz_stream.one_input(b"\0" + golden("image"))

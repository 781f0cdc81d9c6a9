"""The fuzz target of transfer streams, on hypothesis' bytes: it runs, and can find something."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz import fuzz_transfer
from tests.migration.golden_frames import TRANSFER
from vfio_user_virtio.errors import ConnectionLost
from vfio_user_virtio.migration import transfer_frames
from vfio_user_virtio.migration.transfer_stream import FrameReader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_user_virtio.migration.transfer_frames import Frame

HELLO: Final = struct.pack("<HHI16s", 1, 0, 0, TRANSFER)
DEVICE: Final = struct.pack("<QI", 7, 3) + b"vm1"
kinds = st.integers(1, 10) | st.just(11)
payloads = st.one_of(
    st.just(b""),
    st.binary(max_size=30),
    st.just(struct.pack("<QQQ", 1, 0, 0)),
    st.builds(lambda stage: struct.pack("<II", stage, 0), st.integers(0, 5)),
    st.just(struct.pack("<QQ", 4096, 8192)),
)
bodies = st.lists(st.tuples(kinds, payloads), max_size=8)


def written(frames: list[tuple[int, bytes]]) -> bytes:
    """In the short form that `fuzz_transfer.mended` makes frames of."""
    return b"".join(bytes((kind, len(payload))) + payload for kind, payload in frames)


@given(st.binary(max_size=200))
@example(b"")
def test_any_bytes(data: bytes) -> None:
    fuzz_transfer.one_input(data)


@given(st.integers(2, 3), st.binary(max_size=12), bodies)
@example(2, b"\5", [(3, b"x"), (6, b""), (7, struct.pack("<QQQ", 1, 0, 0)), (8, b"")])
@example(3, b"", [(10, struct.pack("<II", stage, 0)) for stage in (1, 2, 2, 3, 4)])
def test_likely_streams(flags: int, cuts: bytes, body: list[tuple[int, bytes]]) -> None:
    stream = written([(1, HELLO), (2, DEVICE), *body])
    fuzz_transfer.one_input(bytes((flags, len(cuts))) + cuts + stream)


def test_it_finds_a_frame_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    real = FrameReader.feed_untrusted

    def feed(self: FrameReader, data: bytes) -> Iterator[Frame]:
        return iter(list(real(self, data))[1:])

    monkeypatch.setattr(FrameReader, "feed_untrusted", feed)
    with pytest.raises(AssertionError):
        fuzz_transfer.one_input(b"\2\0" + written([(1, HELLO), (2, DEVICE)]))


def test_it_finds_a_bad_stream_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def feed(self: FrameReader, data: bytes) -> Iterator[Frame]:
        if data:
            raise ConnectionLost("bad")
        return iter(())

    monkeypatch.setattr(FrameReader, "feed_untrusted", feed)
    with pytest.raises(AssertionError, match="stays bad"):
        fuzz_transfer.one_input(b"\2\0" + written([(1, HELLO)]))


def test_it_finds_an_unhandled_decoding_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_frames, "_require", lambda *_: None)
    with pytest.raises(struct.error):
        fuzz_transfer.one_input(b"\2\0" + written([(1, HELLO), (2, DEVICE), (7, b"short")]))

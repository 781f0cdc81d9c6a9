"""The order of a transfer stream, its totals, its cuts."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.migration.golden_frames import ALL_FLAGS, TRANSFER, golden_frame
from vfio_user_virtio.errors import ConnectionLost
from vfio_user_virtio.migration.transfer_frames import (
    Abort,
    Ack,
    DeviceFacts,
    End,
    Frame,
    Hello,
    Options,
    Pages,
    Run,
    Stage,
    State,
    Sync,
    ZeroPages,
    encode_frame,
)
from vfio_user_virtio.migration.transfer_stream import (
    BACKWARD,
    FORWARD,
    MAGIC,
    FrameReader,
    FrameWriter,
)

FACTS: Final = DeviceFacts(ALL_FLAGS, 3, "vm1")
START: Final = (Hello(TRANSFER), FACTS)
ONE_WAY: Final = (Hello(TRANSFER, Options.ONE_WAY), FACTS)
CONTENT: Final[tuple[Frame, ...]] = (
    State(b"abc"),
    Sync(),
    State(b"de"),
    Pages(0x1000, b"\1" * 8192),
    ZeroPages(0x10000, 1 << 20),
)
TOTALS: Final = End(5, 8192, 1 << 20)
WHOLE: Final[tuple[Frame, ...]] = (*START, *CONTENT, TOTALS, Run())
STAGES: Final = (Stage.READY, Stage.TAKEN, Stage.TAKEN, Stage.LOADED, Stage.RUNNING)
ANSWER: Final[tuple[Frame, ...]] = (
    *START,
    *(Ack(stage, number) for number, stage in enumerate(STAGES)),
)


def written(*frames: Frame) -> bytes:
    return MAGIC + b"".join(encode_frame(frame, number) for number, frame in enumerate(frames))


def problem(data: bytes, *, backward: bool = False) -> str:
    """Why a stream is refused; empty if it is not."""
    reader = FrameReader(BACKWARD if backward else FORWARD)
    try:
        list(reader.feed_untrusted(data))
        reader.finish_untrusted()
    except ConnectionLost as error:
        return str(error)
    return ""


def test_the_writer_counts() -> None:
    writer = FrameWriter()
    data = b"".join(writer.write(frame) for frame in WHOLE[:-2])
    assert writer.end == TOTALS
    data += writer.write(writer.end) + writer.write(Run())
    assert data == written(*WHOLE)
    assert writer.sequence == len(WHOLE)


@given(st.lists(st.integers(1, 400), max_size=60))
def test_however_it_is_cut(lengths: list[int]) -> None:
    data, reader, frames = written(*WHOLE), FrameReader(FORWARD), list[Frame]()
    for length in lengths:
        frames += reader.feed_untrusted(data[:length])
        data = data[length:]
    frames += reader.feed_untrusted(data)
    assert frames == list(WHOLE)
    assert reader.hello == WHOLE[0]
    assert reader.over
    reader.finish_untrusted()


def test_the_way_back() -> None:
    reader = FrameReader(BACKWARD)
    assert list(reader.feed_untrusted(written(*ANSWER))) == list(ANSWER)
    with pytest.raises(ConnectionLost, match="ends after frame 7, before its end"):
        reader.finish_untrusted()


def test_one_way_ends_with_its_end() -> None:
    assert problem(written(*ONE_WAY, State(b"x"), End(1, 0, 0))) == ""
    assert "ends after frame 4" in problem(written(*START, State(b"x"), End(1, 0, 0)))
    assert "Sync came in a stream without a way back" in problem(written(*ONE_WAY, Sync()))
    assert "Run came in a stream without" in problem(written(*ONE_WAY, End(0, 0, 0), Run()))


def test_it_ends_nowhere_else() -> None:
    data = written(*WHOLE)
    for size in [*range(300), *range(300, len(data), 97), *range(len(data) - 100, len(data))]:
        assert "the transfer stream ends " in problem(data[:size])
    assert problem(data) == ""


def test_a_byte_that_is_wrong_is_found_wherever_it_is() -> None:
    data = written(*WHOLE)
    for position in [*range(300), *range(300, len(data), 97)]:
        broken = bytearray(data)
        broken[position] ^= 0x55
        assert problem(bytes(broken)), position


@pytest.mark.parametrize("gone", range(len(WHOLE)))
def test_a_frame_that_is_gone_is_found(gone: int) -> None:
    frames = [encode_frame(frame, number) for number, frame in enumerate(WHOLE)]
    del frames[gone]
    assert problem(MAGIC + b"".join(frames))


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ((FACTS,), "DeviceFacts came where Hello was due"),
        ((START[0], State(b"x")), "State came where DeviceFacts or Abort was due"),
        ((START[0], START[0]), "Hello came where DeviceFacts or Abort"),
        ((*START, Run()), "Run came where State or Pages or ZeroPages or Sync or End or Abort"),
        ((*START, Ack(Stage.READY, 0)), "Ack came where"),
        ((*START, End(0, 0, 0), State(b"x")), "State came where Run or Abort was due"),
        ((*START, Abort("no"), State(b"x")), "State came where nothing was due"),
        ((*WHOLE, Run()), "Run came where nothing was due"),
    ],
)
def test_order(frames: tuple[Frame, ...], expected: str) -> None:
    assert expected in problem(written(*frames))


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([Stage.TAKEN], "TAKEN was acknowledged where READY was due"),
        ([Stage.READY, Stage.READY], "READY was acknowledged where TAKEN or LOADED"),
        ([Stage.READY, Stage.RUNNING], "RUNNING was acknowledged where TAKEN or LOADED was due"),
        ([Stage.READY, Stage.LOADED, Stage.TAKEN], "TAKEN was acknowledged where RUNNING"),
        ([*STAGES, Stage.RUNNING], "RUNNING was acknowledged where nothing was due"),
    ],
)
def test_stages(stages: list[Stage], expected: str) -> None:
    acks = [Ack(stage, 0) for stage in stages]
    assert expected in problem(written(*START, *acks), backward=True)


@pytest.mark.parametrize("totals", [End(4, 8192, 1 << 20), End(5, 0, 1 << 20), End(5, 8192, 0)])
def test_totals(totals: End) -> None:
    message = problem(written(*START, *CONTENT, totals))
    assert f"its end tells of {totals.state_bytes} bytes of state" in message
    assert "but 5 bytes of state, 8192 of pages and 1048576 of zero pages came" in message


@pytest.mark.parametrize("text", [b"\n", b"Last login: today\n", b"\x93vuvmovX", bytes(8)])
def test_what_is_no_stream(text: bytes) -> None:
    assert "this is no transfer stream: it begins with" in problem(text)


def test_nothing_at_all() -> None:
    assert problem(b"") == "the transfer stream ends after frame 0, before its end"
    assert "ends inside frame 0, 3 bytes into its header" in problem(MAGIC[:3])


def test_it_stays_bad() -> None:
    reader = FrameReader(FORWARD)
    with pytest.raises(ConnectionLost) as first:
        list(reader.feed_untrusted(b"text"))
    with pytest.raises(ConnectionLost) as second:
        list(reader.feed_untrusted(written(*WHOLE)))
    with pytest.raises(ConnectionLost) as third:
        reader.finish_untrusted()
    assert str(first.value) == str(second.value) == str(third.value)


def test_frames_that_may_be_skipped() -> None:
    data = written(*WHOLE) + golden_frame("may_be_skipped")
    reader = FrameReader(FORWARD)
    assert list(reader.feed_untrusted(data)) == list(WHOLE)
    assert reader.sequence == len(WHOLE) + 1 == 10
    reader.finish_untrusted()

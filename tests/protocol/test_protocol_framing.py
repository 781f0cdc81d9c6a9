from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user_virtio.errors import ConnectionLost
from vfio_user_virtio.limits import MAX_ANCILLARY_FDS, MAX_MESSAGE_SIZE
from vfio_user_virtio.protocol.framing import Frame, FrameReader
from vfio_user_virtio.protocol.header import (
    ERROR,
    HEADER_SIZE,
    NO_REPLY,
    REPLY,
    Command,
    Header,
    encode_command,
    encode_error_reply,
    encode_header,
    encode_reply,
)


def flat(frames: list[Frame]) -> list[tuple[int, int, int, int, bytes, list[int]]]:
    return [(f.message_id, f.command, f.flags, f.error, f.payload, f.fds) for f in frames]


def message(number: int, size: int = 0) -> bytes:
    return encode_command(number, Command.REGION_WRITE, bytes([number & 0xFF]) * size)


def test_one_message() -> None:
    reader = FrameReader()
    assert not reader.partial
    (frame,) = reader.receive(encode_command(7, Command.REGION_READ, b"0123456789abcdef"), [])
    assert flat([frame]) == [(7, 9, 0, 0, b"0123456789abcdef", [])]
    assert type(frame.payload) is bytes
    assert not reader.partial


def test_what_is_missing_of_a_message() -> None:
    reader = FrameReader()
    whole = message(1, 100)
    assert reader.receive(whole[:10], []) == []
    assert reader.missing == 0, "the header is not there yet"
    assert reader.receive(whole[10:30], []) == []
    assert reader.missing == len(whole) - 30
    assert len(reader.receive(whole[30:], [])) == 1
    assert reader.missing == 0


def test_flags_of_a_frame() -> None:
    command = Header(3, Command.DEVICE_RESET, 16)
    stream = (
        encode_command(1, Command.DEVICE_RESET)
        + encode_command(2, Command.DEVICE_RESET, no_reply=True)
        + encode_reply(command)
        + encode_error_reply(command, 22)
    )
    plain, posted, reply, error = FrameReader().receive(stream, [])
    assert [f.is_reply for f in (plain, posted, reply, error)] == [False, False, True, True]
    assert [f.no_reply for f in (plain, posted, reply, error)] == [False, True, False, False]
    assert [f.is_error for f in (plain, posted, reply, error)] == [False, False, False, True]
    assert (posted.flags, error.flags, error.error) == (NO_REPLY, REPLY | ERROR, 22)


def test_reserved_flag_bits_are_let_pass() -> None:
    (frame,) = FrameReader().receive(encode_header(Header(1, 13, 16, 0xFFFFFFC0)), [])
    assert (frame.is_reply, frame.no_reply, frame.is_error) == (False, False, False)


def test_fds_are_claimed_once() -> None:
    (frame,) = FrameReader().receive(message(1), [5, 6])
    assert frame.unclaimed == [5, 6]
    assert frame.take_fds() == [5, 6]
    assert frame.unclaimed == []
    assert frame.take_fds() == []


def test_fds_belong_to_the_last_message_that_starts_in_the_read() -> None:
    """The trap: an unmap and two maps pipelined, one read, one fd, which is the last map's."""
    reader = FrameReader()
    frames = reader.receive(message(1, 24) + message(2, 32) + message(3, 32), [9])
    assert [f.fds for f in frames] == [[], [], [9]]


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 47])
def test_fds_belong_to_the_last_message_even_if_it_only_starts(cut: int) -> None:
    reader = FrameReader()
    stream = message(1, 24) + message(2, 32)
    first = reader.receive(stream[: 40 + cut], [9])
    assert [f.fds for f in first] == [[]]
    assert reader.partial
    second = reader.receive(stream[40 + cut :] + message(3, 8), [])
    assert [f.fds for f in second] == [[9], []]


@pytest.mark.parametrize("cut", [1, 16, 20])
def test_fds_belong_to_the_message_in_progress_if_none_starts(cut: int) -> None:
    reader = FrameReader()
    whole = message(1, 24)
    assert reader.receive(whole[:cut], []) == []
    assert reader.receive(whole[cut : cut + 3], [4]) == []
    (frame,) = reader.receive(whole[cut + 3 :], [5])
    assert frame.fds == [4, 5]
    assert reader.take_fds() == []


def test_fds_of_a_read_that_ends_one_message_and_starts_the_next() -> None:
    reader = FrameReader()
    stream = message(1, 24) + message(2, 24)
    reader.receive(stream[:20], [3])
    (first,) = reader.receive(stream[20:50], [4])
    assert first.fds == [3]
    (second,) = reader.receive(stream[50:], [])
    assert second.fds == [4]


def test_fds_without_data_wait_for_a_message() -> None:
    reader = FrameReader()
    assert reader.receive(b"", [3]) == []
    assert not reader.partial
    assert reader.take_fds() == [3]


def test_fds_of_an_unfinished_message_can_be_taken() -> None:
    reader = FrameReader()
    reader.receive(message(1, 24)[:17], [3, 4])
    assert reader.take_fds() == [3, 4]
    assert reader.take_fds() == []


def test_a_message_cannot_collect_fds_without_end() -> None:
    reader = FrameReader()
    whole = message(1, 24)
    reader.receive(whole[:1], list(range(MAX_ANCILLARY_FDS)))
    with pytest.raises(ConnectionLost, match="one message brought 254 file descriptors"):
        reader.receive(whole[1:2], [1000])
    assert len(reader.take_fds()) == MAX_ANCILLARY_FDS + 1


@pytest.mark.parametrize("cut", range(1, 40))
def test_partial_until_the_last_byte(cut: int) -> None:
    reader = FrameReader()
    whole = message(1, 24)
    assert reader.receive(whole[:cut], []) == []
    assert reader.partial
    assert len(reader.receive(whole[cut:], [])) == 1
    assert not reader.partial


BROKEN = [
    encode_header(Header(1, 9, 15)),
    encode_header(Header(1, 9, 0xFFFFFFFF)),
    encode_header(Header(1, 9, 16, 2)),
]


@pytest.mark.parametrize("bad", BROKEN)
@pytest.mark.parametrize("cut", [0, 1, 15])
def test_lost_framing_keeps_the_fds(bad: bytes, cut: int) -> None:
    reader = FrameReader()
    if cut:
        assert reader.receive(bad[:cut], [3]) == []
    with pytest.raises(ConnectionLost):
        reader.receive(bad[cut:], [4])
    assert reader.partial
    with pytest.raises(ConnectionLost):
        reader.receive(message(1), [5])
    assert reader.take_fds() == ([3, 4, 5] if cut else [4, 5])


@pytest.mark.parametrize("bad", BROKEN)
def test_frames_before_lost_framing_are_delivered(bad: bytes) -> None:
    reader = FrameReader()
    (frame,) = reader.receive(message(1, 4) + bad + message(2, 4), [4])
    assert (frame.message_id, frame.fds) == (1, [])
    assert isinstance(reader.broken, ConnectionLost)
    assert reader.partial
    assert reader.take_fds() == [4]
    with pytest.raises(ConnectionLost):
        reader.receive(b"", [])


def test_size_limit() -> None:
    reader = FrameReader(max_message_size=40)
    assert len(reader.receive(message(1, 24), [])) == 1
    with pytest.raises(ConnectionLost, match="size 41 is outside 16…40"):
        reader.receive(message(1, 25)[:HEADER_SIZE], [])


def test_largest_message_in_pieces_of_every_kind() -> None:
    size = MAX_MESSAGE_SIZE - HEADER_SIZE
    payload = bytes(itertools.islice(itertools.cycle(range(251)), size))
    whole = encode_command(1, Command.MIG_DATA_WRITE, payload)
    reader = FrameReader()
    sizes = itertools.cycle([1, 3, 100, 4095, 4096, 4097, 65536])
    frames: list[Frame] = []
    position = 0
    while position < len(whole):
        step = next(sizes)
        frames += reader.receive(whole[position : position + step], [])
        position += step
    assert [f.payload == payload for f in frames] == [True]


messages = st.lists(
    st.builds(
        lambda number, command, flags, error, payload: (
            encode_header(Header(number, command, HEADER_SIZE + len(payload), flags & ~0xE, error))
            + payload
        ),
        st.integers(0, 0xFFFF),
        st.integers(0, 0xFFFF),
        st.integers(0, 0xFF),
        st.integers(0, 0xFFFFFFFF),
        st.binary(max_size=80),
    ),
    max_size=6,
)


@given(messages, st.sampled_from([b"", *BROKEN]), st.lists(st.integers(0, 600)))
def test_whole_and_split_give_the_same(stream: list[bytes], bad: bytes, cuts: list[int]) -> None:
    data = b"".join(stream) + bad

    def collect(pieces: list[bytes]) -> tuple[list[object], bool]:
        reader = FrameReader()
        frames: list[Frame] = []
        for piece in pieces:
            try:
                frames += reader.receive(piece, [])
            except ConnectionLost:
                break
        return [*flat(frames)], reader.broken is not None

    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    whole = collect([data])
    assert len(whole[0]) == len(stream)
    assert whole[1] == bool(bad)
    assert collect([data[a:b] for a, b in itertools.pairwise(edges)]) == whole
    assert collect([data[i : i + 1] for i in range(len(data))]) == whole


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3)), max_size=8), st.data())
def test_every_message_gets_its_own_fds(plan: list[tuple[int, int]], draw: st.DataObject) -> None:
    """Reads as Linux makes them: fds come with a message's first byte, and end the read."""
    numbers = itertools.count(100)
    wanted = [[next(numbers) for _ in range(count)] for _, count in plan]
    reader = FrameReader()
    frames: list[Frame] = []
    pending, pending_fds = b"", list[int]()
    for number, (size, _) in enumerate(plan):
        rest = message(number, size)
        if pending_fds:
            frames += reader.receive(pending, pending_fds)
            pending, pending_fds = b"", []
        pending_fds = wanted[number]
        while rest:
            cut = draw.draw(st.integers(1, len(rest)))
            pending, rest = pending + rest[:cut], rest[cut:]
            if draw.draw(st.booleans()):
                frames += reader.receive(pending, pending_fds)
                pending, pending_fds = b"", []
    frames += reader.receive(pending, pending_fds)
    assert [f.fds for f in frames] == wanted
    assert reader.take_fds() == []

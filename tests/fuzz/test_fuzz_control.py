"""The fuzz target of control commands, on hypothesis' bytes: it runs, and it can find something."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz import fuzz_control
from vfio_user_virtio import limits
from vfio_user_virtio.virtio.net_control import ERR, Change, NetState

EVERYTHING = b"\xff" * 8

features = st.just(EVERYTHING) | st.binary(min_size=8, max_size=8)
commands = st.builds(
    lambda cls, command, data: struct.pack("<HBB", 2 + len(data), cls, command) + data,
    st.integers(0, 6),
    st.integers(0, 6),
    st.sampled_from([b"\0", b"\1", b"\4\0", b"\1\0\0\0" + b"\2" * 6 + bytes(4), b"\x80\0" * 4])
    | st.binary(max_size=24),
)


@given(st.binary(max_size=200))
@example(b"")
def test_any_bytes(data: bytes) -> None:
    fuzz_control.one_input(data)


@given(features, st.lists(commands, max_size=8), st.binary(max_size=4))
def test_likely_commands(word: bytes, sequence: list[bytes], tail: bytes) -> None:
    fuzz_control.one_input(word + b"".join(sequence) + tail)


def test_tables_that_are_too_long() -> None:
    entries = limits.MAX_MAC_TABLE + 1
    table = struct.pack("<I", entries) + b"".join(
        b"\2\0\0\0" + struct.pack(">H", n) for n in range(entries)
    )
    command = b"\1\0" + table + table
    fuzz_control.one_input(EVERYTHING + struct.pack("<H", len(command)) + command)


def test_it_finds_a_refusal_that_changes_something(monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(state: NetState, command: bytes) -> tuple[bytes, Change]:
        state.queue_pairs = 2
        return ERR, Change.NOTHING

    monkeypatch.setattr(fuzz_control, "execute_untrusted", execute)
    with pytest.raises(AssertionError, match="a refusal changes nothing"):
        fuzz_control.one_input(EVERYTHING + b"\0\0")


def test_it_finds_state_out_of_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(state: NetState, command: bytes) -> tuple[bytes, Change]:
        state.queue_pairs = 0
        return b"\0", Change.NOTHING

    monkeypatch.setattr(fuzz_control, "execute_untrusted", execute)
    with pytest.raises(AssertionError):
        fuzz_control.one_input(EVERYTHING + b"\0\0")

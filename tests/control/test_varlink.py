"""Varlink messages: what is encoded comes back, however it was cut; what is none ends it."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user_virtio.control.varlink import (
    Call,
    Reply,
    Splitter,
    VarlinkError,
    decode_call_untrusted,
    decode_reply_untrusted,
    encode_call,
    encode_reply,
)
from vfio_user_virtio.errors import ConnectionLost

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(), values, max_size=3)
calls = st.builds(
    Call,
    st.from_regex(r"[a-z]+\.[a-z]+\.[A-Z][a-z]*", fullmatch=True),
    objects,
    oneway=st.booleans(),
    more=st.booleans(),
    upgrade=st.booleans(),
)
replies = st.builds(Reply, objects, continues=st.booleans(), error=st.none() | st.text())


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


@given(st.lists(calls, max_size=4), st.lists(st.integers(0), max_size=4))
def test_calls_come_back_however_they_are_cut(made: list[Call], cuts: list[int]) -> None:
    data = b"".join(map(encode_call, made))
    splitter = Splitter()
    messages = [one for piece in pieces(data, cuts) for one in splitter.feed_untrusted(piece)]
    assert [decode_call_untrusted(message) for message in messages] == made
    assert not splitter.partial


@given(replies)
def test_replies_come_back(made: Reply) -> None:
    (message,) = Splitter().feed_untrusted(encode_reply(made))
    assert decode_reply_untrusted(message) == made


def test_a_call_as_varlink_has_it() -> None:
    """From the specification's examples."""
    call = decode_call_untrusted(b'{"method": "org.example.ftl.Jump", "more": true, "what": 1}')
    assert call == Call("org.example.ftl.Jump", more=True)
    assert (call.interface, call.name) == ("org.example.ftl", "Jump")
    assert encode_call(Call("a.b.C")) == b'{"method":"a.b.C"}\0'
    assert json.loads(encode_reply(Reply())[:-1]) == {"parameters": {}}


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"{",
        b"1",
        b"[]",
        b"null",
        b"\xff",
        b"{}",
        b'{"method": 1}',
        b'{"method": "Jump"}',
        b'{"method": "a.b", "parameters": []}',
        b'{"method": "a.b", "more": 1}',
        b'{"method": "a.b", "oneway": "yes"}',
        b'{"method": "a.b", "parameters": {"x": NaN}}',
        b'{"method": "a.b", "parameters": {"x": -Infinity}}',
        b'{"method": "a.b", "parameters": {"x": ' + b"9" * 5000 + b"}}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_what_is_no_call_ends_the_connection(message: bytes) -> None:
    with pytest.raises(ConnectionLost):
        decode_call_untrusted(message)


@pytest.mark.parametrize(
    "message", [b"7", b'{"error": 1}', b'{"parameters": 1}', b'{"continues": 0}']
)
def test_what_is_no_reply_ends_it_too(message: bytes) -> None:
    with pytest.raises(ConnectionLost):
        decode_reply_untrusted(message)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_call_or_end_it(message: bytes) -> None:
    try:
        call = decode_call_untrusted(message)
    except ConnectionLost:
        return
    assert "." in call.method


def test_a_message_has_a_bound() -> None:
    splitter = Splitter(limit=4)
    assert splitter.feed_untrusted(b"1234\000123") == [b"1234"]
    assert splitter.partial
    assert splitter.feed_untrusted(b"4\0") == [b"1234"]
    with pytest.raises(ConnectionLost, match="more than 4 bytes"):
        splitter.feed_untrusted(b"12345")
    with pytest.raises(ConnectionLost, match="more than 4 bytes"):
        Splitter(limit=4).feed_untrusted(b"1\00012345\0")


def test_an_error_says_what_it_is() -> None:
    assert str(VarlinkError("a.B", {"why": "so", "errno": 5})) == "a.B (why: so, errno: 5)"
    assert str(VarlinkError("a.B")) == "a.B"

"""The fuzz target of the control interface, on hypothesis' bytes: it runs, and can find things."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz import fuzz_varlink
from vfio_user_virtio.control.interface import INTERFACES

if TYPE_CHECKING:
    from vfio_user_virtio.control.varlink import Call

METHODS = [f"{one.name}.{method}" for one in INTERFACES.values() for method in one.methods]
FIELDS = ("device", "state", "ranges", "pieces", "range", "keep", "data", "iova", "size")

values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 64) | st.sampled_from(["vm1", "STOP", "AA=="]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=3)
    ),
    max_leaves=6,
)
calls = st.fixed_dictionaries(
    {"method": st.sampled_from(METHODS)},
    optional={
        "parameters": st.dictionaries(st.sampled_from(FIELDS), values, max_size=3),
        "more": st.booleans(),
        "oneway": st.sampled_from([True, False, 1]),
    },
)


@given(st.binary(max_size=200))
@example(b"")
def test_any_bytes(data: bytes) -> None:
    fuzz_varlink.one_input(data)


@given(st.lists(calls, max_size=4), st.integers(0, 255))
def test_likely_calls(sequence: list[object], first: int) -> None:
    data = b"".join(json.dumps(call).encode() + b"\0" for call in sequence)
    fuzz_varlink.one_input(bytes([first]) + data)


def test_good_calls_get_through() -> None:
    call = '{"method": "io.vfio-user-virtio.Control.GetDevices"}\0'
    assert fuzz_varlink.one_input(b"\5" + 2 * call.encode()) == 2


def test_it_finds_a_call_that_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_varlink, "encode_call", lambda call: b'{"method":"a.B"}\0')
    with pytest.raises(AssertionError):
        fuzz_varlink.one_input(b'\0{"method": "a.C"}\0')


def test_it_finds_a_check_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(call: Call) -> bool:
        raise KeyError(call.name)

    monkeypatch.setattr(fuzz_varlink, "check_parameters", check)
    with pytest.raises(KeyError):
        fuzz_varlink.one_input(b'\0{"method": "a.C"}\0')
